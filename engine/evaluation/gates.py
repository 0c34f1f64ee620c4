"""Promotion gates: a metric that a stage has left, held against its bounds.

A gate that cannot be evaluated is not passed: a metric that is missing or NaN fails as loudly as one that is too low.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.config.pipeline import Gate

_SIGNS = {"at_least": "≥", "at_most": "≤", "above": ">", "below": "<"}


@dataclass(frozen=True)
class Place:
    """Where a step's results lie, and the step of the checkpoint that is promoted (None: it left none)."""

    name: str
    folder: Path
    checkpoint_step: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a gate said. ``value`` is None where there was none; ``bounds`` as they were applied, baseline included."""

    metric: str
    step: str
    file: str
    value: float | None
    at: int | None
    bounds: dict[str, float]
    required: bool
    passed: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: what is not finite is written as text, as in metrics.jsonl."""
        finite = self.value is None or math.isfinite(self.value)
        return asdict(self) | ({} if finite else {"value": str(self.value)})


def check(gate: Gate, places: list[Place], baselines: Mapping[str, Place]) -> Outcome:
    """Holds the gate against the stage's ``places``, in order of its steps; ``baselines``: all steps by name."""
    place = _place(gate, places)
    value, at, problem = read(gate, place)
    bounds = gate.bounds()
    if problem is None and gate.relative_to is not None:
        bounds, problem = _scaled(gate, baselines[gate.relative_to])

    def outcome(passed: bool, reason: str) -> Outcome:
        return Outcome(gate.metric, place.name, gate.file, value, at, bounds, gate.required, passed, reason)

    if problem is not None:
        return outcome(not gate.required, problem if gate.required else f"{problem}; not required")
    assert value is not None
    missed = [] if math.isnan(value) else [name for name in bounds if not _holds(name, value, bounds[name])]
    asked = " and ".join(f"{_SIGNS[name]} {bounds[name]:.6g}" for name in bounds)
    if math.isnan(value):
        return outcome(False, f"{gate.metric} is not a number; asked is {asked}")
    word = "misses" if missed else "keeps"
    against = f" ({gate.relative_to}'s value times {_factors(gate)})" if gate.relative_to else ""
    return outcome(not missed, f"{gate.metric} {value:.6g} {word} {asked}{against}")


def _holds(name: str, value: float, bound: float) -> bool:
    return {"at_least": value >= bound, "at_most": value <= bound, "above": value > bound, "below": value < bound}[name]


def _factors(gate: Gate) -> str:
    return " and ".join(f"{value:g}" for value in gate.bounds().values())


def _place(gate: Gate, places: list[Place]) -> Place:
    """The named step, or the last whose folder has the file; where none has, the last of all."""
    if gate.step is not None:
        return next(place for place in places if place.name == gate.step)
    return next((place for place in reversed(places) if (place.folder / gate.file).is_file()), places[-1])


def _scaled(gate: Gate, baseline: Place) -> tuple[dict[str, float], str | None]:
    """The bounds times the same metric of ``baseline``, or why that cannot be."""
    value, _, problem = read(gate, baseline)
    if problem is not None:
        return gate.bounds(), f"{baseline.name}, which it is relative to: {problem}"
    if value is None or not math.isfinite(value) or value <= 0:  # a share of what is negative turns the bound around
        return gate.bounds(), f"{gate.metric} of {baseline.name} is {value}: nothing can be relative to it"
    return {name: factor * value for name, factor in gate.bounds().items()}, None


def read(gate: Gate, place: Place) -> tuple[float | None, int | None, str | None]:
    """-> (value, the step it was logged at, why there is none)."""
    path = place.folder / gate.file
    try:
        if path.suffix == ".jsonl":
            return _of_rows(gate, rows(path), place.checkpoint_step)
        found = _dotted(json.loads(path.read_text(encoding="utf-8")), gate.metric)
        return (None, None, f"{gate.metric} is missing in {gate.file}") if found is None else (found, None, None)
    except FileNotFoundError:
        return None, None, f"{gate.metric} is missing: {place.name} left no {gate.file}"
    except (OSError, ValueError) as error:
        return None, None, f"{gate.metric} cannot be read: {gate.file}: {error}"


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; a kill may have cut the last. Raises ``OSError``."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def series(found: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have the metric; "NaN" and "Infinity" are written as text there."""
    points = []
    for index, row in enumerate(found):
        value = number(row.get(metric))
        if value is not None:
            step = row.get("step")
            points.append((step if isinstance(step, int) else index, value))
    return points


def number(value: Any) -> float | None:
    """A number, or the text of one that JSON has no word for; anything else is None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _of_rows(gate: Gate, found: list[dict[str, Any]], checkpoint: int | None
             ) -> tuple[float | None, int | None, str | None]:
    points = series(found, gate.metric)
    if not points:
        return None, None, f"{gate.metric} is missing in {gate.file}: no row has it"
    values = [value for _, value in points]
    if any(math.isnan(value) for value in values) and gate.take in ("best", "lowest", "highest", "mean"):
        return math.nan, None, None
    if gate.take == "mean":
        return sum(values) / len(values), None, None
    if gate.take == "promoted" and checkpoint is not None:
        points = [point for point in points if point[0] <= checkpoint]
        if not points:
            return None, None, f"{gate.metric} is missing: no row up to the promoted checkpoint (step {checkpoint})"
    if gate.take in ("promoted", "last"):
        step, value = points[-1]
    else:
        highest = gate.take == "highest" or (gate.take == "best" and bool({"at_least", "above"} & set(gate.bounds())))
        step, value = (max if highest else min)(points, key=lambda point: point[1])
    return value, step, None


def _dotted(data: Any, name: str) -> float | None:
    """``held_out.loss`` in nested mappings; a key that has dots itself is found as well."""
    if isinstance(data, dict):
        if name in data:
            return number(data[name])
        for key, inner in data.items():
            if name.startswith(f"{key}."):
                found = _dotted(inner, name[len(key) + 1:])
                if found is not None:
                    return found
    return None
