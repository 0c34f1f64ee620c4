"""Losses that learn from pairs of answers against a fixed reference model (Rafailov et al. 2023, arXiv:2305.18290).

With r(y) = log pi(y | x) - log pi_ref(y | x), summed over the tokens of an answer y to the prompt x, D = r(chosen) -
r(rejected), s the logistic function and e the share of pairs that are assumed to be labelled the wrong way:

    dpo      -(1 - e) log s(beta D) - e log s(-beta D)                  e > 0: cDPO (Mitchell 2023)
    robust   [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2 e)    Chowdhury et al. 2024, arXiv:2403.00409
    ipo      (D' - 1 / (2 beta))^2                                      Azar et al. 2023, arXiv:2310.12036

D' is D with each answer's r divided by its own number of tokens. p pairs; the last dimension is [chosen, rejected].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Loss = Literal["dpo", "ipo", "robust"]


def preference_loss(policy_p2: torch.Tensor, reference_p2: torch.Tensor, lengths_p2: torch.Tensor, *,
                    loss: Loss = "dpo", beta: float = 0.1, label_smoothing: float = 0.0
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> each pair's loss [p], and its rewards beta r [p, 2] without gradients.

    ``policy_p2`` and ``reference_p2``: summed log-probabilities (nats) of the answers; ``lengths_p2``: their tokens,
    of which only ipo makes use. Computed in the widest dtype of the first two. Raises ``ValueError`` for a loss that is
    none, beta that is not positive, and e outside [0, 0.5).
    """
    if loss not in ("dpo", "ipo", "robust"):
        raise ValueError(f"preference_loss: loss must be dpo, ipo or robust, not {loss!r}")
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"preference_loss: beta {beta} must be positive, and label_smoothing {label_smoothing} in "
                         "[0, 0.5)")
    ratios_p2 = policy_p2 - reference_p2
    rewards_p2 = beta * ratios_p2.detach()
    if loss == "ipo":
        chosen_p, rejected_p = (ratios_p2 / lengths_p2.clamp(min=1)).unbind(-1)
        return (chosen_p - rejected_p - 1 / (2 * beta)).square(), rewards_p2
    chosen_p, rejected_p = ratios_p2.unbind(-1)
    scaled_p = beta * (chosen_p - rejected_p)
    right_p, wrong_p = F.logsigmoid(scaled_p), F.logsigmoid(-scaled_p)
    e = label_smoothing
    if loss == "robust":
        return (e * wrong_p - (1 - e) * right_p) / (1 - 2 * e), rewards_p2
    return -(1 - e) * right_p - e * wrong_p, rewards_p2


def branch_sums(log_probs_bs: torch.Tensor, branch_bs: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the answers' tokens -> fp64 [p, 2], differentiable, and how many tokens they are, int64 [p, 2].

    ``branch_bs``: 2 i where a token is of pair i's chosen answer, 2 i + 1 of the rejected one, -1 elsewhere. An
    answer's log-probability is in the thousands and beta times a difference of two decides, hence fp64. Each sum is
    taken by itself, in the order of the tokens: no atomics, the same bits every time.
    """
    own_nq = branch_bs.flatten()[:, None] == torch.arange(2 * pairs, device=branch_bs.device)
    wide_n = log_probs_bs.flatten().double()
    sums_q = torch.where(own_nq, wide_n[:, None], 0.0).sum(0)
    return sums_q.view(pairs, 2), own_nq.sum(0).view(pairs, 2)
