"""The loss curve of a run as a picture: training, validation, and the baselines it has to be below."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e6e8eb"
TRAIN, VALIDATION = "#2f6fb7", "#c8501e"
SMOOTHING = 0.04  # the smoothed curve's window, as a share of the logged rows
LABEL_HEIGHT = 0.052  # of the axes: the least distance between two labels

Floats = NDArray[np.float64]
Points = tuple[Floats, Floats]


def plot_loss(metrics_jsonl: Path | str, png: Path | str, *, baselines: Mapping[str, float] | None = None,
              title: str | None = None) -> None:
    """Draws a run's training and validation loss (nats per token) with horizontal baselines, and writes a PNG.

    The x axis counts tokens where every row with a training loss has ``train/consumed_tokens``, else steps. Rows
    whose loss is not finite are left out. Raises UserError when there is no such file or no finite training loss.
    """
    rows = _read(Path(metrics_jsonl))
    train, validation = _points(rows, "train/loss"), _points(rows, "val/loss")
    if not len(train[0]):
        raise UserError("no row has a finite train/loss, so there is nothing to draw", where=str(metrics_jsonl),
                        fix="Train for at least one logging step")
    unit, tokens_of = _x_axis(rows)
    figure = _draw((tokens_of(train[0]), train[1]), (tokens_of(validation[0]), validation[1]), dict(baselines or {}),
                   title=title, unit=unit)
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    temporary = png.with_name(f".{png.name}.tmp")
    figure.savefig(temporary, format="png", facecolor="white")
    os.replace(temporary, png)


# --- reading ---------------------------------------------------------------------------------------------------------

def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl (engine.train.metrics describes it) that are whole: a kill may cut a line."""
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="Give the metrics.jsonl of a run")
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _points(rows: list[dict[str, Any]], name: str) -> Points:
    """(steps, values) of the rows that have a finite ``name``; non-finite ones are strings such as "NaN"."""
    pairs = [(row["step"], float(row[name])) for row in rows if name in row]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)


def _x_axis(rows: list[dict[str, Any]]):
    """The axis's unit and the function from steps to it. Rows with validation only get their step's tokens."""
    training = [row for row in rows if "train/loss" in row]
    if not all("train/consumed_tokens" in row for row in training):
        return "steps", lambda steps: steps
    known = [(0, 0), *((row["step"], row["train/consumed_tokens"]) for row in training)]
    steps_known, tokens_known = np.array(known, float).T
    return "tokens", lambda steps: np.interp(steps, steps_known, tokens_known)


def smooth(values: Floats) -> Floats:
    """Moving average whose window grows from nothing over the first rows, where a symmetric one would bend the steep
    fall, and is cut off by the last row, so that the last value averages half a window and not one noisy row."""
    index, count = np.arange(len(values)), len(values)
    half = np.minimum(max(1, round(count * SMOOTHING / 2)), index // 4)
    first, last = index - half, np.minimum(index + half, count - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last + 1] - total[first]) / (last + 1 - first)


# --- drawing ---------------------------------------------------------------------------------------------------------

def _draw(train: Points, validation: Points, baselines: dict[str, float], *, title: str | None, unit: str):
    # Figure and Agg directly: no pyplot, so no window, no global state, and half the import time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(8.4, 4.8), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.115, 0.745, 0.775 if title else 0.84))
    axes.set_xlim(0, train[0].max() * 1.005)
    axes.set_ylim(*_y_range(train[1], validation[1], baselines))

    labels: list[tuple[float, str, str]] = []
    for name, value in baselines.items():
        axes.axhline(value, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
        labels.append((value, f"{name} {value:.2f}", MUTED))
    smoothed = smooth(train[1])
    enough = len(train[0]) >= 20
    axes.plot(*train, color=TRAIN, linewidth=0.8 if enough else 1.8, alpha=0.35 if enough else 1.0, zorder=2)
    if enough:
        axes.plot(train[0], smoothed, color=TRAIN, linewidth=1.8, zorder=3)
    labels.append((smoothed[-1], f"training {smoothed[-1]:.2f}", TRAIN))
    if len(validation[0]):
        axes.plot(*validation, color=VALIDATION, linewidth=1.2, marker="o", markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.7, zorder=4, clip_on=False)
        labels.append((validation[1][-1], f"validation {validation[1][-1]:.2f}", VALIDATION))
    _label(axes, labels)

    if title:
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(unit, fontsize=9.5, color=MUTED)
    axes.set_ylabel("loss, nats per token", fontsize=9.5, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    return figure


def _y_range(train: Floats, validation: Floats, baselines: dict[str, float]) -> tuple[float, float]:
    """Everything but lone spikes: nothing above the start, the baselines and 99% of the losses."""
    every = np.concatenate([train, validation, np.array(list(baselines.values()), float)])
    top = max(train[0], np.quantile(train, 0.99), *validation, *baselines.values())
    low = float(every.min())
    margin = 0.06 * max(top - low, 0.1)
    return max(0.0, low - margin) if low >= 0 else low - margin, float(top) + margin


def _label(axes, labels: list[tuple[float, str, str]]) -> None:
    """Names each line at its right end, in its colour, moved apart where two ends are too close to read."""
    low, high = axes.get_ylim()
    ends = sorted((min(max((value - low) / (high - low), 0.0), 1.0), text, colour) for value, text, colour in labels)
    heights = [height for height, _, _ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + LABEL_HEIGHT)
    # Half of what the topmost of a crowd was pushed up, the whole crowd comes down, so that it stays centred.
    start = 0
    for index in range(1, len(heights) + 1):
        if index == len(heights) or heights[index] > heights[index - 1] + LABEL_HEIGHT + 1e-9:
            shift = (heights[index - 1] - ends[index - 1][0]) / 2
            floor = heights[start - 1] + LABEL_HEIGHT if start else 0.0
            shift = min(shift, heights[start] - floor)
            heights[start:index] = [height - shift for height in heights[start:index]]
            start = index
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        axes.text(1.015, height, text, transform=axes.transAxes, va="center", ha="left", fontsize=9.5, color=colour)
