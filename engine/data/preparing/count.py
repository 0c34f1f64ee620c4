"""Steps `count` and `choose`: what stays of each unit; then what that says of all of them.

`count/UNIT/count.json` has the counts of one unit; `choose/00000/choice.json` what the later steps must agree on: which
documents change their split, and the share of the training documents that a tokenizer is trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.preparing import duplicates, read, summary
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job
from engine.data.preparing.splits import TRAIN, Extremes, Thresholds, forced

COUNT, CHOOSE = "count", "choose"
SAMPLES = 5


def kept_in(job: Job, unit: int) -> np.ndarray:
    """[documents] bool of a unit: neither a copy of an earlier document, nor nearly one."""
    kept = np.ones(len(read.spool_of(job, unit)), bool)
    for step in (duplicates.EXACT, duplicates.CLUSTER):
        kept[duplicates.pairs_of(job, step, unit)["doc"]] = False
    return kept


def splits_in(job: Job, unit: int) -> np.ndarray:
    """[documents] uint8 of a unit: number of the split. Meaningless for a document that is not kept."""
    splits = Thresholds.of(job.config).splits(read.spool_of(job, unit).records["key"])
    for document, split in choice_of(job)["forced"].get(str(unit), []):
        splits[document] = split
    return splits


def choice_of(job: Job) -> dict[str, Any]:
    return job.read_json(CHOOSE, 0, "choice.json")


def count_of(job: Job, unit: int) -> dict[str, Any]:
    return job.read_json(COUNT, unit, "count.json")


def count(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` counts unit ``task``."""
    records = read.spool_of(job, task).records
    copies, near = (duplicates.pairs_of(job, step, task) for step in (duplicates.EXACT, duplicates.CLUSTER))
    kept = kept_in(job, task)
    thresholds = Thresholds.of(job.config)
    numbers = np.flatnonzero(kept)
    lengths = records["length"][kept].astype(np.int64)
    training = thresholds.splits(records["key"][kept]) == TRAIN
    slices = len(job.unit(task).unit.slices)
    counted = {
        "kept": len(numbers),
        "bytes": int(lengths.sum()),
        "training_bytes": int(lengths[training].sum()),
        "duplicates": _duplicates(job, copies),
        "near_duplicates": _duplicates(job, near),
        "slices": np.bincount(records["slice"][kept], minlength=slices).tolist(),
        "extremes": Extremes.of(task, records["key"][kept], numbers, thresholds).as_json(),
    }
    (folder / "count.json").write_text(json.dumps(counted), encoding="utf-8")


def _duplicates(job: Job, pairs: np.ndarray) -> dict[str, Any]:
    return {"duplicates": len(pairs), "samples": [_sample(job, pair) for pair in pairs[:SAMPLES]]}


def _sample(job: Job, pair: np.void) -> dict[str, str]:
    return {
        "dropped": read.source_of(job, int(pair["unit"]), int(pair["doc"])),
        "same_as": read.source_of(job, int(pair["first_unit"]), int(pair["first_doc"])),
    }


def choose(job: Job, task: int, folder: Path, context: Context) -> None:
    """The only task. UserError where nothing is left, or too many lines were unusable."""
    summary.check(job)
    extremes = Extremes.merged(Extremes.from_json(count_of(job, unit)["extremes"]) for unit in range(job.units))
    moved: dict[str, list[tuple[int, int]]] = {}
    for (unit, document), split in forced(extremes, job.config).items():
        moved.setdefault(str(unit), []).append((document, split))
    training = max(1, sum(count_of(job, unit)["training_bytes"] for unit in range(job.units)))
    choice = {
        "forced": moved,
        "bytes": sum(count_of(job, unit)["bytes"] for unit in range(job.units)),
        "sample_share": min(1.0, job.config.tokenizer_sample_mb * 1e6 / training),
    }
    (folder / "choice.json").write_text(json.dumps(choice), encoding="utf-8")
