"""Which source gives the j-th block of a blend: the one whose share is furthest behind its weight.

Each step source i is owed w_i more; the one owed most gives a block and pays sum(w). Weights become integers first,
so the choice is exact: no rounding that differs between machines, none that grows with j.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from engine import _index
from engine.errors import UserError

_SCALE = 2**40  # weights are exact to 1e-12: one block off after 10^12
_CHUNK = 1 << 16
_CHUNKS_HELD = 4


def integer_weights(weights: Sequence[float]) -> np.ndarray:
    """Shares of the sum in units of 2^-40, at least one unit each, int64. UserError unless all are positive."""
    for place, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"weight {weight} is not a positive number", where=f"data.blend[{place}].weight",
                            fix="Remove the source or give it a positive weight")
    # Scaled by the largest first: the sum of very large weights is infinite, and of tiny ones loses digits.
    scaled = [weight / max(weights) for weight in weights]
    total = math.fsum(scaled)
    return np.array([max(1, round(weight / total * _SCALE)) for weight in scaled], np.int64)


class BlendIndex:
    """(source, its block) for every block of an endless blend, computed in chunks as they are asked for."""

    def __init__(self, weights: Sequence[float]):
        self.weights = integer_weights(weights)
        zeros = np.zeros_like(self.weights)
        self._states = [(zeros, zeros)]  # (deficits, counts) before each chunk
        self._held: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # prefetch threads share the index

    def locate(self, block_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [p], the source's own block [p]) of blocks of the blend."""
        if len(self.weights) == 1:
            return np.zeros_like(block_p), block_p
        chunk_p, place_p = np.divmod(block_p, _CHUNK)
        source_p, own_p = np.empty_like(block_p), np.empty_like(block_p)
        with self._lock:
            for number in np.unique(chunk_p):
                chosen = chunk_p == number
                source, own = self._chunk(int(number))
                source_p[chosen], own_p[chosen] = source[place_p[chosen]], own[place_p[chosen]]
        return source_p, own_p

    def counts(self, blocks: int) -> np.ndarray:
        """How many of the blend's first ``blocks`` blocks each source gives, int64 [sources]."""
        if len(self.weights) == 1:
            return np.array([blocks], np.int64)
        number, rest = divmod(blocks, _CHUNK)
        with self._lock:
            self._chunk(number)
            return _index.blend(self.weights, *self._states[number], rest)[3]

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._held:
            while len(self._states) <= number:  # a resume far in: 10^9 blocks of ten sources take some 10 s
                *_, deficits, counts = _index.blend(self.weights, *self._states[-1], _CHUNK)
                self._states.append((deficits, counts))
            source, own, *_ = _index.blend(self.weights, *self._states[number], _CHUNK)
            self._held[number] = (source, own)
            while len(self._held) > _CHUNKS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]
