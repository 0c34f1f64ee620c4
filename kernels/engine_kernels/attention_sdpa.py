"""Attention by torch's scaled_dot_product_attention: windows by blocks, sinks by one more key, documents one by one.

b batch, h query heads, g key/value groups, s queries, t keys, d head dimension, as in attention.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from engine_kernels.documents import Documents

_KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
_BLOCK = 128  # queries at least; smaller blocks of smaller windows would leave the matrix units idle


@dataclass(frozen=True, eq=False)
class Call:
    """What every backend takes beside q, k and v; see attention.causal_attention. `window` is below t, or None."""

    scale: float
    window: int | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    documents: Documents | None = None


def visible(s: int, t: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool [s, t]: those up to its own position, the last `window` of them."""
    mask_st = torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)
    return mask_st if window is None else mask_st.triu(t - s - window + 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: Any, kernel: str) -> Tensor:
    """One call. enable_gqa spares the copies of k and v: 2 to 12% of forward and backward on a CPU."""
    s, t, repeats = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is None and 1 < s < t:
        mask = causal_lower_right(s, t)  # flash attention's own mask on a GPU
    if kernel == "efficient" and repeats > 1:  # the one kernel without grouped queries
        k, v, repeats = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), 1
    with contextlib.nullcontext() if kernel == "torch" else sdpa_kernel(_KERNELS[kernel]):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and s == t, scale=call.scale, dropout_p=call.dropout,
            enable_gqa=repeats > 1)


def _with_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call):
    """The sink as a first key: orthogonal to the others by further dimensions, in one of which each query holds its
    head's logit; its value is zero. So any kernel can do sinks, and their gradient is part of the queries'.

    Dimensions are added up to a multiple of 8, which GPU kernels want.
    """
    b, h, s, d = q.shape
    assert call.sinks is not None
    more = 8 - d % 8
    logits_bhs1 = (call.sinks / call.scale).to(q.dtype)[None, :, None, None].expand(b, h, s, 1)
    q = torch.cat((q, logits_bhs1, q.new_zeros(1).expand(b, h, s, more - 1)), -1)
    k, v = (torch.nn.functional.pad(x, (0, more, 1, 0)) for x in (k, v))
    axis = torch.zeros_like(k[:, :, :1])
    axis[..., d] = 1.0
    k = torch.cat((axis, k[:, :, 1:]), 2)
    return q, k, v, None if mask is None else torch.nn.functional.pad(mask, (1, 0), value=True)


def _banded(q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, call: Call, window: int, kernel: str) -> Tensor:
    """n blocks of c >= `window` queries, each against the 2 c keys that end with its own: O(s c), no [s, t].

    Queries and keys are padded in front to whole blocks; a padded query sees its own (padded) key.
    """
    (b, _, s, d), t, c = q_bhsd.shape, k_bgtd.shape[2], max(window, _BLOCK)
    n = -(-s // c)
    span = (n + 1) * c  # keys that the padded queries see
    q = torch.nn.functional.pad(q_bhsd, (0, 0, n * c - s, 0)).unflatten(2, (n, c)).transpose(1, 2).flatten(0, 1)
    k, v = (torch.nn.functional.pad(x[:, :, max(0, t - span) :], (0, 0, max(0, span - t), 0))
            .unfold(2, 2 * c, c).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k_bgtd, v_bgtd))
    key = torch.arange(2 * c, device=q.device)
    query = torch.arange(c, 2 * c, device=q.device)[:, None]  # the same places, in which the queries are the last c
    real = torch.arange(n, device=q.device)[:, None, None] * c + key >= span - t
    mask = (key <= query) & (key > query - window) & (real | (key == query))
    mask = mask[:, None].repeat(b, 1, 1, 1)
    if call.sinks is not None:
        q, k, v, mask = _with_sink(q, k, v, mask, call)
    out = _sdpa(q, k, v, call, mask, kernel)[..., :d]
    return out.unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)[:, :, n * c - s :]


def sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, kernel: str = "torch") -> Tensor:
    """`kernel`: "cudnn", "flash", "efficient", "math", or "torch" for whichever torch takes."""
    if call.documents is not None:
        return _one_by_one(q, k, v, call, call.documents, kernel)
    if call.window is not None and q.shape[2] > 2 * max(call.window, _BLOCK):
        return _banded(q, k, v, call, call.window, kernel)
    d, mask = q.shape[-1], None
    if call.window is not None:
        mask = visible(q.shape[2], k.shape[2], call.window, q.device)
    if call.sinks is not None:
        q, k, v, mask = _with_sink(q, k, v, mask, call)
    return _sdpa(q, k, v, call, mask, kernel)[..., :d]


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, call: Call, documents: Documents, kernel: str) -> Tensor:
    """One call a segment, put together in memory as [s, b, h, d]."""
    alone, rows = replace(call, documents=None), [[] for _ in documents.boundaries_b]
    for row, query, s, key, t, _ in documents.segments(call.window):
        own_q, own_k, own_v = (x[row : row + 1, :, first : first + length]
                               for x, first, length in ((q, query, s), (k, key, t), (v, key, t)))
        window = call.window if call.window is not None and call.window < t else None
        rows[row].append(sdpa(own_q, own_k, own_v, replace(alone, window=window), kernel).permute(2, 0, 1, 3))
    return torch.cat([torch.cat(parts) for parts in rows], 1).permute(1, 2, 0, 3)
