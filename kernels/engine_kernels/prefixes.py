"""Documents that go on from another one of their row: a prompt computed once, and every answer to it behind it.

Attention by any kernel needs a query's keys in one run. So keys and values are copied: each document that goes on gets
those of its prefix in front, [b, g, t, d] -> [b, g, T, d], and the rows are rows of plain documents again, of which
not all queries are there. Queries, and every layer but attention, have the prefix once. A window counts positions in
the document as continued. The gradients of the copies are added up in fp32, in the order of the documents.

b rows, g key/value groups, t positions of a row, T positions with the copies, d head dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine_kernels.documents import Documents, Range


@dataclass(frozen=True, eq=False)
class Expanded:
    """``documents``: the rows with the copies. ``source``: where each of their keys comes from, ``own``: where each
    row's own keys are, int64 [b * T] and [b * t] among all rows. ``copies``: pairs (to, from) of the gradients of
    copies, int64; no place twice in one of them."""

    documents: Documents
    source: Tensor
    own: Tensor
    copies: list[tuple[Tensor, Tensor]]


def expand(documents: Documents, device: torch.device) -> Expanded:
    """Made once for the object and the device, and kept."""
    return documents.keep(("expanded", device), lambda: _expand(documents, device))


def _expand(documents: Documents, device: torch.device) -> Expanded:
    assert documents.prefixes_b is not None
    rows = [_row(*row) for row in zip(documents.boundaries_b, documents.chunks_b, documents.prefixes_b, strict=True)]
    t, longest = documents.length, max(len(row.source) for row in rows)
    boundaries_b = [row.boundaries + [longest] * (len(row.source) < longest) for row in rows]
    source_bT, own_bt = torch.zeros(len(rows), longest, dtype=torch.int64), torch.empty(len(rows), t, dtype=torch.int64)
    rounds: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for i, row in enumerate(rows):
        source_bT[i, : len(row.source)] = row.source + i * t
        own_bt[i] = row.own + i * longest
        for use, (first, end), at in row.copies:
            span = torch.arange(end - first)
            rounds.setdefault(use, []).append((span + i * t + first, span + i * longest + at))
    copies = [tuple(torch.cat(parts).to(device) for parts in zip(*rounds[use], strict=True)) for use in sorted(rounds)]
    return Expanded(Documents(boundaries_b, chunks_b=[row.chunks for row in rows]), source_bT.flatten().to(device),
                    own_bt.flatten().to(device), copies)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Row:
    """One row with the copies; ``copies``: which copy of its prefix it is, the prefix, where the copy begins."""

    boundaries: list[int]
    chunks: list[Range]
    source: Tensor
    own: Tensor
    copies: list[tuple[int, Range, int]]


def _row(boundaries: list[int], chunks: list[Range], prefixes: list[Range | None]) -> _Row:
    found, shifted, source, own, copies = [0], [], [], [], []
    used: dict[int, int] = {}  # by where a prefix begins
    for (begin, stop), prefix in zip(itertools.pairwise(boundaries), prefixes, strict=True):
        at = found[-1]
        if prefix is not None:
            used[prefix[0]] = used.get(prefix[0], 0) + 1
            copies.append((used[prefix[0]], prefix, at))
            source.append(torch.arange(*prefix))
            at += prefix[1] - prefix[0]
        source.append(torch.arange(begin, stop))
        own.append(torch.arange(at, at + stop - begin))
        found.append(at + stop - begin)
        shifted.append((begin, stop, at - begin))
    queries = [(max(begin, first) + by, min(stop, end) + by) for first, end in chunks for begin, stop, by in shifted
               if max(begin, first) < min(stop, end)]
    return _Row(found, queries, torch.cat(source), torch.cat(own), copies)


class _Copy(torch.autograd.Function):
    """[b, g, t, d] -> [b, g, T, d], in memory [b, T, g, d]."""

    @staticmethod
    def forward(ctx: Any, x_bgtd: Tensor, expanded: Expanded) -> Tensor:
        ctx.expanded, ctx.shape = expanded, x_bgtd.shape
        b, g, _, d = x_bgtd.shape
        rows = x_bgtd.transpose(1, 2).reshape(-1, g, d)
        return rows.index_select(0, expanded.source).view(b, -1, g, d).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dx_bgTd: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (b, g, t, d), expanded = ctx.shape, ctx.expanded
        copied = dx_bgTd.transpose(1, 2).reshape(-1, g, d)
        summed = copied.index_select(0, expanded.own).to(torch.promote_types(copied.dtype, torch.float32))
        for to, source in expanded.copies:
            summed[to] += copied[source]  # every place once: no atomics
        return summed.to(copied.dtype).view(b, t, g, d).transpose(1, 2), None


def before_documents(k_bgtd: Tensor, v_bgtd: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Documents]:
    """Keys and values with each document's prefix in front of it, and the documents that they are now."""
    if documents.prefixes_b is None:
        return k_bgtd, v_bgtd, documents
    expanded = expand(documents, k_bgtd.device)
    return _Copy.apply(k_bgtd, expanded), _Copy.apply(v_bgtd, expanded), expanded.documents  # type: ignore[return-value]


def visible_keys(documents: Documents, window: int | None, device: torch.device) -> Tensor:
    """The definition, bool [b, s, t]: which keys each query sees, its prefix's where they stand."""
    rows = []
    prefixes_b = documents.prefixes_b or [[None] * (len(row) - 1) for row in documents.boundaries_b]
    for boundaries, chunks, prefixes in zip(documents.boundaries_b, documents.chunks_b, prefixes_b, strict=True):
        mask_tt = torch.zeros(documents.length, documents.length, dtype=torch.bool)
        for (begin, stop), prefix in zip(itertools.pairwise(boundaries), prefixes, strict=True):
            first, end = prefix or (0, 0)
            keys = torch.cat([torch.arange(first, end), torch.arange(begin, stop)])
            before = torch.arange(end - first, len(keys))[:, None] - torch.arange(len(keys))  # positions back
            seen = (before >= 0) & (before < (len(keys) if window is None else window))
            mask_tt[begin:stop, keys] = seen
        rows.append(torch.cat([mask_tt[first:end] for first, end in chunks]))
    return torch.stack(rows).to(device)
