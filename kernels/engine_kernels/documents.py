"""Rows of documents: where each ends, which queries of a row are at hand, and what each kernel makes of that.

b rows of t positions; of each, the same chunks of positions hold the s queries, one behind another. A query sees the
keys of its own document up to its own position, the last ``window`` of them: one run of keys, from the ``lowest`` to
its position. A segment is those queries of one document that stand in one chunk, with the run of keys they see.

A document may go on from another of its row: then its queries see a prefix of that one, before their own keys, as if it
stood there (one prompt with several answers). prefixes.py puts such keys there, and makes of it rows as above.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]


def _which(boundaries: Sequence[int], position: int) -> int:
    """The document that a position is in. By hand: torch.compile does not trace the standard library's."""
    low, high = 0, len(boundaries) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if boundaries[middle] <= position else (low, middle)
    return low


class Segment(NamedTuple):
    """``s`` queries of ``row`` from the ``query``-th at hand on, the last of ``t`` keys from position ``key`` on; the
    ``part``-th segment of its document."""

    row: int
    query: int
    s: int
    key: int
    t: int
    part: int


class Packed(NamedTuple):
    """The segments for kernels that take cumulative lengths: int32 on the device, and the largest lengths.

    Queries are packed as they stand. ``keys``: runs (row, first, end) whose keys stand one behind another.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    keys: list[tuple[int, int, int]]


class Documents:
    """``boundaries_b``: for each row [0, ..., t], the positions at which documents begin and the last one's end.

    ``chunks``: ranges [first, end) of positions whose queries are at hand (None: all), of every row, or with
    ``chunks_b`` of each. ``prefixes_b``: for each row and document the range [first, end) that comes before it, or
    None: the beginning of an earlier document of the row that itself goes on from none. What kernels need (cumulative
    lengths, block masks) is made once for each window and device and kept, so share one object between layers. Raises
    ValueError for boundaries that do not rise from 0 to the same t in every row, and for ranges out of place.
    """

    def __init__(self, boundaries_b: Iterable[Sequence[int]], chunks: Sequence[Range] | None = None, *,
                 chunks_b: Sequence[Sequence[Range]] | None = None,
                 prefixes_b: Sequence[Sequence[Range | None]] | None = None):
        self.boundaries_b = [list(row) for row in boundaries_b]
        self.length = self.boundaries_b[0][-1] if self.boundaries_b and self.boundaries_b[0] else 0
        for row in self.boundaries_b:
            if row[:1] != [0] or row[-1] != self.length or any(a >= b for a, b in itertools.pairwise(row)):
                raise ValueError(f"documents: boundaries {row} do not rise from 0 to the rows' length {self.length}")
        of_all = [(0, self.length)] if chunks is None else list(chunks)
        self.chunks_b = [of_all] * len(self.boundaries_b) if chunks_b is None else [list(row) for row in chunks_b]
        for row in self.chunks_b:
            if any(not 0 <= first < end <= self.length for first, end in row):
                raise ValueError(f"documents: chunks {row} are not ranges of the rows' {self.length} positions")
        counts = {sum(end - first for first, end in row) for row in self.chunks_b} or {0}
        if len(self.chunks_b) != len(self.boundaries_b) or len(counts) > 1:
            raise ValueError(f"documents: chunks {self.chunks_b} are not as many queries of each of "
                             f"{len(self.boundaries_b)} rows")
        self.queries = counts.pop()
        self.prefixes_b = _checked(prefixes_b, self.boundaries_b)
        self._kept: dict[Any, Any] = {}

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when first called for ``key``."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def segments(self, window: int | None) -> list[Segment]:
        """By row, then chunk, then document: in the order of the queries."""
        assert self.prefixes_b is None, "prefixes.expand first"
        return self.keep(("segments", window), lambda: list(self._segments(window)))

    def _segments(self, window: int | None) -> Iterable[Segment]:
        for row, (boundaries, chunks) in enumerate(zip(self.boundaries_b, self.chunks_b, strict=True)):
            at, parts = 0, [0] * len(boundaries)
            for first, end in chunks:
                for which in range(_which(boundaries, first), _which(boundaries, end - 1) + 1):
                    begin, stop = boundaries[which], min(boundaries[which + 1], end)
                    query = max(begin, first)
                    key = begin if window is None else max(begin, query - window + 1)
                    yield Segment(row, at, stop - query, key, stop - key, parts[which])
                    parts[which] += 1
                    at += stop - query

    @property
    def parts(self) -> int:
        """Segments of a document, at most: so many of a row's queries may see the same key apart from each other."""
        return self.keep("parts", lambda: 1 + max([0, *(one.part for one in self.segments(None))]))

    def table(self, window: int | None) -> Tensor:
        """The segments for the C++ kernel, int64 [n, 6], the costliest first; keys of each part have gradients of
        their own, so the last column is the row among [parts * b]."""
        def make() -> Tensor:
            ordered = sorted(self.segments(window), key=lambda one: -one.s * one.t)
            rows = len(self.boundaries_b)
            return torch.tensor([(*one[:5], one.part * rows + one.row) for one in ordered], dtype=torch.int64)

        return self.keep(("table", window), make)

    def packed(self, window: int | None, device: torch.device) -> Packed:
        def make() -> Packed:
            found = self.segments(window)
            lengths = [[0, *(one.s for one in found)], [0, *(one.t for one in found)]]
            cu_queries, cu_keys = torch.tensor(lengths).cumsum(1).to(torch.int32).to(device, non_blocking=True)
            keys: list[tuple[int, int, int]] = []
            for one in found:
                goes_on = bool(keys) and keys[-1][::2] == (one.row, one.key)
                first = keys.pop()[1] if goes_on else one.key
                keys.append((one.row, first, one.key + one.t))
            return Packed(cu_queries, cu_keys, max(lengths[0]), max(lengths[1]), keys)

        return self.keep(("packed", window, device), make)

    def lowest(self, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of each query the first key it sees, and its own position, int32 [b, s]."""
        assert self.prefixes_b is None, "prefixes.expand first"

        def make() -> tuple[Tensor, Tensor]:
            position_bs = torch.stack([torch.cat([torch.arange(first, end) for first, end in row])
                                       for row in self.chunks_b])
            starts = [torch.tensor(row)[torch.bucketize(position_s, torch.tensor(row), right=True) - 1]
                      for row, position_s in zip(self.boundaries_b, position_bs, strict=True)]
            lowest_bs = torch.stack(starts)
            if window is not None:
                lowest_bs = torch.maximum(lowest_bs, position_bs - window + 1)
            lowest_bs, position_bs = lowest_bs.int(), position_bs.int()
            return lowest_bs.to(device, non_blocking=True), position_bs.to(device, non_blocking=True)

        return self.keep(("lowest", window, device), make)


def _checked(prefixes_b: Sequence[Sequence[Range | None]] | None, boundaries_b: list[list[int]]
             ) -> list[list[Range | None]] | None:
    """The same, or None where no document has one."""
    if prefixes_b is None or not any(prefix for row in prefixes_b for prefix in row):
        return None
    if [len(row) + 1 for row in prefixes_b] != [len(row) for row in boundaries_b]:
        raise ValueError(f"documents: prefixes {prefixes_b} are not one for each document of {boundaries_b}")
    for boundaries, row in zip(boundaries_b, prefixes_b, strict=True):
        for which, prefix in enumerate(row):
            if prefix is None:
                continue
            source = _which(boundaries, prefix[0])
            whole = 0 <= source < which and prefix[0] == boundaries[source] < prefix[1] <= boundaries[source + 1]
            if not whole or row[source] is not None:
                raise ValueError(f"documents: prefix {prefix} of document {which} in {boundaries} is not the beginning "
                                 "of an earlier document that has none itself")
    return [list(row) for row in prefixes_b]
