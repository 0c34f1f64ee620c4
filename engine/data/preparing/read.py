"""Step `read`: a unit's documents, read, cleaned and fingerprinted.

Leaves `text` and `documents` (engine.data.spool), `00000.run`, `00001.run` … (sorted digests of RUN_DOCUMENTS documents
each), `quarantine.jsonl` and `report.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.cleaning import Cleaner
from engine.data.cleaning_report import CleaningReport
from engine.data.dedup import content_digest, write_run
from engine.data.preparing.context import Context
from engine.data.preparing.job import Identity, Job, PlannedUnit, identity_of
from engine.data.quarantine import Quarantine
from engine.data.reading import Reader, place_of
from engine.data.sources import SourceFile, show
from engine.data.spool import NO_ROW, Spool, SpoolWriter, split_key
from engine.errors import UserError

NAME = "read"
QUARANTINE = "quarantine.jsonl"
# Sorting this many takes about 100 MB; a unit has more only where it is one huge compressed file.
RUN_DOCUMENTS = 1 << 20


def work(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` reads unit ``task``."""
    planned = job.unit(task)
    cleaner = _cleaner(job)
    with open(folder / QUARANTINE, "w", encoding="utf-8") as stream:
        quarantine = Quarantine(stream)
        reader = Reader(job.config, quarantine)
        slices, read = _collect(job, planned, reader, cleaner, folder, context)
    _write_runs(folder)
    report = {
        "read": read,
        "slices": slices,
        "cleaning": cleaner.report.as_json(),
        "quarantine": quarantine.as_manifest(),
        "records": reader.records,
        "first_bad": reader.first_bad,
    }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _cleaner(job: Job) -> Cleaner:
    """With an empty report. Built once a process: it holds the evaluation sets."""
    if NAME not in job.memory:
        made = Cleaner.of(job.config)
        job.memory[NAME] = made, made.report.as_json()
    cleaner, empty = job.memory[NAME]
    cleaner.report = CleaningReport.from_json(empty)
    return cleaner


def _collect(
    job: Job, planned: PlannedUnit, reader: Reader, cleaner: Cleaner, folder: Path, context: Context
) -> tuple[list[dict[str, Any]], int]:
    """Spools what stays of the unit. Returns what `report.json` says of each slice, and the documents read."""
    slices, read, seed = [], 0, job.config.seed
    with SpoolWriter(folder) as spool:
        for number, (piece, identity) in enumerate(zip(planned.unit.slices, planned.files, strict=True)):
            _unchanged(piece.file, identity)
            for document in reader.read(piece):
                read += 1
                text = cleaner.clean(document.text, document.kind, document.source, truncated=document.truncated)
                if text is not None:
                    raw = text.encode()
                    digest = content_digest(raw)
                    spool.append(raw, digest, split_key(digest, seed), number, document.row)
                context.progress(reader.size)
            _unchanged(piece.file, identity)
            context.finished(reader.size)
            slices.append({"sha256": reader.sha256, "bytes": reader.size, "lines": reader.lines})
    return slices, read


def _unchanged(file: SourceFile, identity: Identity) -> None:
    # Half of an old file and half of a new one would be in nobody's manifest. One that is gone is for the reader.
    now = identity_of(file)
    if now is not None and now != identity:
        raise UserError("was changed while it was prepared", where=show(file.path), fix="Start again once it is ready.")


def _write_runs(folder: Path) -> None:
    digests = Spool(folder).records["digest"]
    for number, first in enumerate(range(0, max(len(digests), 1), RUN_DOCUMENTS)):
        write_run(folder / f"{number:05}.run", np.ascontiguousarray(digests[first : first + RUN_DOCUMENTS]))


def report_of(job: Job, unit: int) -> dict[str, Any]:
    """What ``work`` counted."""
    return job.read_json(NAME, unit, "report.json")


def spool_of(job: Job, unit: int) -> Spool:
    return Spool(job.place(NAME, unit))


def source_of(job: Job, unit: int, document: int) -> str:
    """Where a spooled document came from, as the reader says it: ``path``, ``path:row`` or ``path+start:row``."""
    record = spool_of(job, unit).records[document]
    piece = job.unit(unit).unit.slices[int(record["slice"])]
    return place_of(piece, None if record["row"] == NO_ROW else int(record["row"]))
