"""Worker processes that do the tasks of a step. Fresh interpreters, not forks: a fork would copy locks of threads.

Started as programs of their own, because the way of `multiprocessing` runs the user's script a second time in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from engine.data.preparing.job import Job
from engine.data.preparing.steps import Step
from engine.errors import Interrupted, UserError


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    task: int | None = None
    heard: bytes = b""

    def ask(self, step: Step, task: int, threads: int) -> None:
        assert self.process.stdin is not None
        self.task = task
        request = json.dumps({"step": step.name, "task": task, "threads": threads}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it died; its output, at an end too, says so
            os.write(self.process.stdin.fileno(), request)


class Pool:
    """``count`` worker processes on ``job``, started when first needed; a context manager that ends them."""

    def __init__(self, job: Job, count: int):
        self.job, self.count = job, count
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self, step: Step, tasks: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Do ``tasks``. ``progress(bytes, tasks)`` is told of each bit that is done.

        Raises what a task raised (UserError, OSError), or Interrupted, and leaves the other workers to be ended.
        """
        waiting = deque(tasks)
        threads = max(1, self.count // max(1, len(tasks)))
        while len(self._workers) < min(self.count, len(tasks)):
            self._start()
        for worker in self._workers:
            if waiting:
                worker.ask(step, waiting.popleft(), threads)
        while any(worker.task is not None for worker in self._workers):
            for key, _ in self._selector.select():
                worker = key.data
                if self._hear(worker, step, progress) and waiting:
                    worker.ask(step, waiting.popleft(), threads)

    def _start(self) -> None:
        paths = [path for path in sys.path if path]
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        process = subprocess.Popen(
            # -P: a folder of sources may hold a queue.py, and that is not ours.
            [sys.executable, "-P", "-m", "engine.data.preparing.worker", str(self.job.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, process_group=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (one if self.count > 1 else {}),
        )  # fmt: skip
        worker = _Worker(process)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

    def _hear(self, worker: _Worker, step: Step, progress: Callable[[int, int], None]) -> bool:
        """Takes in what a worker says. True when it has done its task."""
        assert worker.process.stdout is not None
        heard = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not heard:
            raise self._died(worker, step)
        *lines, worker.heard = (worker.heard + heard).split(b"\n")
        for answer in map(json.loads, lines):
            if "bytes" in answer:
                progress(answer["bytes"], 0)
                continue
            task, worker.task = worker.task, None
            if "user_error" in answer:
                raise (Interrupted if answer["interrupted"] else UserError)(answer["user_error"])
            if "os_error" in answer:
                raise OSError(*answer["os_error"])
            if "bug" in answer:
                raise RuntimeError(f"{step.name} {task} failed in a worker process:\n{answer['bug']}")
            progress(0, 1)
        return worker.task is None

    def _died(self, worker: _Worker, step: Step) -> Interrupted:
        code = worker.process.wait()
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory is short"
        doing = "between tasks" if worker.task is None else f"in {step.name} {worker.task}"
        return Interrupted(
            f"a worker process died {doing} ({how})", where=str(self.job.folder),
            fix="Start it again: it goes on where it stopped. Less memory is needed with fewer --workers.",
        )  # fmt: skip

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._selector.close()
        for worker in self._workers:
            if kind is not None:
                worker.process.kill()
            for pipe in (worker.process.stdin, worker.process.stdout):
                if pipe is not None:
                    pipe.close()  # the end of its input ends a worker
        for worker in self._workers:
            worker.process.wait()
