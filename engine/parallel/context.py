"""Context parallelism: the ranks of a group share every sequence, and attention gathers the keys and values of all.

Of cp ranks, rank c holds chunks c and 2 cp - 1 - c of a sequence's 2 cp equal chunks. Causal attention costs a chunk in
proportion to where it ends, so the two together cost every rank the same: (c + 1) + (2 cp - c) = 2 cp + 1 chunks of
keys. Why keys and values are gathered and not sent around a ring: docs/context_parallel.md.

b batch, g key-value groups, s this rank's tokens, t all tokens of a sequence, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def chunks(seq_length: int, group: Any) -> list[tuple[int, int]]:
    """This rank's ranges [first, end) of a sequence's positions, in the order in which it holds them."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if size == 1:
        return [(0, seq_length)]
    parts = 2 * size
    assert seq_length % parts == 0, (seq_length, parts)  # engine/config/checks.py refuses such lengths
    chunk = seq_length // parts
    return [(part * chunk, (part + 1) * chunk) for part in (rank, parts - 1 - rank)]


def slice_sequence(x_bs: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's tokens of whole sequences: [b, t, …] -> [b, s, …]."""
    ranges = chunks(x_bs.shape[1], group)
    return x_bs if len(ranges) == 1 else torch.cat([x_bs[:, first:end] for first, end in ranges], dim=1)


def positions(seq_length: int, group: Any, device: torch.device | None = None) -> torch.Tensor:
    """Where in the sequence this rank's tokens stand: int64 [s]."""
    return slice_sequence(torch.arange(seq_length, device=device)[None], group)[0]


def _in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """Every rank's two chunks [b, g, s, d] -> the sequence [b, g, t, d]."""
    halves = [part.chunk(2, dim=2) for part in parts]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], dim=2)


def _by_rank(whole: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The sequence [b, g, t, d] -> every rank's two chunks [b, g, s, d]."""
    pieces = whole.chunk(2 * size, dim=2)
    return [torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim=2) for rank in range(size)]


class _GatherKeysValues(torch.autograd.Function):
    """One all-gather of both forward. Backward a reduce-scatter, as an all-to-all of the parts followed by their sum:
    the bytes of a ring's reduce-scatter, but the sum is taken in fp32 and rounded once, in the order of the ranks."""

    @staticmethod
    def forward(ctx, k_bgsd, v_bgsd, group):
        ctx.group = group
        own = torch.stack([k_bgsd, v_bgsd])
        parts = own.new_empty(group.size(), *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own, group=group)
        return _in_order([k for k, _ in parts]), _in_order([v for _, v in parts])

    @staticmethod
    def backward(ctx, dk_bgtd, dv_bgtd):  # type: ignore[override]
        size = ctx.group.size()
        sent = torch.stack([torch.stack(both) for both in zip(_by_rank(dk_bgtd, size), _by_rank(dv_bgtd, size),
                                                              strict=True)])
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=ctx.group)
        dk_bgsd, dv_bgsd = received.sum(0, dtype=torch.promote_types(sent.dtype, torch.float32)).to(sent.dtype)
        return dk_bgsd, dv_bgsd, None


def gather_keys_values(k_bgsd: torch.Tensor, v_bgsd: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's keys and values -> those of the whole sequence, in its order, [b, g, t, d].

    Collective over the group, in the backward pass too; gradients of all ranks are summed in fp32.
    """
    if group is None or group.size() == 1:
        return k_bgsd, v_bgsd
    return _GatherKeysValues.apply(k_bgsd, v_bgsd, group)  # type: ignore[return-value]
