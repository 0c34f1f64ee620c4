"""The steps of `prepare` as datatrove blocks, for any of its executors, and its local one as `--executor datatrove`.

A block of rank r of w does the tasks r, r + w, … of its step that are not done: how many there are is known only when
the step before is complete, and datatrove wants a number at the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from engine.data.preparing.job import Job
from engine.data.preparing.steps import STEPS, step_named
from engine.errors import Interrupted


class StepBlock(PipelineStep):
    """A step of the job in ``folder``. Takes and gives no documents: they go from step to step through the folder."""

    type = "mainspring"

    def __init__(self, folder: str, step: str):
        self.name = f"prepare: {step}"
        super().__init__()
        self.folder, self.step = folder, step

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        job, step = Job(Path(self.folder)), step_named(self.step)
        for task in range(rank, step.tasks(job), world_size):
            with self.track_time("task"):
                step.run(job, task)
            self.stat_update("tasks", unit="task")
        yield from data or ()


def run(job: Job) -> None:
    """All steps by datatrove's local executor, one after the other."""
    for step in STEPS:
        tasks = min(job.config.cluster.tasks, len(step.open_tasks(job)))
        if tasks:
            # What is done is known from the job itself; datatrove's marks could be of another plan.
            LocalPipelineExecutor(
                [StepBlock(str(job.folder), step.name)], tasks=tasks, workers=min(tasks, job.config.workers or tasks),
                logging_dir=str(job.folder / "datatrove" / step.name), skip_completed=False,
            ).run()  # fmt: skip
        if step.open_tasks(job):
            raise Interrupted(f"step {step.name} is not complete", where=str(job.folder),
                              fix="Its logs say why; start it again, it goes on.")  # fmt: skip
