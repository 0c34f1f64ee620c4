"""Which examples share a row, and which row comes when: epoch after epoch of one source, each packed and shuffled anew.

n examples, r rows of an epoch, k examples of a row. Epoch e puts the examples in an order with key (seed, e), packs
them by best-fit decreasing in that order (csrc/index/packing.cpp), and puts the rows in an order with key (seed, e).
Nothing else enters: not the number of steps, ranks or workers. An epoch's number of rows is the same for every order.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from engine import _index

EXAMPLES, ROWS = 0, 1  # purposes of the random streams of an epoch
_EPOCHS_HELD = 3  # a step may straddle two epochs while the next one is prefetched


@dataclass(frozen=True)
class Packing:
    """The rows of one pass: row r holds the examples items_n[starts_r[r] : starts_r[r + 1]]."""

    items_n: np.ndarray  # int64
    starts_r: np.ndarray  # int64, one more than there are rows

    def __len__(self) -> int:
        return len(self.starts_r) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.items_n[self.starts_r[row]:self.starts_r[row + 1]]


def pack(sizes_n: np.ndarray, capacity: int, *, order_n: np.ndarray | None = None, packing: bool = True) -> Packing:
    """Examples of ``sizes_n`` positions in rows of ``capacity``; without ``packing`` one a row, in the given order.

    Raises ``ValueError`` for an example that does not fit a row.
    """
    order_n = np.arange(len(sizes_n), dtype=np.int64) if order_n is None else order_n
    sizes_n = np.ascontiguousarray(sizes_n, np.int32)
    if packing:
        return Packing(*_index.pack(sizes_n, order_n, capacity))
    if len(sizes_n) and not 1 <= sizes_n.min() <= sizes_n.max() <= capacity:
        raise ValueError(f"examples take {sizes_n.min()} to {sizes_n.max()} positions, a row has {capacity}")
    return Packing(order_n, np.arange(len(order_n) + 1, dtype=np.int64))


class RowIndex:
    """Infinitely many epochs of the rows of one source, each packed on first use. Threads share it."""

    def __init__(self, sizes_n: np.ndarray, capacity: int, seed: int, *, packing: bool = True):
        self.sizes_n, self.capacity, self.seed, self.packing = sizes_n, capacity, seed % 2**64, packing
        self._held: OrderedDict[int, tuple[Packing, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()
        self.rows_per_epoch = len(self.epoch(0)[0])

    def epoch(self, number: int) -> tuple[Packing, np.ndarray]:
        """Epoch ``number``, counted from 0: its packing, and which of its rows comes when [r]."""
        with self._lock:
            if number not in self._held:
                self._held[number] = self._make(number)
                while len(self._held) > _EPOCHS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(number)
            return self._held[number]

    def _make(self, epoch: int) -> tuple[Packing, np.ndarray]:
        order_n = _index.shuffled(len(self.sizes_n), self.seed, epoch, EXAMPLES)
        packing = pack(self.sizes_n, self.capacity, order_n=order_n, packing=self.packing)
        return packing, _index.shuffled(len(packing), self.seed, epoch, ROWS)

    def locate(self, row: int) -> tuple[int, int]:
        """(epoch, row of that epoch's packing) of the source's ``row``-th row in shuffled order."""
        epoch, turn = divmod(row, self.rows_per_epoch)
        return epoch, int(self.epoch(epoch)[1][turn])

    def examples(self, row: int) -> np.ndarray:
        """The examples [k] of the source's ``row``-th row in shuffled order, int64."""
        epoch, place = self.locate(row)
        return self.epoch(epoch)[0][place]
