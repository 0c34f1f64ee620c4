"""Steps `tokenizer` and `tokenize`: the tokenizer, and each unit's documents as a shard of every split.

`tokenizer/00000/` is a tokenizer directory with `trained.json` beside it. `tokenize/UNIT/` has SPLIT.bin and SPLIT.idx
where the unit holds documents of the split, and `report.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine import disk
from engine.data.indexed import IndexedDatasetWriter
from engine.data.preparing import count, read, splits
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job
from engine.data.sources import show
from engine.data.spool import split_texts
from engine.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from engine.data.tokenizer_training import EOD
from engine.errors import UserError

TOKENIZER, TOKENIZE = "tokenizer", "tokenize"
TRAINED = "trained.json"
# Decoded again and compared: the first documents of a unit, none longer than this.
CHECKED_DOCUMENTS, _CHECKED_BYTES = 32, 100_000


def tokenizer(job: Job, task: int, folder: Path, context: Context) -> None:
    """The only task: copies the one that is given, or trains one from the training documents alone."""
    config = job.config
    if config.tokenizer is not None:
        given = load_tokenizer(config.tokenizer, eod_token=config.eod_token)
        if given.sha256 != job.settings["tokenizer"]:
            raise UserError("was changed while data was prepared with it", where=show(config.tokenizer),
                            fix="Start again.")  # fmt: skip
        given.save(folder / "model")
        trained = None
    else:
        sample = _Sample(job, context)
        made = train_tokenizer(
            sample.texts(), config.trained_vocab_size, config.tokenizer_kind, specials=config.special_tokens,
            eod_token=config.eod_token or EOD, form=config.tokenizer_form,
        )  # fmt: skip
        made.save(folder / "model")
        trained = {"kind": config.tokenizer_kind, "form": config.tokenizer_form, "documents": sample.documents,
                   "bytes": sample.size}
    (folder / TRAINED).write_text(json.dumps(trained), encoding="utf-8")


def tokenizer_of(job: Job) -> Tokenizer:
    """Loaded once a process."""
    if TOKENIZER not in job.memory:
        job.memory[TOKENIZER] = load_tokenizer(job.place(TOKENIZER, 0) / "model")
    return job.memory[TOKENIZER]


def trained_of(job: Job) -> dict[str, Any] | None:
    return job.read_json(TOKENIZER, 0, TRAINED)


class _Sample:
    """Training documents chosen by content, in the order of the sources; counted as they pass. At least one."""

    def __init__(self, job: Job, context: Context):
        self.job, self.context = job, context
        self.documents, self.size = 0, 0

    def texts(self) -> Iterator[str]:
        share = count.choice_of(self.job)["sample_share"]
        for unit in range(self.job.units):
            yield from self._of(unit, share)
        unit = 0
        while not self.documents:  # so small a share that it missed them all
            yield from self._of(unit, 1.0, at_most=1)
            unit += 1

    def _of(self, unit: int, share: float, at_most: int | None = None) -> Iterator[str]:
        spool = read.spool_of(self.job, unit)
        # The low half of the key: the high one decided the split.
        low = spool.records["key"] & np.uint64(0xFFFFFFFF)
        picked = count.kept_in(self.job, unit) & (low < np.uint64(int(share * 2**32)))
        picked &= count.splits_in(self.job, unit) == splits.TRAIN
        if at_most is not None:
            picked[np.flatnonzero(picked)[at_most:]] = False
        for _, text, lengths in spool.batches(picked):
            for raw in split_texts(text, lengths):
                self.documents += 1
                self.size += len(raw)
                self.context.progress(self.size)
                yield raw.decode()


def tokenize(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` writes unit ``task``."""
    model, spool = tokenizer_of(job), read.spool_of(job, task)
    kept, split_of = count.kept_in(job, task), count.splits_in(job, task)
    report: dict[str, Any] = {"splits": {}, "restored": [], "with_eod": 0}
    checked = set(np.flatnonzero(kept & (spool.records["length"] <= _CHECKED_BYTES))[:CHECKED_DOCUMENTS].tolist())
    done = 0
    for split, name in enumerate(splits.names_of(job.config)):
        picked = kept & (split_of == split)
        if not picked.any():
            continue
        with IndexedDatasetWriter(folder / name, model.vocab_size, durable=False) as writer:
            for numbers, text, sizes in spool.batches(picked):
                ids, lengths = model.encode_spans(text, sizes, context.threads, end=model.eod_id)
                writer.add_documents(ids, lengths)
                report["with_eod"] += _documents_with(ids, lengths, model.eod_id)
                if not checked.isdisjoint(numbers.tolist()):
                    report["restored"] += _restored(model, checked, numbers, split_texts(text, sizes), ids, lengths)
                done += len(text)
                context.progress(done)
        report["splits"][name] = {
            "documents": int(picked.sum()),
            "tokens": writer.num_tokens,
            "bytes": int(spool.records["length"][picked].sum()),
        } | {f"{end}_sha256": disk.sha256(folder / f"{name}.{end}") for end in ("bin", "idx")}
    context.finished(done)
    report["restored"] = [ok for _, ok in sorted(report["restored"])]
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def report_of(job: Job, unit: int) -> dict[str, Any]:
    """What ``tokenize`` counted."""
    return job.read_json(TOKENIZE, unit, "report.json")


def _documents_with(ids: np.ndarray, lengths: np.ndarray, eod_id: int) -> int:
    """How many documents hold, before their end, the token that ends them."""
    ends = np.cumsum(lengths)
    found = np.flatnonzero(ids == eod_id)
    if len(found) == len(lengths):
        return 0
    documents = np.searchsorted(ends, found, side="right")
    return len(np.unique(documents[found != ends[documents] - 1]))


def _restored(
    model: Tokenizer, checked: set[int], numbers: np.ndarray, texts: list[bytes], ids: np.ndarray, lengths: np.ndarray
) -> list[tuple[int, bool]]:
    """(number, is it what it was when decoded again) of the batch's documents that are ``checked``."""
    ends = np.cumsum(lengths)
    return [
        (number, model.decode(ids[end - length : end - 1].tolist()) == text.decode())
        for number, text, length, end in zip(numbers.tolist(), texts, lengths, ends, strict=True)
        if number in checked
    ]
