"""`mainspring prepare`: raw files -> cleaned, deduplicated, tokenized, split, written. In this order, on one screen each.

Memory holds about 200 bytes a document; the cleaned text waits in a spool file between the passes.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine import __version__
from engine.config.prepare import PrepareConfig
from engine.data import manifest as manifests
from engine.data import staging
from engine.data.cleaning import Cleaner, Limits, select_rules
from engine.data.dedup import ExactDedup, content_digest
from engine.data.indexed import IndexedDatasetWriter
from engine.data.reading import Quarantine, Reader
from engine.data.sources import Listing, SourceFile, list_files, show
from engine.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from engine.data.tokenizer_training import EOD
from engine.errors import UserError

Log = Callable[[str], None]

# Enough text at once to keep all cores busy in the tokenizer, little enough to hold its ids in memory.
_BATCH_BYTES = 4_000_000
_BATCH_DOCUMENTS = 2048
# Decoded again and compared: the first documents of the corpus, none longer than this.
_CHECKED_DOCUMENTS, _CHECKED_BYTES = 32, 100_000


def prepare(config: PrepareConfig, *, log: Log = lambda line: None, progress: Log = lambda line: None) -> dict[str, Any]:
    """Make ``config.output`` and return its manifest; one that is there, unchanged and whole is reused.

    ``log`` gets a line for each thing done, ``progress`` many short ones. Raises UserError with nothing half-written.
    """
    _check_place(config)
    rules = select_rules(config.skip_rule)
    with _as_user_error(config.output):
        staging.recover(config.output)
        listing = list_files(config)
        tokenizer = load_tokenizer(config.tokenizer, eod_token=config.eod_token) if config.tokenizer else None
        settings = manifests.settings_of(config, tokenizer)
        if manifests.is_prepared(config.output) and not config.overwrite:
            return _reuse(config, listing, settings, log)
        with staging.staged(config.output) as folder:
            job = _Job(config, folder, log, progress)
            manifest = job.run(listing, Cleaner(Limits(config.min_characters, config.max_characters), rules), tokenizer)
            manifest["settings"] = settings
            (folder / manifests.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            staging.publish(folder, config.output)
    return manifest


def _check_place(config: PrepareConfig) -> None:
    output = config.output
    if output.exists() and not output.is_dir():
        raise UserError("is a file", where=show(output), fix="Choose another --output.")
    if output.is_dir() and any(output.iterdir()) and not manifests.is_prepared(output):
        raise UserError(
            "exists and is not a prepared directory", where=show(output), fix="Choose another --output, or empty it yourself."
        )
    for source in [*config.input, *([config.tokenizer] if config.tokenizer else [])]:
        if output.resolve() in [source.resolve(), *source.resolve().parents]:
            raise UserError(f"holds the input {show(source)}", where=show(output), fix="Choose another --output.")


def _reuse(config: PrepareConfig, listing: Listing, settings: dict, log: Log) -> dict[str, Any]:
    manifest = manifests.load(config.output)
    sources = manifests.current_sources(listing.files)
    found = manifests.changes(manifest, manifests.load_sources(config.output), settings, sources)
    if found:
        raise UserError(
            f"exists and was prepared from something else: {'; '.join(found)}",
            where=show(config.output), fix="Replace it with --overwrite, or choose another --output.",
        )  # fmt: skip
    manifests.verify(config.output, manifest)
    log(f"{show(config.output)}: prepared before from the same input and settings, used as it is")
    return manifest


@contextlib.contextmanager
def _as_user_error(output: Path) -> Iterator[None]:
    # Reading has its own handling; what is left is writing: no space, no permission, a read-only disk.
    try:
        yield
    except OSError as error:
        where = show(error.filename) if error.filename else show(output)
        problem = f"cannot be written ({error.strerror or error})"
        raise UserError(problem, where=where, fix="Free space there or choose another --output; nothing is left over.") from error


class _Spool:
    """Cleaned documents as UTF-8, one after the other in a file; lengths (bytes) and split keys in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.lengths = array.array("Q")
        self.keys = array.array("Q")

    def append(self, stream: BinaryIO, raw: bytes, key: int) -> None:
        stream.write(raw)
        self.lengths.append(len(raw))
        self.keys.append(key)

    def texts(self) -> Iterator[str]:
        with open(self.path, "rb") as stream:
            for length in self.lengths:
                yield stream.read(length).decode()


def split_key(digest: bytes, seed: int) -> int:
    """A uniform 64-bit number of a document's content and the seed alone: data added later moves no document."""
    return int.from_bytes(hashlib.sha256(seed.to_bytes(16, "little") + digest).digest()[:8], "big")


def choose_validation(keys: np.ndarray, fraction: float) -> np.ndarray:
    """[documents] bool: held out. Of two or more documents at least one is, and at least one is not.

    Only where the fraction of so few documents would be none, the one with the smallest key is taken.
    """
    if fraction == 0 or len(keys) < 2:
        return np.zeros(len(keys), bool)
    held_out = keys < np.uint64(int(fraction * 2**64))
    if not held_out.any():
        held_out[keys.argmin()] = True
    if held_out.all():
        held_out[keys.argmax()] = False
    return held_out


@dataclass
class _Job:
    """One run into an empty ``folder``."""

    config: PrepareConfig
    folder: Path
    log: Log
    progress: Log

    def run(self, listing: Listing, cleaner: Cleaner, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Everything but the manifest's settings and the rename."""
        spool, dedup = _Spool(self.folder / "documents.spool"), ExactDedup()
        with open(self.folder / manifests.QUARANTINE, "w", encoding="utf-8") as stream:
            quarantine = Quarantine(stream)
            for path, reason in listing.unreadable:
                quarantine.add(path, None, "unreadable", reason)
            inputs, read = self.collect(listing.files, cleaner, dedup, quarantine, spool)
        if listing.links_skipped:
            self.log(f"{listing.links_skipped:,} symbolic links were not followed (--follow_symlinks)")
        held_out = choose_validation(np.array(spool.keys, np.uint64), self.config.validation_fraction)
        trained = None
        if tokenizer is None:
            tokenizer, trained = self.train(spool, held_out)
        tokenizer.save(self.folder / "tokenizer")
        splits, checked, lossy = self.tokenize(spool, held_out, tokenizer)
        spool.path.unlink()
        return {
            "version": manifests.VERSION,
            "engine_version": __version__,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.eod_token,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer": {"trained": trained, "documents_checked": checked, "documents_not_restored": lossy},
            "splits": splits,
            "documents": {
                "read": read,
                "dropped": cleaner.report.dropped.total(),
                "duplicates": dedup.duplicates,
                "kept": len(dedup),
            },
            "cleaning": cleaner.report.as_manifest(cleaner.rules),
            "dedup": {"duplicates": dedup.duplicates, "samples": dedup.samples},
            "quarantine": quarantine.as_manifest(),
            "sources": inputs,
            "sources_sha256": manifests.sha256_file(self.folder / manifests.SOURCES),
        }

    def collect(
        self, files: list[SourceFile], cleaner: Cleaner, dedup: ExactDedup, quarantine: Quarantine, spool: _Spool
    ) -> tuple[list[dict], int]:
        """Read, clean and deduplicate into the spool. Returns the manifest's inputs, and the documents read."""
        started, read, size = time.perf_counter(), 0, 0
        reader = Reader(self.config, quarantine)
        inputs = [{"path": show(path), "files": 0, "bytes": 0, "documents": 0} for path in self.config.input]
        with open(spool.path, "wb") as out, open(self.folder / manifests.SOURCES, "w", encoding="utf-8") as sources:
            for number, file in enumerate(files):
                kept = 0
                for document in reader.read(file):
                    read += 1
                    text = cleaner.clean(document.text, document.kind, document.source, truncated=document.truncated)
                    if text is None:
                        continue
                    raw = text.encode()
                    digest = content_digest(raw)
                    if dedup.add(digest, document.source):
                        spool.append(out, raw, split_key(digest, self.config.seed))
                        kept += 1
                item = {"input": file.input, "path": file.name, "sha256": reader.sha256, "bytes": reader.size}
                sources.write(json.dumps(item | {"documents": kept}) + "\n")
                total = inputs[file.input]
                for name, count in (("files", 1), ("bytes", reader.size), ("documents", kept)):
                    total[name] += count
                size += reader.size
                self.progress(f"read {number + 1:,} of {len(files):,} files, {size / 1e6:,.0f} MB, {len(dedup):,} documents")
        reader.check_bad_fraction()
        if not len(dedup):
            raise _nothing_left(read, cleaner, quarantine)
        self.log(f"read {len(files):,} files, {size / 1e6:,.1f} MB, in {time.perf_counter() - started:.1f} s: {read:,} "
                 f"documents, {cleaner.report.dropped.total():,} dropped, {dedup.duplicates:,} duplicates, {len(dedup):,} "
                 f"kept; in quarantine {quarantine.files:,} files and {quarantine.lines:,} lines")  # fmt: skip
        return inputs, read

    def train(self, spool: _Spool, held_out: np.ndarray) -> tuple[Tokenizer, dict[str, Any]]:
        """A tokenizer from the training documents alone (a fixed sample of them, if they are many)."""
        started = time.perf_counter()
        config, counted = self.config, {"documents": 0, "bytes": 0}
        picked = _sample(spool, held_out, budget=config.tokenizer_sample_mb * 1e6)

        def texts() -> Iterator[str]:
            for text, length, chosen in zip(spool.texts(), spool.lengths, picked, strict=True):
                if chosen:
                    counted["documents"] += 1
                    counted["bytes"] += length
                    yield text

        self.progress(f"training a {config.tokenizer_kind} tokenizer of {config.trained_vocab_size:,} tokens")
        tokenizer = train_tokenizer(
            texts(), config.trained_vocab_size, config.tokenizer_kind,
            specials=config.special_tokens, eod_token=config.eod_token or EOD,
        )  # fmt: skip
        less = "" if tokenizer.vocab_size == config.trained_vocab_size else f" (of {config.trained_vocab_size:,} asked: little text)"
        self.log(f"trained a {config.tokenizer_kind} tokenizer of {tokenizer.vocab_size:,} tokens{less} on "
                 f"{counted['bytes'] / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s")  # fmt: skip
        return tokenizer, {"kind": config.tokenizer_kind} | counted

    def tokenize(self, spool: _Spool, held_out: np.ndarray, tokenizer: Tokenizer) -> tuple[dict[str, dict], int, int]:
        """Write both splits, in the order of the sources; then the manifest's splits, documents checked, not restored."""
        started, checked, lossy, done = time.perf_counter(), 0, 0, 0
        counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in manifests.SPLITS}
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(IndexedDatasetWriter(self.folder / split, tokenizer.vocab_size))
                for split in manifests.SPLITS
            }
            for first, texts in _batches(spool):
                for number, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True), start=first):
                    if checked < _CHECKED_DOCUMENTS and spool.lengths[number] <= _CHECKED_BYTES:
                        checked += 1
                        lossy += tokenizer.decode(ids) != text
                    split = manifests.SPLITS[int(held_out[number])]
                    writers[split].add_document(np.array([*ids, tokenizer.eod_id], np.int32))
                    for name, count in (("documents", 1), ("tokens", len(ids) + 1), ("bytes", spool.lengths[number])):
                        counts[split][name] += count
                    done += spool.lengths[number]
                self.progress(f"tokenized {done / 1e6:,.0f} of {sum(spool.lengths) / 1e6:,.0f} MB")
        for split, numbers in counts.items():
            for suffix in ("bin", "idx"):
                numbers[f"{suffix}_sha256"] = manifests.sha256_file(self.folder / f"{split}.{suffix}")
        total = sum(numbers["tokens"] for numbers in counts.values())
        self.log(f"tokenized {done / 1e6:,.1f} MB into {total:,} tokens in {time.perf_counter() - started:.1f} s")
        if lossy:
            self.log(f"this tokenizer loses text: {lossy} of the first {checked} documents do not come back as they were")
        return counts, checked, lossy


def _nothing_left(read: int, cleaner: Cleaner, quarantine: Quarantine) -> UserError:
    if not read:
        first = quarantine.samples[0] if quarantine.samples else None
        detail = f"; the first unreadable one is {first['file']} ({first['detail']})" if first else ""
        return UserError(f"no documents in the input{detail}", fix="Check --input, and that the files are UTF-8.")
    rule, count = cleaner.report.dropped.most_common(1)[0]
    description = next(item.description for item in cleaner.rules if item.name == rule)
    flags = {"too_short": "Lower --min_characters.", "too_long": "Raise --max_characters.", "empty": "Check --input."}
    return UserError(
        f"cleaning removed all {read:,} documents; rule {rule} ({description}) removed most, {count:,}, among them "
        f"{cleaner.report.samples[rule][0]['source']}",
        fix=flags.get(rule, f"If it is wrong here, leave it out with --skip_rule {rule}."),
    )


def _sample(spool: _Spool, held_out: np.ndarray, budget: float) -> np.ndarray:
    """[documents] bool: training documents of about ``budget`` bytes, chosen by content. At least one."""
    lengths = np.array(spool.lengths, np.float64) * ~held_out
    share = min(1.0, budget / max(lengths.sum(), 1.0))
    # The low half of the key: the high one decided the split.
    picked = ~held_out & ((np.array(spool.keys, np.uint64) & np.uint64(0xFFFFFFFF)) < np.uint64(int(share * 2**32)))
    if not picked.any():
        picked[np.flatnonzero(~held_out)[0]] = True
    return picked


def _batches(spool: _Spool) -> Iterator[tuple[int, list[str]]]:
    """(number of the first document, texts)."""
    texts: list[str] = []
    first, size = 0, 0
    for number, text in enumerate(spool.texts()):
        texts.append(text)
        size += len(text)
        if size >= _BATCH_BYTES or len(texts) >= _BATCH_DOCUMENTS:
            yield first, texts
            texts, first, size = [], number + 1, 0
    if texts:
        yield first, texts


class _Console:
    """Lines on stderr; progress overwrites itself on a terminal and is a line every ten seconds in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (0 if self._terminal else 10)

    def progress(self, line: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + (0.2 if self._terminal else 10)
            print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def log(self, line: str) -> None:
        print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config = parse(PrepareConfig, argv, prog="mainspring prepare")
    console = _Console()
    manifest = prepare(config, log=console.log, progress=console.progress)
    for split, numbers in manifest["splits"].items():
        print(f"{split}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens")
    print(f"{show(config.output)}: vocabulary {manifest['vocab_size']:,}, tokenizer {manifest['tokenizer_sha256'][:12]}")
    return 0
