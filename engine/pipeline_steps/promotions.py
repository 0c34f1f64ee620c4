"""promotions.json: what every step left, what the gates said, and the hashes of what was promoted.

    {"version": 1, "title": …, "stages": {NAME: {
        "status": "running" | "promoted" | "refused" | "failed" | "interrupted" | "waiting",  "reason": …,
        "steps": {NAME: {"status": "running" | "done" | "failed", "fingerprint", "command", "config_sha256",
                         "inputs": {step: sha256}, "data": {path: sha256}, "result": {kind, path, sha256, step},
                         "started", "finished", "seconds", "attempts", "processes", "log"}},
        "gates": [{metric, value, bounds, passed, reason, …}],
        "promoted_at", "previous": sha256 of the stage before, "sha256": of this stage without its times}}}

Replaced whole, never edited in place. Each promoted stage's hash covers the one before it, so that the last one stands
for the whole chain; what was changed by hand is found at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine import disk
from engine.checkpoint.layout import write_text
from engine.errors import UserError
from engine.pipeline_steps.results import digest

NAME = "promotions.json"
VERSION = 1
_UNSTABLE = {"started", "finished", "seconds", "attempts", "log", "processes"}


def now() -> str:
    """The time of day in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Promotions:
    """The manifest of one pipeline, in memory and on disk. Raises ``UserError`` when what is there is damaged."""

    def __init__(self, folder: Path, title: str):
        self.path = folder / NAME
        self.data: dict[str, Any] = {"version": VERSION, "title": title, "stages": {}}
        if self.path.exists():
            self.data = self._read() | {"title": title}

    def _read(self) -> dict[str, Any]:
        fix = f"Restore it, or move {self.path.parent} away and start afresh"
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise UserError(f"is of version {data['version']}, this program writes {VERSION}",
                                where=str(self.path), fix=fix)
            for name, stage in data["stages"].items():
                if "sha256" in stage and stage["sha256"] != seal(stage):
                    raise UserError(f"stage {name} was changed by hand: its hash differs", where=str(self.path),
                                    fix=fix)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot be read ({error})", where=str(self.path), fix=fix) from error
        return data

    def write(self) -> None:
        """Beside its place, flushed, renamed."""
        temporary = self.path.with_name(NAME + ".tmp")
        try:
            write_text(temporary, json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
            os.replace(temporary, self.path)
            disk.sync(self.path.parent)
        except OSError as error:
            raise UserError(error.strerror or str(error), where=str(self.path),
                            fix="Free some space there, or mend the permissions; run again to go on") from error

    def stage(self, name: str) -> dict[str, Any]:
        """The entry of a stage, made where there is none."""
        return self.data["stages"].setdefault(name, {"status": "running", "steps": {}, "gates": []})

    def step(self, stage: str, name: str) -> dict[str, Any] | None:
        """What is known of a step: under its stage, or the one that it belonged to before it was moved."""
        entries = [self.data["stages"].get(stage, {}), *self.data["stages"].values()]
        return next((entry["steps"][name] for entry in entries if name in entry.get("steps", {})), None)

    def withdraw(self, names: list[str], previous: str | None) -> bool:
        """Takes back the promotions of ``names``, stages in order, unless they follow on ``previous``. -> any?"""
        found = [name for name in names if "sha256" in self.data["stages"].get(name, {})]
        if not found or self.data["stages"][found[0]]["previous"] == previous:
            return False
        for name in found:
            self.reopen(name)["status"] = "waiting"
        return True

    def reopen(self, name: str) -> dict[str, Any]:
        """A stage that is about to be looked at again: no longer promoted until its gates have spoken."""
        entry = self.stage(name)
        for key in ("sha256", "previous", "promoted_at", "reason"):
            entry.pop(key, None)
        entry |= {"status": "running", "gates": []}
        return entry

    def promote(self, name: str, previous: str | None) -> str:
        """Seals a stage whose gates were passed. -> its hash."""
        entry = self.stage(name)
        entry |= {"status": "promoted", "promoted_at": now(), "previous": previous}
        entry["sha256"] = seal(entry)
        return entry["sha256"]


def seal(stage: dict[str, Any]) -> str:
    """The hash of what a stage promises: results, what they were made of, gate values; no times."""
    steps = {name: {key: value for key, value in step.items() if key not in _UNSTABLE}
             for name, step in stage["steps"].items()}
    return digest({"steps": steps, "gates": stage["gates"], "previous": stage.get("previous")})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One pipeline at a time in a folder. The lock goes with the process, however it ends. Raises ``UserError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(folder), fix="Choose another --output_dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another pipeline is running in this folder", where=str(folder),
                            fix="Wait for it, or choose another --output_dir") from None
        yield
