"""A global batch at a position as this rank's micro-batches, the next step's read ahead while this one is computed.

b rows of a micro-batch. Row k of micro-batch m on data-parallel rank r is row j = (m dp_size + r) b + k of the global
batch, at position + j s of s tokens a row. So rows and their order do not depend on dp_size, the micro-batch size or
the number of reader threads.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.prefetch import ReaderPool
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.ledger import Given
    from engine.data.loader import Batch


@dataclass(frozen=True)
class Step:
    """What one call of micro_batches reads; positions and lengths in tokens, batch sizes in sequences."""

    position: int
    global_batch_size: int
    micro_batch_size: int
    seq_length: int

    def next(self) -> Step:
        end = self.position + self.global_batch_size * self.seq_length
        return Step(end, self.global_batch_size, self.micro_batch_size, self.seq_length)


class StepReader(ABC):
    """What loaders share. They give ``_reader``: a function of (positions [b], row length) that makes a ``Batch``."""

    @property
    @abstractmethod
    def order(self) -> str:
        """The name of the order in which samples come: engine/data/order.py."""

    @abstractmethod
    def given(self, position: int) -> list[Given]:
        """What each source gave of the run's first ``position`` tokens."""

    def begin(self, *, steps: int, step: int = 0, position: int = 0, record: dict[str, Any] | None = None
              ) -> tuple[str, ...]:
        """Before the first step of a run of ``steps`` steps that stands at ``step`` and ``position`` (tokens), with
        what ``record`` gave at that position. -> what is other than it was then, for people. Raises UserError."""
        return ()

    def record(self, position: int) -> dict[str, Any] | None:
        """What ``begin`` needs to go on from ``position`` tokens in a later process: plain values, or None."""
        return None

    def __init__(self, *, seq_length: int, dp_rank: int, dp_size: int, num_workers: int):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} of dp_size {dp_size}")
        self.seq_length, self.dp_rank, self.dp_size = seq_length, dp_rank, dp_size
        self._pool = ReaderPool(num_workers)
        self._ahead: tuple[Step, list[Future]] | None = None
        self._closed = False

    @abstractmethod
    def _reader(self) -> Callable[[np.ndarray, int], Batch]: ...

    def micro_batches(
        self, position_tokens: int, *, global_batch_size: int, micro_batch_size: int, seq_length: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch at a position; see the top of the file.

        The reader threads go on with the step that follows, and a call that continues there finds it read. Raises
        UserError when the batch does not divide or the length exceeds model.seq_length; errors of reading are raised
        by the iterator.
        """
        step = Step(position_tokens, global_batch_size, micro_batch_size, seq_length)
        self._check(step)
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1]
            self._ahead = None
        else:
            batches = self._submit(step)
        if self._ahead is None or self._ahead[0] != step.next():  # a pipeline stage may ask for the same step twice
            self._drop_ahead()
            self._ahead = (step.next(), self._submit(step.next()))
        return _results(batches)

    def close(self) -> None:
        """Ends the reader threads. The loader cannot be read afterwards."""
        self._closed = True
        self._drop_ahead()
        self._pool.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the loader is closed")

    def _check(self, step: Step, whole_batch: bool = False) -> None:
        self._check_open()
        if not 1 <= step.seq_length <= self.seq_length:
            raise UserError(f"{step.seq_length} tokens are not between 1 and model.seq_length ({self.seq_length})",
                            where="train.seq_length_schedule", fix="Shorten it or raise model.seq_length")
        per_round = step.micro_batch_size * (1 if whole_batch else self.dp_size)
        if per_round < 1 or step.global_batch_size < 1 or step.global_batch_size % per_round:
            raise UserError(
                f"{step.global_batch_size} sequences do not divide into micro-batches of {step.micro_batch_size} on "
                f"{self.dp_size} data-parallel ranks",
                where="train.global_batch_size", fix=f"Make it a multiple of {max(per_round, 1)}",
            )
        if step.position < 0:
            raise ValueError(f"position {step.position} is negative")

    def _submit(self, step: Step) -> list[Future]:
        rounds = step.global_batch_size // (step.micro_batch_size * self.dp_size)
        read = self._reader()  # not a method of ours: a job in the queue must not keep a forgotten loader alive
        return [self._pool.submit(functools.partial(read, self._positions(step, m), step.seq_length))
                for m in range(rounds)]

    def _positions(self, step: Step, micro_batch: int) -> np.ndarray:
        first = (micro_batch * self.dp_size + self.dp_rank) * step.micro_batch_size
        return step.position + (first + np.arange(step.micro_batch_size, dtype=np.int64)) * step.seq_length

    def _drop_ahead(self) -> None:
        for future in self._ahead[1] if self._ahead else ():
            future.cancel()
        self._ahead = None


def _results(batches: list[Future]) -> Iterator[Batch]:
    batches.reverse()
    while batches:
        yield batches.pop().result()  # popped first: a batch the caller is done with is freed
