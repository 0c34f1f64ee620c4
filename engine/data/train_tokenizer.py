"""`mainspring train-tokenizer`: text -> a tokenizer directory.

    OUTPUT/tokenizer.json or tokenizer.model, tokenizer_config.json
    OUTPUT/training.json    what it was trained on: settings, files, documents, bytes; the tokenizer's hash
    OUTPUT/quarantine.jsonl what could not be read

Documents are repaired as in `prepare`, each taken once. Where there are more than ``sample_mb``, those with the
smallest hashes are taken: the choice depends on their content alone, not on order or files.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterator
from typing import Any

from engine import __version__
from engine.config.prepare import PrepareConfig
from engine.config.tokenizer import TrainTokenizerConfig
from engine.data import staging
from engine.data.cleaning_repair import repair
from engine.data.dedup import content_digest
from engine.data.prepare import Console, Log, as_user_error, silent
from engine.data.quarantine import Quarantine
from engine.data.reading import Reader
from engine.data.sources import Listing, list_files, show
from engine.data.spool import split_key
from engine.data.tokenizer import Tokenizer, train_tokenizer
from engine.errors import UserError

TRAINING = "training.json"
# What of the settings is looked at when listing and reading.
_READING = ("input", "output", "seed", "exclude", "include_hidden", "follow_symlinks", "text_field", "max_bad_fraction",
            "max_line_mb")  # fmt: skip


def train(config: TrainTokenizerConfig, *, log: Log = silent, progress: Log = silent) -> Tokenizer:
    """Make ``config.output`` and return the tokenizer in it. Raises UserError with nothing half-written."""
    with as_user_error(config.output):
        _check_place(config)
        staging.recover(config.output)
        started = time.perf_counter()
        reading = PrepareConfig(**{name: getattr(config, name) for name in _READING})
        listing = list_files(reading)
        with staging.staged(config.output) as folder:
            with open(folder / "quarantine.jsonl", "w", encoding="utf-8") as stream:
                sample = _Sample(int(config.sample_mb * 1e6), config.seed)
                quarantine = _read(reading, listing, sample, Quarantine(stream), progress)
            if not sample.documents:
                raise _nothing(config, quarantine)
            log(f"read {sample.seen:,} documents, took {sample.documents:,} of {sample.size / 1e6:,.1f} MB in "
                f"{time.perf_counter() - started:.1f} s")  # fmt: skip
            made = _train(config, sample, log, progress)
            made.save(folder)
            about = _about(config, made, sample, listing, quarantine)
            (folder / TRAINING).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            staging.publish(folder, config.output)
    return made


class _Sample:
    """Distinct documents in the order of their keys, as many as ``budget`` bytes hold and at least one."""

    def __init__(self, budget: int, seed: int):
        self.budget, self.seed = budget, seed
        self.seen, self.size = 0, 0
        self._held: list[tuple[int, int, bytes]] = []  # (minus key, number, text): the largest key on top
        self._keys: set[int] = set()
        self._limit = 2**64  # the smallest key that found no room; none above it may, or the order would matter

    @property
    def documents(self) -> int:
        return len(self._held)

    def add(self, text: str) -> None:
        """Takes the document, or does not; may give up others for it."""
        raw = text.encode()
        key = split_key(content_digest(raw), self.seed)
        self.seen += 1
        if key in self._keys or key >= self._limit:
            return
        heapq.heappush(self._held, (-key, self.seen, raw))
        self._keys.add(key)
        self.size += len(raw)
        while self.size > self.budget and len(self._held) > 1:
            left_out, _, gone = heapq.heappop(self._held)
            self._limit = -left_out
            self._keys.remove(self._limit)
            self.size -= len(gone)

    def texts(self) -> Iterator[str]:
        """In the order in which they were read."""
        for _, _, raw in sorted(self._held, key=lambda item: item[1]):
            yield raw.decode()


def _read(
    reading: PrepareConfig, listing: Listing, sample: _Sample, quarantine: Quarantine, progress: Log
) -> Quarantine:
    for path, reason in listing.unreadable:
        quarantine.add(path, None, "unreadable", reason)
    reader = Reader(reading, quarantine)
    for number, file in enumerate(listing.files, start=1):
        for document in reader.read(file):
            if document.truncated:
                continue
            text, _ = repair(document.text, document.kind)
            if text:
                sample.add(text)
        progress(f"read file {number:,} of {len(listing.files):,}: {sample.seen:,} documents")
    reader.check_bad_fraction()
    return quarantine


def _train(config: TrainTokenizerConfig, sample: _Sample, log: Log, progress: Log) -> Tokenizer:
    started = time.perf_counter()
    progress(f"training a {config.kind} tokenizer of {config.vocab_size:,} tokens")
    options: dict[str, Any] = {"specials": config.special_tokens, "eod_token": config.eod_token, "form": config.form}
    made: Tokenizer = train_tokenizer(sample.texts(), config.vocab_size, config.kind, **options)
    wanted = config.vocab_size
    less = "" if made.vocab_size == wanted else f" ({wanted:,} were asked for, the text is too little)"
    log(f"trained a {config.kind} tokenizer of {made.vocab_size:,} tokens{less} in "
        f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    return made


def _check_place(config: TrainTokenizerConfig) -> None:
    output, fix = config.output, "Choose another --output."
    for source in config.input:
        if output.resolve() in [source.resolve(), *source.resolve().parents]:
            raise UserError(f"holds the input {show(source)}", where=show(output), fix=fix)
    if output.exists() and not output.is_dir():
        raise UserError("is a file", where=show(output), fix=fix)
    if output.is_dir() and any(output.iterdir()):
        if not (output / TRAINING).is_file():
            raise UserError("exists and is no tokenizer of train-tokenizer", where=show(output), fix=fix)
        if not config.overwrite:
            fix = "Replace it with --overwrite, or choose another --output."
            raise UserError("exists", where=show(output), fix=fix)


def _nothing(config: TrainTokenizerConfig, quarantine: Quarantine) -> UserError:
    where = ", ".join(show(path) for path in config.input[:3]) + (", …" if len(config.input) > 3 else "")
    first = quarantine.samples[0] if quarantine.samples else None
    detail = f"; the first unreadable one is {first['file']} ({first['detail']})" if first else ""
    return UserError(f"no documents{detail}", where=where, fix="Check --input, and that the files are UTF-8.")


def _about(
    config: TrainTokenizerConfig, made: Tokenizer, sample: _Sample, listing: Listing, quarantine: Quarantine
) -> dict[str, Any]:
    return {
        "written_by": {"mainspring": __version__},
        "settings": config.model_dump(mode="json", exclude={"output", "overwrite"}),
        "files": len(listing.files),
        "documents": {"read": sample.seen, "taken": sample.documents},
        "bytes": sample.size,
        "quarantine": quarantine.as_manifest(),
        "vocab_size": made.vocab_size,
        "eod_id": made.eod_id,
        "eod_token": made.eod_token,
        "tokenizer_sha256": made.sha256,
    }


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config, console = parse(TrainTokenizerConfig, argv, prog="mainspring train-tokenizer"), Console()
    made = train(config, log=console.log, progress=console.progress)
    print(f"{show(config.output)}: vocabulary {made.vocab_size:,}, tokenizer {made.sha256[:12]}")
    return 0
