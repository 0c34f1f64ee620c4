"""The objective of supervised fine-tuning: next-token cross-entropy, and how many examples were predicted whole.

b rows of a micro-batch, t positions of a row, s of them this context rank's, n documents of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.data.loader import Batch
from engine.model.objective import NextToken
from engine.parallel import context
from engine.parallel.topology import Groups


def documents(batch: Batch) -> tuple[torch.Tensor, int]:
    """Which document of the micro-batch every position is of, int64 [b, t], and how many there are."""
    rows, length = batch.tokens_bs.shape
    if batch.cu_seqlens_b is None:
        return torch.arange(rows)[:, None].expand(rows, length), rows
    lengths_n = torch.cat([boundaries.diff() for boundaries in batch.cu_seqlens_b]).long()
    return torch.repeat_interleave(lengths_n).view(rows, length), len(lengths_n)


class Answers(NextToken):
    """Metrics beside next-token's: ``sequence_accuracy``, the share of documents whose supervised tokens were all
    predicted exactly, of those that have any. A document may be shared by context ranks."""

    extra: tuple[str, ...] = ("documents", "exact")

    def loss(self, output: torch.Tensor, *, batch: Batch, mask_bs: torch.Tensor, groups: Groups
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, count, sums = super().loss(output, batch=batch, mask_bs=mask_bs, groups=groups)
        document_bt, number = documents(batch)
        wrong_bs = ((mask_bs > 0) & (output[1:].detach().view(mask_bs.shape) == 0)).float()
        wrong_n = wrong_bs.new_zeros(number)
        own_bs = context.slice_sequence(document_bt, groups.pg.cp).to(wrong_bs.device, non_blocking=True)
        wrong_n.index_add_(0, own_bs.flatten(), wrong_bs.flatten())  # of ones: the same in every order
        if groups.pg.cp.size() > 1:
            dist.all_reduce(wrong_n, group=groups.pg.cp)
        has_any_n = torch.zeros(number).index_add_(0, document_bt.flatten(), batch.loss_mask_bs.flatten()) > 0
        has_any_n = has_any_n.to(wrong_n.device, non_blocking=True) & (groups.pg.cp.rank() == 0)
        found = torch.stack([has_any_n.sum(), (has_any_n & (wrong_n == 0)).sum()])
        return loss, count, torch.cat([sums, found.double()])

    def metrics(self, sums: Any) -> dict[str, float]:
        found = sums.extra["documents"]
        return super().metrics(sums) | {"sequence_accuracy": sums.extra["exact"] / found if found else float("nan")}


ANSWERS = Answers()
