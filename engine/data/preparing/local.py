"""The executor of this machine: all steps, in this process where the work is small, else in several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.data.preparing.context import Context
from engine.data.preparing.job import Job
from engine.data.preparing.pool import Pool
from engine.data.preparing.steps import STEPS, Step
from engine.errors import Interrupted

# A worker is up in half a second, in which one process reads and tokenizes a few tens of MB.
_SMALL = 32_000_000


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(job: Job) -> int:
    """Processes: as many as asked for, or one a core where there is something to do for them."""
    return job.config.workers or (1 if job.size < _SMALL else available_cores())


def run(job: Job, *, finished: Callable[[str], None], progress: Callable[[str], None]) -> None:
    """All steps that are not done. ``finished(step name)`` after each, ``progress(line)`` many times."""
    workers = workers_for(job)
    with Pool(job, workers) as pool:
        for step in STEPS:
            tasks = step.open_tasks(job)
            meter = Meter(step, job, len(tasks), progress)
            if workers > 1 and len(tasks) > 1:
                pool.run(step, tasks, meter.add)
            else:
                threads = job.config.workers or available_cores()
                for task in tasks:
                    _run_here(step, job, task, Context(threads, lambda size, meter=meter: meter.add(size, 0)))
                    meter.add(0, 1)
            finished(step.name)


def _run_here(step: Step, job: Job, task: int, context: Context) -> None:
    try:
        step.run(job, task, context)
    except MemoryError:
        fix = "Start it again with more, or with a lower --unit_mb or --max_line_mb."
        raise Interrupted(f"out of memory in {step.name} {task}", where=str(job.folder), fix=fix) from None


@dataclass
class Meter:
    """How far a step is: bytes or tasks done, MB/s, time left."""

    step: Step
    job: Job
    tasks: int
    say: Callable[[str], None]
    _bytes: int = 0
    _tasks: int = 0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        whole = self.step.tasks(self.job)
        # Tasks of one step are about the same size, so this is a fair guess where some were done before.
        self._total = int(self.step.size(self.job) * self.tasks / max(whole, 1)) if self.step.size else 0

    def add(self, size: int, tasks: int) -> None:
        """``size`` further bytes and ``tasks`` further tasks are done."""
        self._bytes += size
        self._tasks += tasks
        self.say(self.line(time.monotonic() - self._started))

    def line(self, seconds: float) -> str:
        """``read: 120 of 1,000 MB, 60 MB/s, 0:15 left``; of a step that reports no bytes its tasks."""
        if not self._total:
            return f"{self.step.name}: {self._tasks:,} of {self.tasks:,}"
        done = min(self._bytes, self._total)
        left = seconds * (self._total - done) / max(done, 1)
        return (f"{self.step.name}: {done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, "
                f"{done / 1e6 / max(seconds, 1e-9):,.0f} MB/s, {_clock(left)} left")  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
