"""Steps `exact`, `sign`, `near` and `cluster`: which documents go because another is the same, or nearly the same.

`exact/PART/` and `cluster/00000/` hold `pairs.npy`: (unit, doc, first_unit, first_doc) of every document that goes and
the one that stays for it, sorted by (unit, doc); and `units.npy`, the first of these four. The last three steps have
tasks only with ``near_dedup``. What is compared are chunks: consecutive documents of a unit, which has several of them
only where it has very many documents; so memory does not grow with a unit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.config.near_dedup import NearDedupConfig
from engine.data.dedup import DUPLICATE, duplicate_parts, exact_duplicates
from engine.data.near_dedup import Signer, near_clusters, near_parts, write_pairs, write_signatures
from engine.data.preparing import read
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job
from engine.data.spool import Spool

EXACT, SIGN, NEAR, CLUSTER = "exact", "sign", "near", "cluster"
# Signatures of 512 bytes each, so 32 MB of them are in memory.
SIGNED_DOCUMENTS = 1 << 16


def exact_tasks(job: Job) -> int:
    """Ranges of the digest, as many as keep each in bounded memory."""
    return duplicate_parts(_chunks(job, read.NAME, "*.run"))


def exact(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` compares range ``task`` of the digests."""
    runs = _chunks(job, read.NAME, "*.run")
    _save(folder, exact_duplicates(runs, task, exact_tasks(job)), runs, read.RUN_DOCUMENTS)


def sign_tasks(job: Job) -> int:
    return job.units if job.config.near_dedup else 0


def sign(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` signs the documents of unit ``task`` that are no copies: 00000.signatures, 00001.signatures …"""
    config = _near(job)
    spool, signer, done = read.spool_of(job, task), Signer(config), 0
    copies = np.zeros(len(spool), bool)
    copies[pairs_of(job, EXACT, task)["doc"]] = True
    for number, first in enumerate(range(0, max(len(spool), 1), SIGNED_DOCUMENTS)):
        last = min(len(spool), first + SIGNED_DOCUMENTS)
        # What is not signed is like nothing, not even itself.
        signatures = np.full((last - first, config.permutations), 0xFFFFFFFF, np.uint32)
        for numbers, text, lengths in spool.batches(_between(spool, first, last) & ~copies):
            signatures[numbers - first] = signer.sign_packed(text, lengths.astype(np.uint64), context.threads)
            done += len(text)
            context.progress(done)
        write_signatures(folder / f"{number:05}.signatures", signatures, config)
    context.finished(done)


def _between(spool: Spool, first: int, last: int) -> np.ndarray:
    inside = np.zeros(len(spool), bool)
    inside[first:last] = True
    return inside


def near_tasks(job: Job) -> int:
    """Every band, in as many ranges of its keys as keep each in bounded memory."""
    if job.config.near_dedup is None:
        return 0
    return job.config.near_dedup.split[0] * near_parts(_chunks(job, SIGN, "*.signatures"), job.config.near_dedup)


def near(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` finds the pairs of one band and range of keys."""
    config, files = _near(job), _chunks(job, SIGN, "*.signatures")
    band, part = divmod(task, near_parts(files, config))
    write_pairs(folder / "found.pairs", files, config, band, part=part, parts=near_parts(files, config))


def cluster_tasks(job: Job) -> int:
    return 1 if job.config.near_dedup else 0


def cluster(job: Job, task: int, folder: Path, context: Context) -> None:
    """The only task: which of the pairs go."""
    files = _chunks(job, SIGN, "*.signatures")
    pairs = near_clusters([place / "found.pairs" for place in job.places(NEAR)], len(files))
    _save(folder, pairs, files, SIGNED_DOCUMENTS)


def _near(job: Job) -> NearDedupConfig:
    assert job.config.near_dedup is not None, "the step has no tasks without it"
    return job.config.near_dedup


def _chunks(job: Job, step: str, pattern: str) -> list[Path]:
    """The files of all units, in the order of the documents."""
    return [path for unit in range(job.units) for path in sorted(job.place(step, unit).glob(pattern))]


def _save(folder: Path, pairs: np.ndarray, chunks: list[Path], documents: int) -> None:
    """Pairs of chunks of so many ``documents`` (the file is called by its number in the unit) as pairs of units."""
    units = np.array([int(path.parent.name) for path in chunks], "u4")
    firsts = np.array([int(path.stem) * documents for path in chunks], "u8")
    for unit, document in (("unit", "doc"), ("first_unit", "first_doc")):
        chunk = pairs[unit].astype(np.int64)
        pairs[document] += firsts[chunk]
        pairs[unit] = units[chunk]
    np.save(folder / "pairs.npy", pairs)
    np.save(folder / "units.npy", pairs["unit"])  # of its own, so that a search in it reads a few pages


def pairs_of(job: Job, step: str, unit: int) -> np.ndarray:
    """The documents of ``unit`` that go after `exact` or `cluster`: [n] `DUPLICATE`, sorted by document."""
    found = [np.empty(0, DUPLICATE)]
    for part in job.places(step):
        pairs, units = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("pairs", "units"))
        first, last = np.searchsorted(units, np.array([unit, unit + 1], units.dtype))
        found.append(np.array(pairs[first:last]))
    pairs = np.concatenate(found)
    return pairs[np.argsort(pairs["doc"], kind="stable")]
