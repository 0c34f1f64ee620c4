"""Learning from pairs of answers: the objective of DPO and its kin, and the one that scores a reference model.

b rows, s this context rank's tokens of each, p pairs of a micro-batch. A pair lies within one row, whose tokens the
context ranks share; tensor ranks have the same log-probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.config.stages import DpoConfig
from engine.data.loader import Batch
from engine.losses.preference import branch_sums, preference_loss
from engine.parallel import context
from engine.parallel.topology import Groups


class _SumOverRanks(torch.autograd.Function):
    """Forward the sum over a group; backward the gradient as it is. Every rank of the group then takes the same loss of
    the sums, and what reaches its own tokens is the gradient of that loss once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def answer_log_probs(log_probs_bs: torch.Tensor, batch: Batch, mask_bs: torch.Tensor, groups: Groups
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """Of whole answers, from this rank's labels: fp64 [p, 2] summed, and int64 [p, 2] how many. The same on all context
    ranks; collective over them."""
    assert batch.pairs is not None, "the loader gives no pairs"
    branch_bs = context.slice_sequence(batch.pairs.branch_bs, groups.pg.cp).to(log_probs_bs.device, non_blocking=True)
    sums_p2, lengths_p2 = branch_sums(log_probs_bs, branch_bs.masked_fill(mask_bs <= 0, -1), len(batch.pairs.ids_p))
    if groups.pg.cp.size() == 1:
        return sums_p2, lengths_p2
    both = _SumOverRanks.apply(torch.cat([sums_p2, lengths_p2.double()]), groups.pg.cp)
    sums_p2, lengths_p2 = both.chunk(2)  # type: ignore[union-attr]
    return sums_p2, lengths_p2.detach().long()


class Preference:
    """DPO, cDPO, robust DPO or IPO; the loss is a mean over pairs. See engine/losses/preference.py.

    ``reference_n2``: fp64, the reference's summed log-probabilities of every pair of the dataset, by its place in it;
    None where the batches bring their own. A pair is right when its margin is positive.
    """

    extra = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    log_probs = True

    def __init__(self, dpo: DpoConfig, reference_n2: torch.Tensor | None = None):
        self.dpo, self.reference_n2 = dpo, reference_n2

    def count(self, batch: Batch) -> int:
        return 0 if batch.pairs is None else len(batch.pairs.ids_p)

    def loss(self, output: torch.Tensor, *, batch: Batch, mask_bs: torch.Tensor, groups: Groups
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        policy_p2, lengths_p2 = answer_log_probs(output, batch, mask_bs, groups)
        loss_p, rewards_p2 = preference_loss(policy_p2, self._reference(batch).to(policy_p2.device), lengths_p2,
                                             loss=self.dpo.loss, beta=self.dpo.beta,
                                             label_smoothing=self.dpo.label_smoothing)
        margins_p = rewards_p2[:, 0] - rewards_p2[:, 1]
        sums = torch.stack([
            loss_p.detach().sum(), torch.full_like(loss_p, 1.0).sum(), (margins_p > 0).double().sum(),
            *rewards_p2.sum(0), margins_p.sum(), *policy_p2.detach().sum(0)])
        speaks = groups.pg.cp.rank() == 0  # the others have the same
        return loss_p.sum(), torch.tensor(len(loss_p) * speaks, dtype=torch.int, device=output.device), sums * speaks

    def _reference(self, batch: Batch) -> torch.Tensor:
        assert batch.pairs is not None
        if batch.pairs.reference_p2 is not None:
            return batch.pairs.reference_p2.double()
        assert self.reference_n2 is not None, "neither the batch nor the objective knows the reference"
        return self.reference_n2[batch.pairs.ids_p]

    def metrics(self, sums: Any) -> dict[str, float]:
        return {"accuracy": sums.accuracy, "rewards/accuracies": sums.accuracy, **sums.means}


class Scoring:
    """Writes down each pair's summed log-probabilities, fp64 [n, 2], and how often it was scored [n]: on the ranks that
    have them, zero elsewhere. There is no loss."""

    extra: tuple[str, ...] = ()
    log_probs = True

    def __init__(self, pairs: int):
        self.sums_n2, self.times_n = torch.zeros(pairs, 2, dtype=torch.float64), torch.zeros(pairs)

    def count(self, batch: Batch) -> int:
        return 0 if batch.pairs is None else len(batch.pairs.ids_p)

    def loss(self, output: torch.Tensor, *, batch: Batch, mask_bs: torch.Tensor, groups: Groups
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sums_p2, _ = answer_log_probs(output, batch, mask_bs, groups)
        count = self.count(batch) * (groups.pg.cp.rank() == 0)
        if groups.is_loss_rank and count:
            assert batch.pairs is not None
            self.sums_n2[batch.pairs.ids_p] = sums_p2.detach().cpu()
            self.times_n[batch.pairs.ids_p] += 1
        zeros = torch.tensor([0.0, count, 0.0], dtype=torch.float64, device=output.device)
        return zeros[0], zeros[1].int(), zeros

    def metrics(self, sums: Any) -> dict[str, float]:
        return {}
