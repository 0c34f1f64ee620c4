"""Step `exact`: which documents are later copies of another, by ranges of the digest.

Task ``part`` leaves `pairs.npy`: (unit, doc, first_unit, first_doc) of every later copy whose digest lies in its range,
sorted by (unit, doc); and `units.npy`, the first of these four.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.data.dedup import duplicate_parts, exact_duplicates
from engine.data.preparing import read
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job

NAME = "exact"


def tasks(job: Job) -> int:
    """Ranges of the digest, as many as keep each in bounded memory."""
    return duplicate_parts(_runs(job)[0])


def work(job: Job, task: int, folder: Path, context: Context) -> None:
    runs, units, firsts = _runs(job)
    pairs = exact_duplicates(runs, task, tasks(job))
    for unit, document in (("unit", "doc"), ("first_unit", "first_doc")):
        run = pairs[unit].astype(np.int64)
        pairs[document] += firsts[run]
        pairs[unit] = units[run]
    np.save(folder / "pairs.npy", pairs)
    np.save(folder / "units.npy", pairs["unit"])  # of its own, so that a search in it reads a few pages


def _runs(job: Job) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """All runs in the order of the documents: paths, and of each [runs] its unit and the number of its first document.

    The duplicates are found among runs, of which a unit has several only where it is huge.
    """
    runs, units, firsts = [], [], []
    for unit in range(job.units):
        for number, path in enumerate(sorted(job.place(read.NAME, unit).glob("*.run"))):
            runs.append(path)
            units.append(unit)
            firsts.append(number * read.RUN_DOCUMENTS)
    return runs, np.array(units, "<u4"), np.array(firsts, "<u8")


def pairs_of(job: Job, unit: int) -> np.ndarray:
    """The later copies in ``unit``, as (unit, doc, first_unit, first_doc), sorted by document."""
    found = []
    for part in job.places(NAME):
        pairs, units = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("pairs", "units"))
        first, last = np.searchsorted(units, np.array([unit, unit + 1], units.dtype))
        found.append(np.array(pairs[first:last]))
    pairs = np.concatenate(found)
    return pairs[np.argsort(pairs["doc"], kind="stable")]
