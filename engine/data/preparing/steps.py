"""The steps of `prepare`, in order, for any executor.

    job = Job(folder)                       # planned by `engine.data.prepare`
    for step in STEPS:                      # each starts when the one before has done all its tasks
        for task in range(step.tasks(job)):
            step.run(job, task)             # in any process, in any order, at once

A task that is done is passed over, so all of it can be run again after any failure. The result does not depend on
where, in which order or how often tasks ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.data.preparing import count, duplicates, finish, merge, read, tokens
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job


def _one(job: Job) -> int:
    return 1


def _nothing(job: Job, task: int) -> None:
    """No input of a task that nobody reads again."""


@dataclass(frozen=True)
class Step:
    """``tasks(job)`` may only be asked once the step before is complete. ``size(job)``: bytes that its tasks report to
    their context in all, None where they report none. ``spent`` removes what only this task had to read."""

    name: str
    tasks: Callable[[Job], int]
    work: Callable[[Job, int, Path, Context], None]
    size: Callable[[Job], int] | None = None
    spent: Callable[[Job, int], None] = _nothing

    def run(self, job: Job, task: int, context: Context | None = None) -> None:
        """Do a task, unless it is done. UserError, OSError: what the user can mend."""
        if job.done(self.name, task):
            return
        try:
            with job.in_its_folder(), job.result(self.name, task) as folder:
                self.work(job, task, folder, context or Context())
        except FileNotFoundError:
            if not job.done(self.name, task):  # else another process was faster, and has spent the input
                raise
        self.spent(job, task)

    def open_tasks(self, job: Job) -> list[int]:
        """Numbers of the tasks that are still to be done, in order."""
        return [task for task in range(self.tasks(job)) if not job.done(self.name, task)]


def _units(job: Job) -> int:
    return job.units


def _drop_text(job: Job, task: int) -> None:
    (job.place(read.NAME, task) / "text").unlink(missing_ok=True)


def _drop_joined(job: Job, task: int) -> None:
    for pair in merge.joined(job, task):
        for end in ("bin", "idx"):
            Path(f"{pair}.{end}").unlink(missing_ok=True)


STEPS: tuple[Step, ...] = (
    Step(read.NAME, _units, read.work, size=lambda job: job.size),
    Step(duplicates.EXACT, duplicates.exact_tasks, duplicates.exact),
    Step(duplicates.SIGN, duplicates.sign_tasks, duplicates.sign, size=lambda job: job.size),
    Step(duplicates.NEAR, duplicates.near_tasks, duplicates.near),
    Step(duplicates.CLUSTER, duplicates.cluster_tasks, duplicates.cluster),
    Step(count.COUNT, _units, count.count),
    Step(count.CHOOSE, _one, count.choose),
    Step(tokens.TOKENIZER, _one, tokens.tokenizer),
    Step(tokens.TOKENIZE, _units, tokens.tokenize, size=lambda job: count.choice_of(job)["bytes"], spent=_drop_text),
    Step(merge.GROUP, _one, merge.group),
    Step(merge.MERGE, lambda job: len(merge.groups(job)), merge.merge, spent=_drop_joined),
    Step(finish.NAME, _one, finish.work),
)


def step_named(name: str) -> Step:
    return next(step for step in STEPS if step.name == name)
