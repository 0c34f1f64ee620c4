"""Log-probabilities of given tokens from hidden states (preference and reward stages), over tensor-parallel ranks.

n tokens, h hidden, v this tensor rank's rows of the (padded) vocabulary. The work is
``engine_kernels.linear_cross_entropy``'s; this file knows the process group.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.losses.vocabulary import shard
from engine_kernels.linear_cross_entropy import linear_log_probs


class _Rows(torch.autograd.Function):
    """Some rows of x [n, h], each at most once: the gradient is a copy, where indexing's own adds with atomics."""

    @staticmethod
    def forward(ctx: Any, x_nh: torch.Tensor, rows_k: torch.Tensor) -> torch.Tensor:
        ctx.n = x_nh.shape[0]
        ctx.save_for_backward(rows_k)
        return x_nh.index_select(0, rows_k)

    @staticmethod
    def backward(ctx: Any, grad_kh: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (rows_k,) = ctx.saved_tensors
        return grad_kh.new_zeros(ctx.n, grad_kh.shape[1]).index_copy_(0, rows_k, grad_kh), None


def token_log_probs(
    hidden_nh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_n: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: Any = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(label) [n] of each token (fp32, nats, differentiable), and where asked its distribution's entropy [n].

    Negative labels are left out: 0, and no gradient. ``vocab_size`` is the real vocabulary: padding rows beyond it take
    no probability. Under tensor parallelism ``weight_vh`` holds this rank's rows, the results are the same on every
    rank and the gradient of ``hidden_nh`` is this rank's share. The distribution is softmax(logits / ``temperature``).
    The entropy has no gradient. Under ``torch.no_grad`` (a reference model) nothing is kept.

    Where a quarter of the labels or more are left out (prompts, padding), logits are made of the others alone. That
    waits for a GPU to count them, which costs less than the products it spares.
    """
    def head(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return linear_log_probs(hidden, weight_vh, labels, temperature=temperature, entropy=entropy,
                                chunk_tokens=chunk_tokens, impl=impl, **shard(weight_vh.shape[0], vocab_size, tp_group))

    rows_k = (labels_n >= 0).nonzero()[:, 0]
    if not 0 < len(rows_k) <= 0.75 * len(labels_n):
        return head(hidden_nh, labels_n)
    found = head(_Rows.apply(hidden_nh, rows_k), labels_n[rows_k])  # type: ignore[arg-type]
    logps_n, entropy_n = (None if x_k is None else x_k.new_zeros(len(labels_n)).index_copy(0, rows_k, x_k)
                          for x_k in found)
    assert logps_n is not None
    return logps_n, entropy_n
