"""Whole parameters shared out over data-parallel ranks: the owner alone updates one and keeps its state.

Every rank has the whole gradient (Megatron's buffers are all-reduced), so that an owner needs nothing to begin with;
afterwards it broadcasts the new weights: as many bytes as the distributed optimizer's all-gather.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

BUCKET, WINDOW = 64 * 2**20, 4  # bytes of a broadcast, and how many are under way


@dataclass(frozen=True)
class Item:
    """A parameter, and what its update costs relative to others' (floating-point operations)."""

    param: Any
    cost: float


class Ownership:
    """Which rank of its data-parallel group owns each parameter: dp_cp, or expt_dp for experts.

    ``items`` come in the same order on every rank of a group, with the same costs: all ranks, those of a tensor group
    included, then agree on the owners without a word.
    """

    def __init__(self, items: Iterable[Item], pg: Any):
        self._owners: dict[Any, tuple[Any, int]] = {}
        by_group: dict[Any, list[Item]] = {}
        for item in items:
            # Megatron reduces gradients by the same mark.
            group = pg.dp_cp if getattr(item.param, "allreduce", True) else pg.expt_dp
            by_group.setdefault(group, []).append(item)
        self._shares = []
        for group, members in by_group.items():
            share = balance([item.cost for item in members], group.size())
            params = [[members[i].param for i in indices] for indices in share]
            self._owners |= {p: (group, rank) for rank, owned in enumerate(params) for p in owned}
            self._shares.append((group, params))

    def owner(self, param: Any) -> int:
        """The owner's rank in the parameter's data-parallel group."""
        return self._owners[param][1]

    def is_mine(self, param: Any) -> bool:
        group, rank = self._owners[param]
        return group.rank() == rank

    @torch.no_grad()
    def publish(self) -> None:
        """Every rank gets the weights that their owners updated. Collective over the data-parallel groups."""
        for group, params in self._shares:
            if group.size() > 1:
                _broadcast(group, params)


def balance(costs: list[float], ranks: int) -> list[list[int]]:
    """Indices of ``costs`` for each rank: the costliest first, each to the rank that has least to do so far."""
    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[i]
        shares[rank].append(i)
    return shares


def _broadcast(group: Any, params: list[list[Any]]) -> None:
    """The owners take turns, so that none waits for another to send all of its own; WINDOW buckets are under way."""
    turns = itertools.zip_longest(*(_buckets(owned) for owned in params))
    buckets = [(rank, bucket) for turn in turns for rank, bucket in enumerate(turn) if bucket]
    for i in range(0, len(buckets), WINDOW):
        for work, flat, rank, bucket in [_start(group, *one) for one in buckets[i : i + WINDOW]]:
            work.wait()
            if rank != group.rank():
                for p, values in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    p.copy_(values.view(p.shape))


def _start(group: Any, rank: int, bucket: list[Any]) -> tuple[Any, torch.Tensor, int, list[Any]]:
    if rank == group.rank():
        flat = torch.cat([p.detach().flatten() for p in bucket])
    else:
        flat = torch.empty(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
    source = dist.get_global_rank(group, rank)
    return dist.broadcast(flat, src=source, group=group, async_op=True), flat, rank, bucket


def _buckets(params: list[Any]) -> list[list[Any]]:
    """Runs of parameters of one dtype, each of BUCKET bytes or of one larger parameter."""
    buckets: list[list[Any]] = []
    size = 0
    for p in sorted(params, key=lambda p: str(p.dtype)):  # stable: the same on all ranks
        if not buckets or buckets[-1][0].dtype != p.dtype or size + p.nbytes > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.nbytes
    return buckets
