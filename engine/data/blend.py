"""Which source gives the j-th block of a blend: a closed form in integers (csrc/index/blend.hpp), so that any position
costs the same and nothing grows.

A blend is a row of segments. Within one the weights are the same; where they change, or a source leaves or comes, the
next begins, and each source goes on with the block after the last that it gave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine import _index
from engine.errors import UserError

_SCALE = 2**40  # weights are exact to 1e-12: one block off after 10^12
NEVER = 2**62  # positions from here on are not reached


def integer_weights(weights: Sequence[float], where: str = "data.blend[{}].weight") -> np.ndarray:
    """Shares of the sum in units of 2^-40, at least one unit each, int64. UserError unless all are positive."""
    for place, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"weight {weight} is not a positive number", where=where.format(place),
                            fix="Remove the source or give it a positive weight")
    # Scaled by the largest first: the sum of very large weights is infinite, and of tiny ones loses digits.
    scaled = [weight / max(weights) for weight in weights]
    total = math.fsum(scaled)
    return np.array([max(1, round(weight / total * _SCALE)) for weight in scaled], np.int64)


@dataclass(frozen=True)
class Segment:
    """The blocks of a blend from ``start`` on: which sources give, under which weights, and what every source of the
    blend had given before. On a tie the source that is named first gives first."""

    start: int
    sources: tuple[int, ...]
    weights: tuple[int, ...]
    given: tuple[int, ...]

    def counts(self, position: int) -> np.ndarray:
        """How many of the blend's blocks before ``position`` (not before ``start``) each source gives, int64."""
        found = np.array(self.given, np.int64)
        found[list(self.sources)] += _index.blend_counts(np.array(self.weights, np.int64), position - self.start)
        return found

    def first_end(self, limits: Sequence[int]) -> int:
        """Where the first source has given as many blocks as ``limits`` (one for every source, or NEVER) let it: the
        position after its last; NEVER where none comes to it. No source has given as many before ``start``."""
        weights = np.array(self.weights, np.int64)
        own = np.array([limits[source] - 1 - self.given[source] if limits[source] < NEVER else -1
                        for source in self.sources], np.int64)
        place = _index.blend_earliest(weights, own)
        return NEVER if place < 0 else min(NEVER, self.start + _index.blend_rank(weights, place, int(own[place])) + 1)


class BlendIndex:
    """(source, its block) of every block of a blend. Threads share it: it has no state.

    ``BlendIndex(weights)`` is endless and of one segment; ``of`` makes one of several, that may have an end.
    """

    def __init__(self, weights: Sequence[float]):
        found = tuple(integer_weights(weights).tolist())
        self._set([Segment(0, tuple(range(len(found))), found, (0,) * len(found))], None, None)

    @classmethod
    def of(cls, segments: Sequence[Segment], *, end: int | None = None, readers: Sequence[int] | None = None
           ) -> BlendIndex:
        """``segments``: by their starts, the first at 0. ``end``: how many blocks there are (None: endless).
        ``readers``: what ``locate`` calls each source (None: as the segments do); -1 where it cannot be read."""
        made = cls.__new__(cls)
        made._set(list(segments), end, readers)
        return made

    def _set(self, segments: list[Segment], end: int | None, readers: Sequence[int] | None) -> None:
        self.segments, self.end = segments, end
        self._starts = np.array([segment.start for segment in segments], np.int64)
        names = np.arange(len(segments[-1].given)) if readers is None else np.array(readers, np.int64)
        # By segment: the weights; and of its sources the names, and the blocks given before.
        self._tables = [(np.array(segment.weights, np.int64), names[list(segment.sources)],
                         np.array(segment.given, np.int64)[list(segment.sources)]) for segment in segments]

    def locate(self, block_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [p], the source's own block [p]) of blocks of the blend, int64.

        Raises UserError past the end of a blend whose sources are all used up.
        """
        if self.end is not None and len(block_p) and int(block_p.max()) >= self.end:
            raise UserError(f"its sources are used up after {self.end:,} blocks", where="data.blend",
                            fix="Raise max_epochs, or train fewer steps")
        if len(self.segments) == 1:
            return self._within(0, block_p)
        segment_p = np.searchsorted(self._starts, block_p, "right") - 1
        if len(segment_p) and (segment_p == segment_p[0]).all():
            return self._within(int(segment_p[0]), block_p)
        source_p, own_p = np.empty_like(block_p), np.empty_like(block_p)
        for number in np.unique(segment_p):
            chosen = segment_p == number
            source_p[chosen], own_p[chosen] = self._within(int(number), block_p[chosen])
        return source_p, own_p

    def _within(self, number: int, block_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights, names, given = self._tables[number]
        if len(weights) == 1:
            return np.full_like(block_p, names[0]), block_p - self.segments[number].start + given[0]
        place_p, own_p = _index.blend_locate(weights, block_p - self.segments[number].start)
        return names[place_p], own_p + given[place_p]

    def counts(self, blocks: int) -> np.ndarray:
        """How many of the blend's first ``blocks`` blocks each source gives, int64 [sources] as segments number them.
        Past the end: of all blocks."""
        blocks = blocks if self.end is None else min(blocks, self.end)
        return self.segment_at(blocks).counts(blocks)

    def segment_at(self, block: int) -> Segment:
        """The segment that ``block`` belongs to."""
        return self.segments[max(0, int(np.searchsorted(self._starts, block, "right")) - 1)]
