"""A job: the folder that `prepare` works in, with the plan that says what there is to do.

    plan.json              configuration, settings of the manifest, counts, and the identity of all of it
    units.jsonl, units.at  the units, a line each, and where each line starts
    STEP/00012/            what task 12 of a step left; it is there whole, or not at all

A task writes into `STEP/00012.tmp-HOST-PID` and renames it, so a kill leaves at most a folder that nobody looks at, and
two processes that do the same task leave one result, as both write the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.prepare import PrepareConfig
from engine.data import collectors
from engine.data.sources import Listing, SourceFile, show
from engine.data.units import Slice, Unit, plan_units
from engine.errors import UserError

# Raised when a step would leave other files, or other bytes in them: an older job is then begun afresh.
VERSION = 1
PLAN, UNITS, PLACES = "plan.json", "units.jsonl", "units.at"
# The files to publish lie in `output`; with the mark but without the folder, they were published.
OUTPUT, ASSEMBLED = "output", "assembled"


# [size, mtime_ns] of a regular file, the hash that a collector calls itself by, None for what is gone
Identity = list[int] | str | None


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and its raw size (bytes), with the identity of each slice's file when the plan was made."""

    unit: Unit
    size: int
    files: tuple[Identity, ...]

    def as_json(self) -> dict[str, Any]:
        return {"unit": self.unit.to_json(), "size": self.size, "files": self.files}


class Job:
    """A planned job in ``folder``; UserError where there is none. Cheap to open, and the same from any process."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        path = self.folder / PLAN
        try:
            plan = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError("no job of `mainspring prepare`", where=show(path), fix="Start it anew.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read ({error})", where=show(path), fix="Remove its folder.") from None
        self.config = PrepareConfig.model_validate(plan["config"])
        self.settings: dict[str, Any] = plan["settings"]
        self.units: int = plan["units"]  # how many there are
        self.size: int = plan["size"]  # raw bytes of all of them
        self.links_skipped: int = plan["links_skipped"]
        self.unreadable: list[tuple[str, str]] = [(path, reason) for path, reason in plan["unreadable"]]
        self.folder_of_command = Path(plan["cwd"])  # what relative paths in the configuration start from
        self.memory: dict[str, Any] = {}  # what a process loads once: the tokenizer

    @cached_property
    def _places(self) -> np.ndarray:
        return np.memmap(self.folder / PLACES, "<u8", "r")

    def unit(self, number: int) -> PlannedUnit:
        """Unit ``number``, read from the plan."""
        with open(self.folder / UNITS, "rb") as stream:
            stream.seek(int(self._places[number]))
            item = json.loads(stream.readline())
        return PlannedUnit(Unit.from_json(item["unit"]), item["size"], tuple(item["files"]))

    def place(self, step: str, task: int) -> Path:
        """Where ``task`` of ``step`` leaves its result."""
        return self.folder / step / f"{task:05}"

    def places(self, step: str) -> list[Path]:
        """Of all tasks of a complete step, in order; none where it had no tasks."""
        if not (self.folder / step).is_dir():
            return []
        numbers = sorted(int(path.name) for path in (self.folder / step).iterdir() if path.name.isdigit())
        return [self.place(step, number) for number in numbers]

    def done(self, step: str, task: int) -> bool:
        return self.place(step, task).is_dir()

    @contextlib.contextmanager
    def result(self, step: str, task: int) -> Iterator[Path]:
        """An empty folder that becomes ``place(step, task)`` at the end, unless an exception leaves the block."""
        place = self.place(step, task)
        folder = place.with_name(f"{place.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            os.rename(folder, place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(folder)  # another process was first

    def read_json(self, step: str, task: int, name: str) -> Any:
        return json.loads((self.place(step, task) / name).read_bytes())

    @contextlib.contextmanager
    def in_its_folder(self) -> Iterator[None]:
        """Relative paths mean what they meant to the command, wherever an executor runs the task."""
        if Path.cwd() == self.folder_of_command:
            yield
        else:
            with contextlib.chdir(self.folder_of_command):
                yield


def begin(folder: Path, config: PrepareConfig, settings: dict[str, Any], listing: Listing) -> tuple[Job, bool]:
    """The job for ``config`` in ``folder``: the one that is there (True), if it is the same, else a new one (False).

    The same are: the settings, the inputs as they were given, and size and modification time of every file.
    """
    units = folder / f"{UNITS}.new"
    identity = hashlib.sha256(json.dumps([VERSION, settings, _given(config)], sort_keys=True).encode())
    places, size = [], 0
    with open(units, "wb") as stream:
        for unit in plan_units(listing, config):
            planned = _planned(unit)
            line = json.dumps(planned.as_json()).encode() + b"\n"
            identity.update(line)
            places.append(stream.tell())
            stream.write(line)
            size += planned.size
    plan = {
        "identity": identity.hexdigest(), "host": socket.gethostname(), "boot": _boot(), "settings": settings,
        "config": config.model_dump(mode="json"), "cwd": os.getcwd(), "units": len(places), "size": size,
        "links_skipped": listing.links_skipped, "unreadable": listing.unreadable,
    }  # fmt: skip
    goes_on = _same(folder, plan)
    if goes_on:
        units.unlink()
        _drop_halves(folder)
    else:
        _clear(folder, keep=units)
        np.array(places, "<u8").tofile(folder / PLACES)
        os.replace(units, folder / UNITS)
    # Of the same job too: it may go on with fewer workers.
    (folder / f"{PLAN}.new").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / f"{PLAN}.new", folder / PLAN)
    return Job(folder), goes_on


def _drop_halves(folder: Path) -> None:
    """What a killed process of this machine left unfinished; other machines may be at work on theirs."""
    for path in folder.glob(f"*/*.tmp-{socket.gethostname()}-*"):
        pid = path.name.rpartition("-")[2]
        if not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def _given(config: PrepareConfig) -> list[str]:
    return [os.path.abspath(path) for path in config.input] + [show(path) for path in config.input]


def _planned(unit: Unit) -> PlannedUnit:
    files = [identity_of(piece.file) for piece in unit.slices]
    return PlannedUnit(unit, sum(map(_size, unit.slices, files)), tuple(files))


def _size(piece: Slice, identity: Identity) -> int:
    """Raw bytes, as the reader will count them."""
    if not isinstance(identity, list):
        return 0
    if piece.file.kind == "jsonl" and piece.end is not None:
        return piece.end - piece.start
    return 0 if piece.start else identity[0]


def identity_of(file: SourceFile) -> Identity:
    """What tells the file from a later one of its name, without reading it."""
    if file.kind == "collector":
        return collectors.load(file.path).identity()
    try:
        found = file.path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else None


def _same(folder: Path, plan: dict[str, Any]) -> bool:
    try:
        old = json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return False
    # A crash of the machine can lose what was renamed but not yet on its disk; a network file system has it.
    crashed = old.get("host") == plan["host"] and old.get("boot") != plan["boot"]
    published = (folder / ASSEMBLED).exists() and not (folder / OUTPUT).is_dir()
    return old.get("identity") == plan["identity"] and not crashed and not published


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _clear(folder: Path, keep: Path) -> None:
    (folder / PLAN).unlink(missing_ok=True)  # first: without it the rest is nothing
    for entry in folder.iterdir():
        if entry != keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
