"""What a stage's loss is: from the model's output on a micro-batch to a sum, what it is a mean over, and metrics."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from engine.data.loader import Batch
from engine.losses.perplexity import perplexity
from engine.parallel.topology import Groups


class Objective(Protocol):
    """``extra``: names of further sums, kept in ``LossSums.extra``.

    ``log_probs``: the model gives each label's log-probability [b, s] in place of the next-token loss and its hits
    (engine/model/gpt.py).
    """

    @property
    def extra(self) -> tuple[str, ...]: ...

    @property
    def log_probs(self) -> bool: ...

    def count(self, batch: Batch) -> int:
        """What the loss is a mean over, of whole rows: every context rank says the same."""
        ...

    def loss(self, output: torch.Tensor, *, batch: Batch, mask_bs: torch.Tensor, groups: Groups
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> the summed loss, its count (int32), and fp64 [loss sum, count, right, *extra] without gradients.

        ``output`` and ``mask_bs`` are this context rank's share of the rows, ``batch`` holds them whole. Counts and
        sums add up over context ranks: what is of a whole row is counted by the first of them.
        """
        ...

    def metrics(self, sums: Any) -> dict[str, float]:
        """Of a global batch's ``LossSums``, beside its loss: names as they are logged behind ``train/`` or ``val/``; in
        training those with a slash of their own (``rewards/chosen``) are logged as they are."""
        ...


class NextToken:
    """Cross-entropy over supervised tokens."""

    extra: tuple[str, ...] = ()
    log_probs = False

    def count(self, batch: Batch) -> int:
        return int((batch.loss_mask_bs > 0).sum())

    def loss(self, output: torch.Tensor, *, batch: Batch, mask_bs: torch.Tensor, groups: Groups
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # An integer, since Megatron adds the counts in int32; masks are 0 or 1.
        count = (mask_bs > 0).sum().to(torch.int)
        sums = torch.stack([output[0].detach().double(), count.double(), output[1:].detach().double().sum()])
        return output[0], count, sums

    def metrics(self, sums: Any) -> dict[str, float]:
        return {"perplexity": perplexity(sums.loss), "accuracy": sums.accuracy}


NEXT_TOKEN = NextToken()
