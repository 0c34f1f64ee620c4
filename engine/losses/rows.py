"""Tokens that count in a loss, apart from those that do not: prompts and padding need no logits.

n tokens, k of them that count, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch

# Above this share of tokens that count, a copy of them would cost what their absence spares.
_MOST = 0.75


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


def counted(counts_n: torch.Tensor, *, waits: bool) -> torch.Tensor | None:
    """The places [k] of the tokens that count, where computing them alone pays; None for all.

    ``waits``: whether a GPU may be waited for, until the number of them is known.
    """
    if counts_n.device.type != "cpu" and not waits:
        return None
    rows_k = counts_n.nonzero()[:, 0]
    return rows_k if 0 < len(rows_k) <= _MOST * len(counts_n) else None


def take(x_nh: torch.Tensor, rows_k: torch.Tensor) -> torch.Tensor:
    """Those rows, differentiable."""
    return _Rows.apply(x_nh, rows_k)  # type: ignore[return-value]


def put(x_k: torch.Tensor, rows_k: torch.Tensor, n: int) -> torch.Tensor:
    """[n]: the values at their places, zeros elsewhere; differentiable."""
    return x_k.new_zeros(n).index_copy(0, rows_k, x_k)
