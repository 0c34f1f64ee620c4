"""One pass of micro-batches through Megatron's schedules: what training and evaluation share.

The loss is a plain sum over supervised tokens, or over what the objective counts instead; gradients are divided by the
count of the whole global batch when Megatron finalises them. So neither the micro-batch size nor the number of ranks
nor uneven masks change it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from engine.data.loader import Batch
from engine.model import fp8, moe, sequence
from engine.model.objective import NEXT_TOKEN, Objective
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap


@dataclass(frozen=True)
class LossSums:
    """Over a global batch, all ranks: the summed loss, what it is a mean over (``tokens``: supervised tokens, or as the
    objective says), how many of these were right, and the objective's further sums.

    ``router``: of a model with experts, in training.
    """

    loss_sum: float
    tokens: int
    correct: int
    router: moe.RouterStats | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens if self.tokens else float("nan")

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else float("nan")

    @property
    def means(self) -> dict[str, float]:
        """The further sums over what the loss is a mean over."""
        return {name: value / self.tokens if self.tokens else float("nan") for name, value in self.extra.items()}

    def __add__(self, other: LossSums) -> LossSums:
        names = dict.fromkeys([*self.extra, *other.extra])
        return LossSums(self.loss_sum + other.loss_sum, self.tokens + other.tokens, self.correct + other.correct,
                        extra={name: self.extra.get(name, 0.0) + other.extra.get(name, 0.0) for name in names})


def _forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module, *, objective: Objective, groups: Groups):
    """Megatron's contract: one micro-batch forward -> (output, function of the output that gives the loss)."""
    batch = next(data_iterator)
    bare = unwrap(model)
    (tokens, positions, labels, mask), rows = sequence.share(batch, bare.pg_collection.cp,
                                                             next(model.parameters()).device)
    if bare.position_embedding_type != "none":  # Transformer Engine's attention shares rows in the same chunks itself
        assert rows is None or rows.documents_b is None, "packed rows need the engine's attention"
        rows = None
    output = model(tokens, positions, None, labels=labels, loss_mask=mask > 0 if objective.log_probs else mask,
                   packed_seq_params=rows)
    return output, functools.partial(objective.loss, batch=batch, mask_bs=mask, groups=groups)


def _counted(batches: list[Batch], objective: Objective, groups: Groups) -> int:
    """What the loss is a mean over, of all data-parallel ranks; context ranks have the same batches."""
    count = torch.tensor(sum(objective.count(batch) for batch in batches), device=groups.device)
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
    objective: Objective = NEXT_TOKEN,
) -> LossSums:
    """Forward (and backward) over this rank's micro-batches; the sums are those of all ranks.

    Every virtual pipeline chunk reads the same micro-batches, so they are drawn once and replayed to each.
    """
    drawn = list(batches)
    assert len(drawn) == num_micro_batches, (len(drawn), num_micro_batches)
    counts_experts = not forward_only and chunks[0].config.num_moe_experts is not None
    sequences = num_micro_batches * micro_batch_size * groups.data_parallel_size
    if counts_experts:
        moe.prepare(chunks, supervised=_counted(drawn, objective, groups), sequences=sequences,
                    tokens=sequences * seq_length)
    iterators = [iter(drawn) for _ in chunks]
    with fp8.global_batch(chunks, training=not forward_only):
        outputs = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, objective=objective, groups=groups),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    sums = torch.zeros(3 + len(objective.extra), dtype=torch.float64, device=groups.device)
    if groups.is_loss_rank:  # one tensor rank of the last stage speaks for its data-parallel replica
        sums += torch.stack(list(outputs)).sum(0)
    if groups.world_size > 1:
        dist.all_reduce(sums)
    loss_sum, tokens, correct, *further = sums.tolist()
    router = None
    if counts_experts:
        router = moe.collect(chunks, groups, sequences=sequences, tokens=sequences * seq_length)
    return LossSums(loss_sum, int(tokens), int(correct), router, dict(zip(objective.extra, further, strict=True)))
