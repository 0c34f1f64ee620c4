"""Background reading: daemon threads that take jobs from a queue; a job's error comes out where its result is asked."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_Job = tuple[Future, Callable[[], Any]]


class ReaderPool:
    """``num_workers`` daemon threads. ThreadPoolExecutor is not used: it keeps the interpreter from exiting."""

    def __init__(self, num_workers: int):
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"mainspring-reader-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()
        # The threads know the queue, not the pool: a pool that is forgotten without close() ends its threads too.
        self._stop = weakref.finalize(self, _stop, self._jobs, num_workers)

    def submit(self, job: Callable[[], Any]) -> Future:
        """Runs ``job()`` in a thread; with none, when the result is asked for."""
        future: Future = Future() if self._threads else _Lazy(job)
        if self._threads:
            self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """Ends the threads after the jobs in hand; waits for them."""
        self._stop()
        for thread in self._threads:
            thread.join()
        self._threads = []


class _Lazy(Future):
    def __init__(self, job: Callable[[], Any]):
        super().__init__()
        self._job = job

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result(self._job())
        return super().result(timeout)


def _stop(jobs: queue.SimpleQueue[_Job | None], num_workers: int) -> None:
    for _ in range(num_workers):
        jobs.put(None)


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while True:
        item = jobs.get()
        if item is None:
            return
        future, job = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # handed to the caller, who raises it
                future.set_exception(error)
        del item, future, job  # else an idle thread keeps the last batch alive
