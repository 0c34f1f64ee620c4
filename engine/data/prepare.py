"""`mainspring prepare`: raw files -> cleaned, deduplicated, split, tokenized, written. In this order, a function each.

Memory holds about 200 bytes a document; the cleaned text waits in a spool file between the passes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from engine import __version__
from engine.config.prepare import PrepareConfig
from engine.data import manifest as manifests
from engine.data import staging
from engine.data.cleaning import Cleaner, Limits, select_rules
from engine.data.dedup import ExactDedup, content_digest
from engine.data.indexed import IndexedDatasetWriter
from engine.data.reading import Quarantine, Reader
from engine.data.sources import Listing, SourceFile, list_files, show
from engine.data.spool import Spool, choose_sample, choose_validation, split_key
from engine.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from engine.data.tokenizer_training import EOD
from engine.errors import UserError

Log = Callable[[str], None]

# Decoded again and compared: the first documents of the corpus, none longer than this.
_CHECKED_DOCUMENTS, _CHECKED_BYTES = 32, 100_000


def silent(line: str) -> None:
    """Where nobody wants to know."""


def prepare(config: PrepareConfig, *, log: Log = silent, progress: Log = silent) -> dict[str, Any]:
    """Make ``config.output`` and return its manifest; one that is there, unchanged and whole, is reused.

    ``log`` gets a line for each thing done, ``progress`` many short ones. Raises UserError with nothing half-written.
    """
    rules = select_rules(config.skip_rule)
    with as_user_error(config.output):
        staging.recover(config.output)
        _check_place(config)
        listing = list_files(config)
        tokenizer = load_tokenizer(config.tokenizer, eod_token=config.eod_token) if config.tokenizer else None
        settings = manifests.settings_of(config, tokenizer)
        if manifests.is_prepared(config.output) and not config.overwrite:
            return _reuse(config, listing, settings, log)
        with staging.staged(config.output) as folder:
            cleaner = Cleaner(limits=Limits(config.min_characters, config.max_characters), rules=rules)
            manifest = _Job(config, folder, log, progress).run(listing, cleaner, tokenizer) | {"settings": settings}
            (folder / manifests.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            staging.publish(folder, config.output)
    return manifest


def _check_place(config: PrepareConfig) -> None:
    output, fix = config.output, "Choose another --output."
    for source in [*config.input, *([config.tokenizer] if config.tokenizer else [])]:
        if output.resolve() in [source.resolve(), *source.resolve().parents]:
            raise UserError(f"holds the input {show(source)}", where=show(output), fix=fix)
    if output.exists() and not output.is_dir():
        raise UserError("is a file", where=show(output), fix=fix)
    if output.is_dir() and any(output.iterdir()) and not manifests.is_prepared(output):
        raise UserError("exists and is not a prepared directory", where=show(output), fix=f"{fix[:-1]}, or empty it.")


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
def as_user_error(output: Path) -> Iterator[None]:
    # The reader quarantines what it cannot read; what comes here is mostly writing: no space, no permission.
    try:
        yield
    except OSError as error:
        raise UserError(
            error.strerror or str(error), where=show(error.filename or output),
            fix=f"Free space or mend permissions there, or choose another --output; {show(output)} is as it was.",
        ) from error  # fmt: skip


@dataclass
class _Job:
    """One run into an empty ``folder``."""

    config: PrepareConfig
    folder: Path
    log: Log
    progress: Log

    def run(self, listing: Listing, cleaner: Cleaner, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Everything but the rename. Returns the manifest without its settings."""
        spool, dedup = Spool(self.folder / "documents.spool"), ExactDedup()
        if listing.links_skipped:
            self.log(f"{listing.links_skipped:,} symbolic links were not followed (--follow_symlinks)")
        with open(self.folder / manifests.QUARANTINE, "w", encoding="utf-8") as stream:
            quarantine = Quarantine(stream)
            for path, reason in listing.unreadable:
                quarantine.add(path, None, "unreadable", reason)
            inputs, read = self.collect(listing.files, cleaner, dedup, quarantine, spool)
        held_out = choose_validation(spool.keys, self.config.validation_fraction)
        trained = None
        if tokenizer is None:
            tokenizer, trained = self.train(spool, held_out)
        tokenizer.save(self.folder / "tokenizer")
        splits, checks = self.tokenize(spool, held_out, tokenizer)
        spool.path.unlink()
        return {
            "version": manifests.VERSION,
            "written_by": {"mainspring": __version__, "tokenizers": tokenizers.__version__},
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.eod_token,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer": {"trained": trained} | checks,
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
        self, files: list[SourceFile], cleaner: Cleaner, dedup: ExactDedup, quarantine: Quarantine, spool: Spool
    ) -> tuple[list[dict], int]:
        """Read, clean and deduplicate into the spool. Returns the manifest's sources, and the documents read."""
        started, read = time.perf_counter(), 0
        reader = Reader(self.config, quarantine)
        inputs = [{"path": show(path), "files": 0, "bytes": 0, "documents": 0} for path in self.config.input]
        with open(spool.path, "wb") as out, open(self.folder / manifests.SOURCES, "w", encoding="utf-8") as sources:
            for number, file in enumerate(files, start=1):
                before = len(dedup)
                for document in reader.read(file):
                    read += 1
                    text = cleaner.clean(document.text, document.kind, document.source, truncated=document.truncated)
                    if text is not None:
                        raw = text.encode()
                        digest = content_digest(raw)
                        if dedup.add(digest, document.source):
                            spool.append(out, raw, split_key(digest, self.config.seed))
                    self.progress(f"reading file {number:,} of {len(files):,}: {len(dedup):,} documents")
                kept = len(dedup) - before
                item = {"input": file.input, "path": file.name, "sha256": reader.sha256, "bytes": reader.size}
                sources.write(json.dumps(item | {"documents": kept}) + "\n")
                for name, count in (("files", 1), ("bytes", reader.size), ("documents", kept)):
                    inputs[file.input][name] += count
        reader.check_bad_fraction()
        if not len(dedup):
            raise _nothing_left(self.config, read, cleaner, quarantine)
        size, seconds = sum(item["bytes"] for item in inputs), time.perf_counter() - started
        self.log(f"read {len(files):,} files, {size / 1e6:,.1f} MB, in {seconds:.1f} s: {read:,} documents, "
                 f"{cleaner.report.dropped.total():,} dropped, {dedup.duplicates:,} duplicates, {len(dedup):,} kept; "
                 f"in quarantine {quarantine.files:,} files and {quarantine.lines:,} lines")  # fmt: skip
        return inputs, read

    def train(self, spool: Spool, held_out: np.ndarray) -> tuple[Tokenizer, dict[str, Any]]:
        """A tokenizer from the training documents alone (a fixed sample of them, if they are many)."""
        started, config = time.perf_counter(), self.config
        wanted = config.trained_vocab_size
        picked = choose_sample(spool, held_out, budget=config.tokenizer_sample_mb * 1e6)
        texts = (text for text, chosen in zip(spool.texts(), picked, strict=True) if chosen)
        self.progress(f"training a {config.tokenizer_kind} tokenizer of {wanted:,} tokens")
        tokenizer = train_tokenizer(
            texts, wanted, config.tokenizer_kind, specials=config.special_tokens, eod_token=config.eod_token or EOD
        )
        size = int(np.array(spool.lengths)[picked].sum())
        less = "" if tokenizer.vocab_size == wanted else f" ({wanted:,} were asked for, the text is too little)"
        self.log(f"trained a {config.tokenizer_kind} tokenizer of {tokenizer.vocab_size:,} tokens{less} on "
                 f"{size / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s")  # fmt: skip
        return tokenizer, {"kind": config.tokenizer_kind, "documents": int(picked.sum()), "bytes": size}

    def tokenize(
        self, spool: Spool, held_out: np.ndarray, tokenizer: Tokenizer
    ) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
        """Write both splits, in the order of the sources. Returns the manifest's splits, and what was checked."""
        started, done, total = time.perf_counter(), 0, sum(spool.lengths)
        counts: dict[str, dict[str, Any]] = {
            split: {"documents": 0, "tokens": 0, "bytes": 0} for split in manifests.SPLITS
        }
        checks = {"documents_checked": 0, "documents_not_restored": 0, "documents_with_eod_inside": 0}
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(IndexedDatasetWriter(self.folder / split, tokenizer.vocab_size))
                for split in manifests.SPLITS
            }
            for first, texts in spool.batches():
                for number, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True), first):
                    length = spool.lengths[number]
                    tokens = np.array([*ids, tokenizer.eod_id], np.int32)
                    checks["documents_with_eod_inside"] += bool((tokens[:-1] == tokenizer.eod_id).any())
                    if checks["documents_checked"] < _CHECKED_DOCUMENTS and length <= _CHECKED_BYTES:
                        checks["documents_checked"] += 1
                        checks["documents_not_restored"] += tokenizer.decode(ids) != text
                    split = manifests.SPLITS[int(held_out[number])]
                    writers[split].add_document(tokens)
                    for name, count in (("documents", 1), ("tokens", len(tokens)), ("bytes", length)):
                        counts[split][name] += count
                    done += length
                self.progress(f"tokenized {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
        for split, numbers in counts.items():
            for suffix in ("bin", "idx"):
                numbers[f"{suffix}_sha256"] = manifests.sha256_file(self.folder / f"{split}.{suffix}")
        tokens_all = sum(numbers["tokens"] for numbers in counts.values())
        self.log(f"tokenized {done / 1e6:,.1f} MB into {tokens_all:,} tokens in {time.perf_counter() - started:.1f} s")
        self._warn(checks, tokenizer)
        return counts, checks

    def _warn(self, checks: dict[str, int], tokenizer: Tokenizer) -> None:
        if lost := checks["documents_not_restored"]:
            self.log(f"warning: this tokenizer loses text: {lost} of the first {checks['documents_checked']} documents "
                     "do not decode to what they were")  # fmt: skip
        if ended := checks["documents_with_eod_inside"]:
            self.log(f"warning: {ended:,} documents hold {tokenizer.eod_token} as text, taken for their end")


def _nothing_left(config: PrepareConfig, read: int, cleaner: Cleaner, quarantine: Quarantine) -> UserError:
    where = ", ".join(show(path) for path in config.input[:3]) + (", …" if len(config.input) > 3 else "")
    if not read:
        first = quarantine.samples[0] if quarantine.samples else None
        detail = f"; the first unreadable one is {first['file']} ({first['detail']})" if first else ""
        return UserError(f"no documents{detail}", where=where, fix="Check --input, and that the files are UTF-8.")
    rule, count = cleaner.report.dropped.most_common(1)[0]
    description = next(item.description for item in cleaner.rules if item.name == rule)
    flags = {"too_short": "Lower --min_characters.", "too_long": "Raise --max_characters.", "empty": "Check --input."}
    return UserError(
        f"cleaning removed all {read:,} documents; rule {rule} ({description}) removed most, {count:,}, first "
        f"{cleaner.report.samples[rule][0]['source']}",
        where=where, fix=flags.get(rule, f"If it is wrong here, leave it out with --skip_rule {rule}."),
    )  # fmt: skip


class Console:
    """Lines on stderr; progress overwrites itself on a terminal and is a line every ten seconds in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (0 if self._terminal else 10)

    def progress(self, line: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + (0.2 if self._terminal else 10)
            start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            print(start + line, end=end, file=sys.stderr, flush=True)

    def log(self, line: str) -> None:
        print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config = parse(PrepareConfig, argv, prog="mainspring prepare")
    console = Console()
    manifest = prepare(config, log=console.log, progress=console.progress)
    for split, numbers in manifest["splits"].items():
        print(f"{split}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens")
    vocabulary = f"vocabulary {manifest['vocab_size']:,}, tokenizer {manifest['tokenizer_sha256'][:12]}"
    print(f"{show(config.output)}: {vocabulary}")
    return 0
