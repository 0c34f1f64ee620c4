"""What every benchmark suite shares: rows, the machine and versions they were measured on, tables, comparison.

A suite is a module ``benchmarks/bench_<name>.py`` with ``run(options)``, which returns or yields rows, and, if it has
options of its own, ``add_options(parser)``. ``benchmarks/run.py`` finds it by name; ``options.threads`` (None: all
cores) is its own.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "megatron-core", "triton", "numpy", "liger-kernel", "quack-kernels",
            "transformer-engine", "flash-attn", "trl")


@dataclasses.dataclass
class Row:
    """One measurement. ``name`` identifies it between runs; ``values`` are the table's columns, in order.

    ``compare``: the column that is compared with an earlier result; None leaves the row out of the comparison.
    ``failed``: what went wrong on our side; such a row makes the run's exit code 1.
    """

    name: str
    values: dict[str, float | int | str | None]
    compare: str | None = None
    higher_is_better: bool = True
    failed: str = ""


# --- where it was measured -------------------------------------------------------------------------------------------

def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory, and the GPUs that nvidia-smi sees."""
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else
            os.cpu_count(), "memory_gb": round(_memory_bytes() / 1e9, 1), "gpu": _gpus(), "system": platform.platform()}


def versions() -> dict[str, Any]:
    """Python, the packages a result depends on (None: not installed), the commit, and whether it had changes."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain")
    found["dirty"] = None if changes is None else bool(changes)
    return found


@functools.lru_cache
def _machine_now() -> dict[str, Any]:
    return machine()


@functools.lru_cache
def _versions_now() -> dict[str, Any]:
    return versions()


def _cpu_model() -> str:
    """The model's name, and its family and model number: clouds shorten "AMD EPYC 9B45" to "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> list[str]:
    found = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return [line.strip() for line in found.splitlines()] if found else []


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no GPU: the result says so


# --- results ---------------------------------------------------------------------------------------------------------

def result(rows_of: Mapping[str, Sequence[Row]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain JSON: {"machine", "versions", "time", "options", "suites": {suite: [row, ...]}}."""
    return {"machine": _machine_now(), "versions": _versions_now(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": {name: value if isinstance(value, (int, float, str, list, type(None))) else str(value)
                        for name, value in options.items()},
            "suites": {suite: [dataclasses.asdict(row) for row in rows] for suite, rows in rows_of.items()}}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """In one piece: who stops a run finds the result before this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    unfinished.replace(path)


def table(rows: Sequence[Row]) -> str:
    """The rows as text: names to the left, numbers to the right, a dash where a row has no such column."""
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    cells = [["", *columns], *([row.name, *(cell(row.values.get(column)) for column in columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def cell(value: float | int | str | None) -> str:
    """A value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


# --- comparison ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Comparison:
    """``ratio`` above 1 is better than before, whatever the column."""

    suite: str
    name: str
    column: str
    before: float
    now: float
    ratio: float
    regressed: bool


def compare(now: Mapping[str, Any], earlier: Mapping[str, Any], tolerance: float) -> list[Comparison]:
    """Pairs the rows of two results by suite and name. ``regressed``: worse by more than ``tolerance`` (0.05: 5%)."""
    found = []
    for suite, rows in now["suites"].items():
        before_of = {row["name"]: row["values"] for row in earlier["suites"].get(suite, [])}
        for row in rows:
            column = row["compare"]
            before, value = before_of.get(row["name"], {}).get(column), row["values"].get(column)
            if column is None or not before or not value:
                continue
            ratio = value / before if row["higher_is_better"] else before / value
            found.append(Comparison(suite, row["name"], column, before, value, ratio, ratio < 1 - tolerance))
    return found


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    return table([Row(f"{c.suite}: {c.name}", {"column": c.column, "before": c.before, "now": c.now, "ratio": c.ratio,
                                               "": "REGRESSED" if c.regressed else "ok"}) for c in comparisons])


def differences(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """What else differs between two results: a ratio between two machines is a lead, not a result."""
    lines = []
    for part in ("machine", "versions"):
        for key in dict.fromkeys([*now[part], *earlier.get(part, {})]):
            before, after = earlier.get(part, {}).get(key), now[part].get(key)
            if before != after:
                lines.append(f"{key}: {before} then, {after} now")
    return lines


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """Median of the rounds' own ratios: noise that hits a whole round cancels, a hit on one side is an outlier."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
