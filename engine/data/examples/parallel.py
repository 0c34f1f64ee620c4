"""Rows to examples in several processes, with the results in the order of the rows.

This process reads the rows, worker processes render and tokenize them in batches, and this process takes the results
in order: what is written does not depend on how many there are. Workers are fresh interpreters, programs of their own
(engine/data/examples/worker.py), because `multiprocessing` would run the user's script a second time in each.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from engine.config.stages import Source
from engine.data.examples.store import Example, Pair
from engine.data.quarantine import Quarantine
from engine.errors import Interrupted, UserError

if TYPE_CHECKING:
    from engine.data.examples.encoding import Encoding

BATCH_ROWS = 64
# A worker is up after a second, in which this process alone tokenizes some two thousand rows.
ALONE_BATCHES = 32
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Row:
    """A row that was read, and its place."""

    place: str
    row: Any


@dataclass(frozen=True)
class Bad:
    """What `Quarantine.add` shall be told."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


Batch = list[Row | Bad]
Results = list[Example | Pair | Bad]


class _Recorder(Quarantine):
    """A quarantine that only takes down what it is told, in between the rows."""

    def __init__(self, into: list[Any]):
        self._into = into

    def add(self, *arguments: Any, **options: Any) -> None:
        self._into.append(Bad(arguments, options))


def encoded(encoding: Encoding, source: Source, quarantine: Quarantine) -> Iterator[Example | Pair]:
    """An item of every row of ``source`` that gives one; the others go to the quarantine. Raises ``UserError``."""
    batches = _batches(source)
    for batch in islice(batches, None if encoding.workers == 1 else ALONE_BATCHES):
        yield from _taken(encode_batch(encoding, batch, source.format), quarantine)
    rest = next(batches, None)
    if rest is None:
        return
    with _Pool(encoding, encoding.workers or _cores()) as pool:
        waiting = deque([pool.submit(rest, source.format)])
        for batch in batches:
            waiting.append(pool.submit(batch, source.format))
            if len(waiting) > 2 * pool.count:  # memory holds no more
                yield from _taken(waiting.popleft().result(), quarantine)
        for future in waiting:
            yield from _taken(future.result(), quarantine)


def _batches(source: Source) -> Iterator[Batch]:
    from engine.data.chat import rows

    batch: Batch = []
    count = 0
    recorder = _Recorder(batch)
    for place, row in rows.read(source, recorder):
        batch.append(Row(place, row))
        count += 1
        if count == BATCH_ROWS:
            yield batch[:]  # rows.read goes on with the recorder, which goes on with the list
            batch.clear()
            count = 0
    if batch:
        yield batch


def encode_batch(encoding: Encoding, batch: Batch, format: str) -> Results:
    """What became of each of them, in order."""
    from engine.data.chat import rows
    from engine.data.chat.conversation import BadRow

    results: Results = []
    for one in batch:
        if isinstance(one, Bad):
            results.append(one)
            continue
        try:
            results.append(encoding.encode(one.row, format))
        except BadRow as bad:
            rows.refuse(_Recorder(results), one.place, bad.reason, bad.detail, one.row)
    return results


def _taken(results: Results, quarantine: Quarantine) -> Iterator[Example | Pair]:
    for one in results:
        if isinstance(one, Bad):
            quarantine.add(*one.arguments, **one.options)
        else:
            yield one


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pool:
    """``count`` worker processes and a thread of ours for each, which waits for it."""

    def __init__(self, encoding: Encoding, count: int):
        self.count = count
        self._encoding = encoding

    def __enter__(self) -> _Pool:
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._workers: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(self.count)
        paths = os.pathsep.join(path for path in sys.path if path)
        one = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        for _ in range(self.count):
            worker = subprocess.Popen(
                command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,
                env=os.environ | {"PYTHONPATH": paths} | one,
            )  # fmt: skip
            self._workers.append(worker)
            self._idle.put(worker)
        self._made_of = pickle.dumps((*self._encoding.made_of, self._encoding.pairs))
        self._told: set[int] = set()
        return self

    def submit(self, batch: Batch, format: str) -> Future[Results]:
        return self._threads.submit(self._ask, batch, format)

    def _ask(self, batch: Batch, format: str) -> Results:
        worker = self._idle.get()
        try:
            answer = self._answer(worker, pickle.dumps((batch, format), pickle.HIGHEST_PROTOCOL))
        finally:
            self._idle.put(worker)  # a dead one too: who waits for one shall find out
        kind, content = pickle.loads(answer)
        if kind == "user_error":
            raise UserError(content)
        if kind == "bug":
            raise RuntimeError(f"rows could not be tokenized in a worker process:\n{content}")
        return content

    def _answer(self, worker: subprocess.Popen[bytes], request: bytes) -> bytes:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            if worker.pid not in self._told:
                self._told.add(worker.pid)
                send(worker.stdin, self._made_of)
            send(worker.stdin, request)
            answer = receive(worker.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise _died(worker)
        return answer

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            if error[0] is not None:
                worker.kill()  # a thread that waits for its answer waits no longer
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
            worker.wait()


def command() -> list[str]:
    """How a worker is started."""
    return [sys.executable, "-m", "engine.data.examples.worker"]


def _died(worker: subprocess.Popen[bytes]) -> Interrupted:
    code = worker.wait()
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += ", as the system does when memory is short"
    return Interrupted(f"a process that tokenizes examples died ({how})", where="examples",
                       fix="Start it again; less memory is needed with fewer examples.workers")  # fmt: skip


def send(stream: IO[bytes], message: bytes) -> None:
    """A message on a pipe, with its length before it."""
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message; None where the other side is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    message = stream.read(length)
    return message if len(message) == length else None
