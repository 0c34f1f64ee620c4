"""Rows of documents: where each ends, which queries of a row are at hand, and what each kernel makes of that.

b rows of t positions; of each, the same chunks of positions hold the s queries, one behind another. A query sees the
keys of its own document up to its own position, the last ``window`` of them: one run of keys, from the ``lowest`` to
its position. A segment is those queries of one document that stand in one chunk, with the run of keys they see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """``s`` queries of ``row`` from the ``query``-th at hand on, the last of ``t`` keys from position ``key`` on."""

    row: int
    query: int
    s: int
    key: int
    t: int
    chunk: int


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

    ``chunks``: ranges [first, end) of positions whose queries are at hand (None: all). What kernels need (cumulative
    lengths, block masks) is made once for each window and device and kept, so share one object between layers. Raises
    ValueError for boundaries that do not rise from 0 to the same t in every row.
    """

    def __init__(self, boundaries_b: Iterable[Sequence[int]], chunks: Sequence[tuple[int, int]] | None = None):
        self.boundaries_b = [list(row) for row in boundaries_b]
        self.length = self.boundaries_b[0][-1] if self.boundaries_b and self.boundaries_b[0] else 0
        for row in self.boundaries_b:
            if row[:1] != [0] or row[-1] != self.length or any(a >= b for a, b in itertools.pairwise(row)):
                raise ValueError(f"documents: boundaries {row} do not rise from 0 to the rows' length {self.length}")
        self.chunks = [(0, self.length)] if chunks is None else list(chunks)
        if any(not 0 <= first < end <= self.length for first, end in self.chunks):
            raise ValueError(f"documents: chunks {self.chunks} are not ranges of the rows' {self.length} positions")
        self.queries = sum(end - first for first, end in self.chunks)
        self._kept: dict[Any, Any] = {}

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when first called for ``key``."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def segments(self, window: int | None) -> list[Segment]:
        """By row, then chunk, then document: in the order of the queries."""
        return self.keep(("segments", window), lambda: list(self._segments(window)))

    def _segments(self, window: int | None) -> Iterable[Segment]:
        for row, boundaries in enumerate(self.boundaries_b):
            at = 0
            for chunk, (first, end) in enumerate(self.chunks):
                for begin, stop in itertools.pairwise(boundaries):
                    query, stop = max(begin, first), min(stop, end)
                    if query >= stop:
                        continue
                    key = begin if window is None else max(begin, query - window + 1)
                    yield Segment(row, at, stop - query, key, stop - key, chunk)
                    at += stop - query

    def table(self, window: int | None) -> Tensor:
        """The segments for the C++ kernel, int64 [n, 6], the costliest first; keys of each chunk have gradients of
        their own, so the last column is the row among [chunks * b]."""
        def make() -> Tensor:
            ordered = sorted(self.segments(window), key=lambda one: -one.s * one.t)
            rows = len(self.boundaries_b)
            return torch.tensor([(*one[:5], one.chunk * rows + one.row) for one in ordered], dtype=torch.int64)

        return self.keep(("table", window), make)

    def packed(self, window: int | None, device: torch.device) -> Packed:
        def make() -> Packed:
            found = self.segments(window)
            lengths = [[0, *(one.s for one in found)], [0, *(one.t for one in found)]]
            cu_queries, cu_keys = torch.tensor(lengths).cumsum(1).to(torch.int32).to(device, non_blocking=True)
            runs = [list(group) for _, group in itertools.groupby(found, lambda one: (one.row, one.chunk))]
            keys = [(run[0].row, run[0].key, run[-1].key + run[-1].t) for run in runs]
            return Packed(cu_queries, cu_keys, max(lengths[0]), max(lengths[1]), keys)

        return self.keep(("packed", window, device), make)

    def lowest(self, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of each query the first key it sees [b, s] and its own position [s], int32."""
        def make() -> tuple[Tensor, Tensor]:
            position_s = torch.cat([torch.arange(first, end) for first, end in self.chunks])
            starts = [torch.tensor(row)[torch.bucketize(position_s, torch.tensor(row), right=True) - 1]
                      for row in self.boundaries_b]
            lowest_bs = torch.stack(starts)
            if window is not None:
                lowest_bs = torch.maximum(lowest_bs, position_s - window + 1)
            lowest_bs, position_s = lowest_bs.int(), position_s.int()
            return lowest_bs.to(device, non_blocking=True), position_s.to(device, non_blocking=True)

        return self.keep(("lowest", window, device), make)
