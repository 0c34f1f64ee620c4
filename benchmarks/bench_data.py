"""The data path beside what users have today: every job's sides in turn, in processes of their own under one parent.

A job is a module of benchmarks/data: ``make(folder, size)`` writes its input once; ``SIDES`` are functions
(folder, size) -> work, of which only ``work()`` is timed; ``compare(engine, other)`` says what is wrong with the
results; ``BAR`` is how many times as fast the engine must be. A ratio is the median of the rounds' own ratios. A row
fails when the results differ. ``--curve`` goes through a job's ``CURVE`` of sizes, each side up to its ``LARGEST``.

Memory is private memory of the process tree above that before the work: pages of mapped files are not in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmarks.data
from benchmarks.harness import ROOT, Row, median_ratio

NOT_JOBS = {"worker", "plot", "memory"}
_LIMIT = 1800.0  # seconds of one side, then it is stuck


def jobs() -> list[str]:
    """Names of the modules of benchmarks/data that are jobs."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.data.__path__)]
    return sorted(name for name in names if name not in NOT_JOBS and not name.startswith("_"))


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--jobs", default="all", help=f"some of {','.join(jobs())}")
    parser.add_argument("--sides", help="only these sides, by comma (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, help="instead of each job's own size")
    parser.add_argument("--sizes", help="a curve: several sizes, by comma, one round each")
    parser.add_argument("--curve", action="store_true", help="a curve at the sizes that each job names")
    parser.add_argument("--work", type=Path, help="where inputs are made (a temporary folder, removed afterwards)")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each side of each job and size."""
    names = jobs() if options.jobs == "all" else options.jobs.split(",")
    for name in names:
        module = importlib.import_module(f"benchmarks.data.{name}")
        sizes = [options.size or module.SIZE]
        if options.curve:
            sizes = list(getattr(module, "CURVE", ()))
        elif options.sizes:
            sizes = [int(size) for size in options.sizes.split(",")]
        for size in sizes:
            folder = Path(tempfile.mkdtemp(prefix=f"bench_{name}_", dir=options.work))
            try:
                yield from _job(name, module, folder, size, options)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _job(name: str, module: ModuleType, folder: Path, size: int, options: argparse.Namespace) -> Iterator[Row]:
    module.make(folder, size)
    wanted = options.sides.split(",") if options.sides else list(module.SIDES)
    # A side that cannot be had at every size (days in Python, or out of memory) says up to where it is measured.
    limits = getattr(module, "LARGEST", {})
    curve = options.curve or options.sizes
    sides = [side for side in module.SIDES if side in wanted and (not curve or size <= limits.get(side, size))]
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(1 if curve else options.rounds):
        for side in sides:
            rounds[side].append(measure(name, side, folder, size))
    first = sides[0]
    for side in sides:
        yield _row(name, module, size, side, rounds[side], rounds[first])


def measure(name: str, side: str, folder: Path, size: int) -> dict[str, Any]:
    """One run of one side in a new process; {"seconds", "memory_mb", "found"} or {"error"}."""
    command = [sys.executable, "-m", "benchmarks.data.worker", name, side, str(folder), str(size)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {_LIMIT:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, module: ModuleType, size: int, side: str, own: list[dict], engine: list[dict]) -> Row:
    title = f"{name} {size:,} {module.UNIT}: {side}"
    if errors := [one["error"] for one in own if "error" in one]:
        return Row(title, {"seconds": None}, failed=errors[0] if own is engine else "", compare=None)
    seconds = statistics.median(one["seconds"] for one in own)
    found = own[-1]["found"]
    amount = found.get("amount", size)  # what a job counts by: bytes read, tokens given
    values: dict[str, float | int | str | None] = {
        "seconds": seconds, f"M {getattr(module, 'RATE', module.UNIT)}/s": amount / seconds / 1e6,
        "memory MB": statistics.median(one["memory_mb"] for one in own),
    }  # fmt: skip
    failed = ""
    if own is not engine and not any("error" in one for one in engine):
        values["engine is x"] = median_ratio([one["seconds"] for one in own], [one["seconds"] for one in engine])
        values["bar"] = module.BAR if side == list(module.SIDES)[1] else None
        failed = module.compare(engine[-1]["found"], found)
    return Row(title, values | found.get("columns", {}),
               compare="seconds", higher_is_better=False, failed=failed)
