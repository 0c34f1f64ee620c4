"""Recovery from running out of memory: a smaller micro-batch, more accumulation, the same global batch and loss.

Ranks must agree before any of them reduces gradients: one that failed would leave the others waiting in a collective.
So the first collective of a step is a vote, cast by the ranks that finished their backward passes when they enter
Megatron's finalisation, and by a rank that failed where it failed. Only data-parallel layouts can do this (the
configuration refuses others): inside tensor or pipeline groups a failing rank misses collectives of the forward pass.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from engine.errors import UserError
from engine.parallel.topology import Groups


class OutOfMemoryVote(RuntimeError):
    """Some rank ran out of memory in this step; raised on all ranks, before gradients are reduced."""


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, and the CPU allocator's, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _any_failed(failed: bool, groups: Groups) -> bool:
    votes = torch.tensor([float(failed)], device=groups.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return votes.item() > 0


def agreeing_finalize(groups: Groups):
    """Megatron's finalisation of gradients, preceded by the vote of this rank that its backward passes are done."""

    def finalize(*args, **kwargs) -> None:
        if _any_failed(False, groups):
            raise OutOfMemoryVote
        finalize_model_grads(*args, **kwargs)

    return finalize


def smaller_micro_batch(micro_batch_size: int) -> int:
    """The largest proper divisor: it divides every global batch of a schedule that the configured size divides.

    Raises ``UserError`` when it is a single sequence already.
    """
    if micro_batch_size == 1:
        raise UserError("out of memory with a single sequence a micro-batch", where="train.micro_batch_size",
                        fix="Shorten model.seq_length, use train.recompute full, or split the model (parallel.tensor)")
    return max(size for size in range(1, micro_batch_size // 2 + 1) if micro_batch_size % size == 0)


def recover(error: BaseException, groups: Groups) -> None:
    """Returns on every rank once all know that the step must be repeated; re-raises what is no lack of memory."""
    if not isinstance(error, OutOfMemoryVote):
        if not is_out_of_memory(error):
            raise error
        _any_failed(True, groups)
    gc.collect()
    if groups.device.type == "cuda":
        torch.cuda.empty_cache()
