"""One side of one job in a process of its own: ``python -m benchmarks.data.worker JOB SIDE FOLDER SIZE``.

Prints one JSON line: seconds of the timed part, the memory it took above what the process held before it (the whole
process tree's, sampled), and what the side found.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_INTERVAL = 0.02  # seconds between two looks at the memory


def resident_bytes() -> int:
    """Private memory of this process and all below it: no pages of mapped files, since every side maps its data."""
    process, total = psutil.Process(), 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            memory = each.memory_info()
            total += memory.rss - memory.shared
    return total


class PeakMemory:
    """Highest ``resident_bytes`` while the context is open, above that at its start, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = resident_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    @property
    def above_start(self) -> int:
        return self.peak - self.start


def measure(job: str, side: str, folder: Path, size: int) -> dict[str, Any]:
    """Runs the side once; see the top of the file."""
    module = importlib.import_module(f"benchmarks.data.{job}")
    work: Callable[[], dict] = module.SIDES[side](folder, size)
    with PeakMemory() as memory:
        started = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - started
    return {"seconds": found.pop("seconds", seconds), "memory_mb": memory.above_start / 1e6, "found": found}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    result = measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(result), file=answers, flush=True)
