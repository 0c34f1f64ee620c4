"""A vocabulary split over tensor-parallel ranks, as the kernels ask for it: where this rank's rows are, a gather."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist


def _gather(stats_rsn: torch.Tensor, tp_group: Any) -> torch.Tensor:
    """Statistics [r, s, n] of this rank's logits -> those of all ranks in the vocabulary's order: one collective.

    Gathered, not summed: a sum would need the common maximum first, another round trip; and every rank combines the
    shards in the same order, to the same bits.
    """
    r, s, n = stats_rsn.shape
    whole = stats_rsn.new_empty(tp_group.size() * r, s, n)
    dist.all_gather_into_tensor(whole, stats_rsn.contiguous(), group=tp_group)
    return whole


def shard(rows: int, vocab_size: int, tp_group: Any = None) -> dict[str, Any]:
    """Arguments of ``linear_cross_entropy`` and ``linear_log_probs`` for this rank's padded ``rows``."""
    start, combine = 0, None
    if tp_group is not None and tp_group.size() > 1:
        start, combine = tp_group.rank() * rows, functools.partial(_gather, tp_group=tp_group)
    return {"vocab_start": start, "vocab_valid": max(0, min(rows, vocab_size - start)), "vocab_size": vocab_size,
            "combine": combine}
