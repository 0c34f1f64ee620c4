"""Attention by torch's flash kernels (Dao 2023, arXiv:2307.08691) with what they lack: sinks, and rows of documents.

Any kernel that returns lse, the log of each query's denominator, can do sinks. With lse' = log(exp(lse) + exp(sink)):
    out' = out * exp(lse - lse'),  dsink = -sum over queries of exp(sink - lse') * (dout . out')
and the kernel's own backward pass, given out' and lse' for out and lse, returns dq, dk and dv: it recomputes the
probabilities as exp(score - lse'), and a sink's value is 0.

b batch, h query heads, g key/value groups, s queries, t keys, d head dimension; n packed queries, m packed keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine_kernels.attention_sdpa import Call, visible
from engine_kernels.documents import Documents, Packed


class Kernel(Protocol):
    """A flash kernel: out [..., s, h, d] for lse [..., h, s], and what else its backward pass wants."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]: ...

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: list[Tensor]
                 ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Varlen:
    """The kernel behind torch.nn.attention.varlen: q [n, h, d], k and v [m, g, d], lse [h, n].

    Where FlashAttention-3 or 4 was registered with torch, these two operators are theirs.
    """

    scale: float
    window: int | None
    dropout: float
    lengths: Packed

    def _options(self) -> dict[str, Any]:
        left = -1 if self.window is None else self.window - 1  # keys before the query's own
        return {"scale": self.scale, "window_size_left": left, "window_size_right": 0}

    def _lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self.lengths.cu_queries, self.lengths.cu_keys, self.lengths.max_queries, self.lengths.max_keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._lengths(), self.dropout, True, False, **self._options())
        return out, lse, [rng_state, unused]

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: list[Tensor]
                 ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out, lse, *self._lengths(), self.dropout, True, *state, **self._options())


@dataclass(frozen=True, eq=False)
class OnCpu:
    """torch's flash kernel for CPUs: q [b, s, h, d], k and v [b, t, g, d], lse [b, h, s]. No dropout."""

    scale: float
    mask: Tensor | None  # additive [s, t]; None: s == t

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, self.mask is None, attn_mask=self.mask, scale=self.scale)
        return out.transpose(1, 2), lse, []

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: list[Tensor]
                 ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, 0.0, self.mask is None, attn_mask=self.mask,
            scale=self.scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks_h, kernel):
        out, lse, state = kernel.forward(q, k, v)
        if sinks_h is not None:
            merged = torch.logaddexp(lse, sinks_h.to(lse.dtype)[:, None])
            out.mul_((lse - merged).exp_().transpose(-1, -2)[..., None])
            lse = merged
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, out, lse, sinks_h, *state)
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        q, k, v, out, lse, sinks_h, *state = ctx.saved_tensors
        grads = ctx.kernel.backward(dout, q, k, v, out, lse, state)
        dsinks = None
        if sinks_h is not None:
            # exp(sink - lse') [..., h, s], dout . out' [..., s, h]
            share = torch.exp(sinks_h.to(lse.dtype)[:, None] - lse)
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
            dsinks = -(share * delta).sum(-1).reshape(-1, len(sinks_h)).sum(0).to(sinks_h.dtype)
        return (*grads, dsinks, None)


def merged(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, kernel: Kernel) -> Tensor:
    """`kernel` on q, k and v in its own layout, beside the sinks [h]; differentiable in all four."""
    return _Flash.apply(q, k, v, sinks, kernel)  # type: ignore[return-value]


class _PackKeys(torch.autograd.Function):
    """Runs (row, first, end) of keys [b, g, t, d], one behind another: [m, g, d]. A key may be in several runs; its
    gradients are added in their order."""

    @staticmethod
    def forward(ctx, x_bgtd, runs):
        ctx.runs, ctx.shape = runs, x_bgtd.shape
        return torch.cat([x_bgtd[row, :, first:end].transpose(0, 1) for row, first, end in runs])

    @staticmethod
    def backward(ctx, dx_mgd):  # type: ignore[override]
        b, g, t, d = ctx.shape
        dx_btgd, at = dx_mgd.new_zeros(b, t, g, d), 0
        for row, first, end in ctx.runs:
            dx_btgd[row, first:end] += dx_mgd[at : at + end - first]
            at += end - first
        return dx_btgd.transpose(1, 2), None


def packed(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Any, Any, Packed]:
    """-> q [n, h, d], k and v [m, g, d], their lengths (documents.Packed); plain rows are one document each."""
    (b, _, s, _), t = q.shape, k.shape[2]
    documents = call.documents
    if documents is None:
        documents = _rows(b, s, t)
    lengths = documents.packed(call.window, q.device)
    if lengths.keys == [(row, 0, t) for row in range(b)]:
        k_mgd, v_mgd = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    else:
        k_mgd, v_mgd = (_PackKeys.apply(x, lengths.keys) for x in (k, v))
    return q.transpose(1, 2).flatten(0, 1), k_mgd, v_mgd, lengths


_plain: dict[tuple[int, int, int], Documents] = {}


def _rows(b: int, s: int, t: int) -> Documents:
    """b rows of one document of t positions, of which the last s are queries; a few of these are kept."""
    if (b, s, t) not in _plain:
        while len(_plain) >= 64:
            _plain.pop(next(iter(_plain)))
        _plain[b, s, t] = Documents([[0, t]] * b, [(t - s, t)])
    return _plain[b, s, t]


def varlen(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """q [b, h, s, d], k and v [b, g, t, d] -> [b, h, s, d], documents, window and sinks in one call; on a GPU."""
    (b, _, s, d), padding = q.shape, -q.shape[-1] % 8  # the kernels take multiples of 8
    if padding:
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v))  # copies
    q_nhd, k_mgd, v_mgd, lengths = packed(q, k, v, call)
    kernel = Varlen(call.scale, call.window, call.dropout, lengths)
    return merged(q_nhd, k_mgd, v_mgd, call.sinks, kernel)[..., :d].unflatten(0, (b, s)).transpose(1, 2)


def flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """q [b, h, s, d], k and v [b, g, t, d] -> [b, h, s, d] with sinks; no documents, and a window by a mask [s, t]."""
    s, t, mask = q.shape[2], k.shape[2], None
    if call.window is not None or s < t:
        mask = torch.zeros(s, t, dtype=q.dtype).masked_fill_(~visible(s, t, call.window, q.device), -math.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return merged(q, k, v, call.sinks, OnCpu(call.scale, mask)).transpose(1, 2)
