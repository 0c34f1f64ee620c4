"""What a person sees of a run: a progress bar on a terminal, one plain line a logged row in a log. Both on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

BAR_REFRESH_SECONDS = 0.2

# In the order shown. A row shows those it has.
FIELDS: dict[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {value:.4f}",
    "val/loss": lambda value: f"val {value:.4f}",
    "train/lr": lambda value: f"lr {value:.2e}",
    "train/grad_norm": lambda value: f"grad {value:.3g}",
    "train/tokens_per_sec": lambda value: f"{compact(value)} tok/s",
    "train/mfu": lambda value: f"MFU {value:.1%}",
    "train/memory_gb": lambda value: f"{value:.2f} GB",
}
# What fits beside the bar in 80 columns.
ESSENTIAL = ("train/loss", "val/loss", "train/tokens_per_sec")


class Console:
    """Prints rows and messages. ``progress``: auto (a bar where stderr is a terminal), on, off."""

    def __init__(self, *, total_steps: int, start_step: int, progress: str):
        self._total = total_steps
        self._clock = _TimeLeft(total_steps, start_step)
        self._bar = None
        if progress == "on" or (progress == "auto" and sys.stderr.isatty()):
            self._bar = _Bar(total_steps, start_step)

    def row(self, step: int, row: Mapping[str, float]) -> None:
        left = self._clock.left(step)
        if self._bar is not None:
            self._bar.row(step, row, left)
        if self._bar is None or "val/loss" in row:  # evaluations stay on the screen above the bar
            shown = [show(row[name]) for name, show in FIELDS.items() if name in row]
            width = len(str(self._total))
            end = [] if left is None else [f"{duration(left)} left"]
            self.message(f"step {step:>{width}}/{self._total} | " + " | ".join(shown + end))

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.advance(step)

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """A rich progress bar, drawn only when called: rich's refresh thread would compete with the training step."""

    def __init__(self, total_steps: int, start_step: int):
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = RichConsole(stderr=True)
        self._names = FIELDS if console.width >= 130 else ESSENTIAL
        self._latest: dict[str, float] = {}
        columns = (BarColumn(bar_width=24 if console.width >= 100 else 12), MofNCompleteColumn(),
                   TextColumn("{task.fields[shown]}", markup=False))
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task: Any = self._progress.add_task("train", total=total_steps, completed=start_step, shown="")
        self._drawn = 0.0
        self._progress.start()

    def row(self, step: int, row: Mapping[str, float], left: float | None) -> None:
        self._latest.update(row)  # the last validation loss stays in view
        shown = [FIELDS[name](self._latest[name]) for name in self._names if name in self._latest]
        shown += [] if left is None else [f"{duration(left)} left"]
        self._progress.update(self._task, shown=" · ".join(shown))
        self.advance(step)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        now = time.monotonic()
        if now - self._drawn > BAR_REFRESH_SECONDS:
            self._drawn = now
            self._progress.refresh()

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()


class _TimeLeft:
    """The time to the last step at the pace of the last rows; a slow first step is soon forgotten."""

    def __init__(self, total_steps: int, start_step: int):
        self._total = total_steps
        self._seen = deque([(start_step, time.monotonic())], maxlen=20)

    def left(self, step: int) -> float | None:
        """Seconds, or None before the first step."""
        now = time.monotonic()
        first_step, first_time = self._seen[0]
        if step > self._seen[-1][0]:
            self._seen.append((step, now))
        if step <= first_step:
            return None
        return max(0, self._total - step) * (now - first_time) / (step - first_step)


def compact(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if 0.9995 * size <= abs(value) < float("inf"):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 3d04h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
