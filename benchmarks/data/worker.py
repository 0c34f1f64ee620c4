"""One side of one job in a process of its own: ``python -m benchmarks.data.worker JOB SIDE FOLDER SIZE``.

Prints one JSON line: seconds of the timed part, the memory it took above what the process held before it (the whole
process tree's, sampled), and what the side found.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A process of its own: builders that hold the GIL would stop a thread. Reads until its stdin is closed.
_SAMPLER = """
import contextlib, os, select, sys
import psutil
def resident():
    process, total = psutil.Process(int(sys.argv[1])), 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            if each.pid != os.getpid():
                memory = each.memory_info()
                total += memory.rss - memory.shared
    return total
peak = start = resident()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    peak = max(peak, resident())
print(max(peak, resident()) - start)
"""


class PeakMemory:
    """``above_start``: the highest private memory (bytes) of this process and all below it while the context was open,
    above that at its start. Pages of mapped files are not in it, since every side maps its data."""

    above_start = 0

    def __enter__(self) -> PeakMemory:
        self._sampler = subprocess.Popen([sys.executable, "-c", _SAMPLER, str(os.getpid())], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self.above_start = int(self._sampler.communicate()[0])


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
