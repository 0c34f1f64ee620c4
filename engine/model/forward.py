"""One pass of micro-batches through Megatron's schedules: what training and evaluation share.

The loss is a plain sum over supervised tokens; gradients are divided by the supervised tokens of the whole global
batch when Megatron finalises them. So neither the micro-batch size nor the number of ranks nor uneven masks change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from engine.data.loader import Batch
from engine.model import fp8, moe, sequence
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap


@dataclass(frozen=True)
class LossSums:
    """Over a global batch, all ranks: summed cross-entropy (nats), supervised tokens, exact predictions among them.

    ``router``: of a model with experts, in training.
    """

    loss_sum: float
    tokens: int
    correct: int
    router: moe.RouterStats | None = None

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens if self.tokens else float("nan")

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else float("nan")

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.loss_sum + other.loss_sum, self.tokens + other.tokens, self.correct + other.correct)


def _forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module):
    """Megatron's contract: one micro-batch forward -> (output, function of the output that gives the loss)."""
    batch = next(data_iterator)
    bare = unwrap(model)
    (tokens, positions, labels, mask), rows = sequence.share(batch, bare.pg_collection.cp,
                                                             next(model.parameters()).device)
    if bare.position_embedding_type != "none":  # Transformer Engine's attention shares rows in the same chunks itself
        assert rows is None or rows.documents_b is None, "packed rows need the engine's attention"
        rows = None
    output = model(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=rows)

    def loss_function(output: torch.Tensor):
        # An integer, since Megatron adds the counts in int32; masks are 0 or 1.
        count = (mask > 0).sum().to(torch.int)
        sums = torch.stack([output[0].detach().double(), count.double(), output[1].detach().double()])
        return output[0], count, sums

    return output, loss_function


def _supervised(batches: list[Batch], groups: Groups) -> int:
    """Tokens that count in the loss, over all data-parallel ranks; context ranks have the same batches."""
    count = torch.stack([(batch.loss_mask_bs > 0).sum() for batch in batches]).sum().to(groups.device)
    if groups.data_parallel_size > 1:
        dist.all_reduce(count, group=groups.pg.dp)
    return int(count.item())


def run(
    chunks: list[Any],
    batches: Iterable[Batch],
    groups: Groups,
    *,
    num_micro_batches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
) -> LossSums:
    """Forward (and backward) over this rank's micro-batches; the sums are those of all ranks.

    Every virtual pipeline chunk reads the same micro-batches, so they are drawn once and replayed to each.
    """
    drawn = list(batches)
    assert len(drawn) == num_micro_batches, (len(drawn), num_micro_batches)
    counts_experts = not forward_only and chunks[0].config.num_moe_experts is not None
    sequences = num_micro_batches * micro_batch_size * groups.data_parallel_size
    if counts_experts:
        moe.prepare(chunks, supervised=_supervised(drawn, groups), sequences=sequences, tokens=sequences * seq_length)
    iterators = [iter(drawn) for _ in chunks]
    with fp8.global_batch(chunks, training=not forward_only):
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    sums = torch.zeros(3, dtype=torch.float64, device=groups.device)
    if groups.is_loss_rank:  # one tensor rank of the last stage speaks for its data-parallel replica
        sums += torch.stack(list(outputs)).sum(0)
    if groups.world_size > 1:
        dist.all_reduce(sums)
    loss_sum, tokens, correct = sums.tolist()
    router = None
    if counts_experts:
        router = moe.collect(chunks, groups, sequences=sequences, tokens=sequences * seq_length)
    return LossSums(loss_sum, int(tokens), int(correct), router)
