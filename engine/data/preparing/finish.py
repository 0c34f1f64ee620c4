"""Step `manifest`: everything that is published but the shards themselves, which are moved when it is.

`manifest/00000/` holds manifest.json (without the settings' place), sources.jsonl, shards.jsonl, quarantine.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from engine import __version__
from engine.data import manifest as manifests
from engine.data.cleaning import Cleaner
from engine.data.preparing import count, merge, read, summary, tokens
from engine.data.preparing.context import Context
from engine.data.preparing.job import ASSEMBLED, OUTPUT, Job
from engine.data.sources import show

NAME = "manifest"


def work(job: Job, task: int, folder: Path, context: Context) -> None:
    """The only task."""
    inputs = _write_sources(job, folder / manifests.SOURCES)
    _write_shards(job, folder / manifests.SHARDS)
    numbers = summary.line_numbers(job)
    with open(folder / manifests.QUARANTINE, "wb") as out:
        summary.write_quarantine(job, out, numbers)
    manifest = summary.numbered(_manifest(job), numbers) | {
        "sources": inputs,
        "sources_sha256": manifests.sha256_file(folder / manifests.SOURCES),
        "shards_sha256": manifests.sha256_file(folder / manifests.SHARDS),
        "settings": job.settings,
    }
    (folder / manifests.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest(job: Job) -> dict[str, Any]:
    model, counts = tokens.tokenizer_of(job), [count.count_of(job, unit) for unit in range(job.units)]
    cleaner = Cleaner.of(job.config)
    cleaner.report = summary.cleaned(job)
    found = {"dedup": _merged([item["duplicates"] for item in counts])}
    documents = {
        "read": sum(read.report_of(job, unit)["read"] for unit in range(job.units)),
        "dropped": cleaner.report.dropped.total(),
        "duplicates": found["dedup"]["duplicates"],
    }
    if job.config.near_dedup:
        found["near_dedup"] = _merged([item["near_duplicates"] for item in counts])
        documents["near_duplicates"] = found["near_dedup"]["duplicates"]
    documents["kept"] = sum(item["kept"] for item in counts)
    return {
        "version": manifests.VERSION,
        "written_by": {"mainspring": __version__, "tokenizers": tokenizers.__version__},
        "vocab_size": model.vocab_size,
        "eod_id": model.eod_id,
        "eod_token": model.eod_token,
        "tokenizer_sha256": model.sha256,
        "tokenizer": {"trained": tokens.trained_of(job)} | checks(job),
        "splits": _splits(job),
        "documents": documents,
        "cleaning": cleaner.as_manifest(),
        **found,
        "quarantine": summary.quarantined(job),
    }


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Duplicates of all units: how many, and the first few pairs."""
    samples = (sample for part in parts for sample in part["samples"])
    return {"duplicates": sum(part["duplicates"] for part in parts), "samples": list(islice(samples, count.SAMPLES))}


def checks(job: Job) -> dict[str, int]:
    """What was tried with the tokenizer: the first documents decoded again, and every one searched for its end."""
    restored: list[bool] = []
    with_eod = 0
    for unit in range(job.units):
        report = tokens.report_of(job, unit)
        restored += report["restored"][: tokens.CHECKED_DOCUMENTS - len(restored)]
        with_eod += report["with_eod"]
    return {
        "documents_checked": len(restored),
        "documents_not_restored": restored.count(False),
        "documents_with_eod_inside": with_eod,
    }


def _splits(job: Job) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for task, group in enumerate(merge.groups(job)):
        report = merge.report_of(job, task)
        if group.count == 1:
            found[group.split] = report
            continue
        total = found.setdefault(group.split, {"documents": 0, "tokens": 0, "bytes": 0, "shards": []})
        for name in ("documents", "tokens", "bytes"):
            total[name] += report[name]
        total["shards"].append({"name": group.name} | report)
    return found


def _write_sources(job: Job, path: Path) -> list[dict[str, Any]]:
    """A line for each slice that was read. Returns the manifest's sum of each input."""
    inputs = [{"path": show(path), "files": 0, "bytes": 0, "documents": 0} for path in job.config.input]
    with open(path, "w", encoding="utf-8") as sources:
        for unit in range(job.units):
            kept, slices = count.count_of(job, unit)["slices"], read.report_of(job, unit)["slices"]
            for piece, found, documents in zip(job.unit(unit).unit.slices, slices, kept, strict=True):
                file = piece.file
                item: dict[str, Any] = {"input": file.input, "path": file.name, "sha256": found["sha256"]}
                item |= {"bytes": found["bytes"], "documents": documents, "unit": unit}
                if piece.start or piece.end is not None:
                    item |= {"start": piece.start, "end": piece.end}
                sources.write(json.dumps(item) + "\n")
                total = inputs[file.input]
                total["files"] += not piece.start
                total["bytes"] += found["bytes"]
                total["documents"] += documents
    return inputs


def _write_shards(job: Job, path: Path) -> None:
    """A line for each unit and split: where in which shard its documents are, and the SHA-256 of their tokens."""
    with open(path, "w", encoding="utf-8") as shards:
        for task, group in enumerate(merge.groups(job)):
            sha256, first = merge.report_of(job, task)["bin_sha256"], 0
            for unit in group.units:
                counts = tokens.report_of(job, unit)["splits"][group.split]
                item = {
                    "shard": group.name, "shard_sha256": sha256, "unit": unit, "first_document": first,
                    "documents": counts["documents"], "tokens": counts["tokens"], "sha256": counts["bin_sha256"],
                }  # fmt: skip
                shards.write(json.dumps(item) + "\n")
                first += counts["documents"]


def assemble(job: Job) -> Path:
    """Moves what is published together and returns the folder. What a kill left half done a second call finishes."""
    done = job.folder / OUTPUT
    if not done.is_dir():
        folder = job.folder / f"{OUTPUT}.tmp"
        folder.mkdir(exist_ok=True)
        for source, target in _moves(job, folder):
            if source.exists():
                os.rename(source, target)
        shutil.copytree(job.place(tokens.TOKENIZER, 0) / "model", folder / "tokenizer", dirs_exist_ok=True)
        for name in (manifests.SOURCES, manifests.SHARDS, manifests.QUARANTINE, manifests.MANIFEST):
            shutil.copyfile(job.place(NAME, 0) / name, folder / name)
        os.rename(folder, done)
    (job.folder / ASSEMBLED).touch()
    return done


def _moves(job: Job, folder: Path) -> Iterator[tuple[Path, Path]]:
    for task, group in enumerate(merge.groups(job)):
        pair = merge.pair_of(job, task, group)
        for end in ("bin", "idx"):
            yield Path(f"{pair}.{end}"), folder / f"{group.name}.{end}"
