"""Steps `group` and `merge`: the units' shards, joined into the files that are published.

`group/00000/groups.jsonl` says which shards there will be. A group is a run of consecutive units that become one shard
of one split. Its task leaves the joined pair and `report.json`; of a group of one unit only the report, since its shard
is published as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import disk
from engine.data.concatenate import concatenate
from engine.data.indexed import IndexedDatasetWriter, dtype_code
from engine.data.preparing import splits, tokens
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job

GROUP, MERGE = "group", "merge"


@dataclass(frozen=True)
class Group:
    """Shard ``number`` of ``count`` of a split: ``name`` without suffix, from these units, in order."""

    split: str
    number: int
    count: int
    units: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.split if self.count == 1 else f"{self.split}-{self.number:05}-of-{self.count:05}"


def group(job: Job, task: int, folder: Path, context: Context) -> None:
    """The only task: all shards of all splits, in order. An empty split is a shard of no units."""
    found: list[Group] = []
    for split in splits.names_of(job.config):
        sizes = {}
        for unit in range(job.units):
            counts = tokens.report_of(job, unit)["splits"].get(split)
            if counts:
                sizes[unit] = counts["tokens"] * _token_bytes(job)
        parts = _parts(sizes, job.config.shards, job.config.shard_gb * 1e9) or [[]]
        found += [Group(split, number, len(parts), tuple(units)) for number, units in enumerate(parts)]
    (folder / "groups.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in found), encoding="utf-8")


def groups(job: Job) -> list[Group]:
    """What `group` chose."""
    with open(job.place(GROUP, 0) / "groups.jsonl", encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]
    return [Group(**item | {"units": tuple(item["units"])}) for item in items]


def _token_bytes(job: Job) -> int:
    return 2 if dtype_code(tokens.tokenizer_of(job).vocab_size) == 8 else 4


def _parts(sizes: dict[int, int], shards: str, limit: float) -> list[list[int]]:
    """The units, in order, in parts of at most about ``limit`` bytes of ``sizes``, all in one, or each for itself."""
    if shards == "one" or (shards == "auto" and sum(sizes.values()) <= limit):
        return [list(sizes)] if sizes else []
    parts: list[list[int]] = []
    filled = limit
    for unit, size in sizes.items():
        if shards == "many" or filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += size
    return parts


def merge(job: Job, task: int, folder: Path, context: Context) -> None:
    """Task ``task`` makes shard ``task`` of `groups`."""
    mine = groups(job)[task]
    reports = [tokens.report_of(job, unit)["splits"][mine.split] for unit in mine.units]
    total: dict[str, Any] = {name: sum(report[name] for report in reports) for name in ("documents", "tokens", "bytes")}
    if len(mine.units) == 1:
        total |= {f"{end}_sha256": reports[0][f"{end}_sha256"] for end in ("bin", "idx")}
    else:
        if mine.units:
            concatenate([_pair(job, unit, mine.split) for unit in mine.units], folder / mine.name)
        else:
            IndexedDatasetWriter(folder / mine.name, tokens.tokenizer_of(job).vocab_size).close()
        total |= {f"{end}_sha256": disk.sha256(folder / f"{mine.name}.{end}") for end in ("bin", "idx")}
    (folder / "report.json").write_text(json.dumps(total), encoding="utf-8")


def report_of(job: Job, group: int) -> dict[str, Any]:
    """documents, tokens, bytes (of text), bin_sha256 and idx_sha256 of a shard."""
    return job.read_json(MERGE, group, "report.json")


def joined(job: Job, task: int) -> list[Path]:
    """The pairs, without suffix, that are in the shard of this task and are published nowhere else."""
    mine = groups(job)[task]
    return [_pair(job, unit, mine.split) for unit in mine.units] if len(mine.units) > 1 else []


def _pair(job: Job, unit: int, split: str) -> Path:
    return job.place(tokens.TOKENIZE, unit) / split


def pair_of(job: Job, task: int, group: Group) -> Path:
    """Where the shard lies before it is published, without suffix."""
    if len(group.units) == 1:
        return _pair(job, group.units[0], group.split)
    return job.place(MERGE, task) / group.name
