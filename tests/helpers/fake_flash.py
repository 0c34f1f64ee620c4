"""CPU stand-ins for kernels of a GPU, with their signatures and layouts: what calls them can be tested without one.

Each works segment by segment in the tensors' own dtype: queries are the last of their segment's keys.
"""

from __future__ import annotations

import itertools
import math

import torch


def _scores(q_shd, k_tgd, scale, left):
    """[h, s, t] with -inf where a query does not look; the keys with heads repeated."""
    (s, h, _), (t, g, _) = q_shd.shape, k_tgd.shape
    scores = torch.einsum("shd,thd->hst", q_shd, k_tgd.repeat_interleave(h // g, 1)) * scale
    seen = torch.ones(s, t, dtype=torch.bool).tril(t - s)
    if left >= 0:
        seen = seen.triu(t - s - left)
    return scores.masked_fill(~seen, -math.inf)


def _segments(cu_q, cu_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    return list(zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True))


def forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
            scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, **_newer):
    assert is_causal
    assert window_size_right == 0
    assert dropout_p == 0
    assert query.shape[-1] % 8 == 0, "the GPU's kernel takes multiples of 8"
    spans = _segments(cum_seq_q, cum_seq_k)
    assert max_q == max(b - a for (a, b), _ in spans)
    assert max_k == max(b - a for _, (a, b) in spans)
    assert (spans[-1][0][1], spans[-1][1][1]) == (len(query), len(key))
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    repeats = query.shape[1] // key.shape[1]
    for (a, b), (c, d) in spans:
        scores = _scores(query[a:b], key[c:d], scale, window_size_left)
        lse[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hst,thd->shd", scores.softmax(-1), value[c:d].repeat_interleave(repeats, 1))
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)


def backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
             rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    """The formula of FlashAttention, with whatever out and logsumexp are handed in."""
    assert is_causal
    assert window_size_right == 0
    assert rng_state.dtype == torch.uint64
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    (h, g), d_head = (query.shape[1], key.shape[1]), query.shape[2]
    for (a, b), (c, d) in _segments(cum_seq_q, cum_seq_k):
        p = (_scores(query[a:b], key[c:d], scale, window_size_left) - logsumexp[:, a:b, None]).exp()
        dp = torch.einsum("shd,thd->hst", grad_out[a:b], value[c:d].repeat_interleave(h // g, 1))
        ds = p * (dp - (grad_out[a:b] * out[a:b]).sum(-1).T[..., None]) * scale
        dq[a:b] = torch.einsum("hst,thd->shd", ds, key[c:d].repeat_interleave(h // g, 1))
        dk[c:d] = torch.einsum("hst,shd->thd", ds, query[a:b]).view(d - c, g, h // g, d_head).sum(2)
        dv[c:d] = torch.einsum("hst,shd->thd", p, grad_out[a:b]).view(d - c, g, h // g, d_head).sum(2)
    return dq, dk, dv


def register() -> torch.library.Library:
    """Both as torch's own operators on the CPU, as long as the result lives."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    return library


class FlashAttn:
    """Stands for the module flash_attn (FA2) or, with ``three``, flash_attn_interface (FA3)."""

    def __init__(self, three: bool):
        self.three, self.called = three, []

    def flash_attn_varlen_func(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
                               softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
                               **dropout):
        assert causal
        assert window_size[1] == 0
        assert set(dropout) == (set() if self.three else {"dropout_p"})
        self.called.append(deterministic)
        parts = []
        for (a, b), (c, d) in _segments(cu_seqlens_q, cu_seqlens_k):
            scores = _scores(q[a:b], k[c:d], softmax_scale, window_size[0])
            values = v[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1)
            parts.append(torch.einsum("hst,thd->shd", scores.softmax(-1), values))
        return (torch.cat(parts), None) if self.three else torch.cat(parts)

    def flash_attn_func(self, q, k, v, **options):
        (b, s), t = q.shape[:2], k.shape[1]
        cu_q, cu_k = ((torch.arange(b + 1) * length).int() for length in (s, t))
        result = self.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, s, t, **options)
        out = result[0] if self.three else result
        return (out.unflatten(0, (b, s)), None) if self.three else out.unflatten(0, (b, s))


class DotProductAttention(torch.nn.Module):
    """Stands for Transformer Engine's."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups, attention_dropout, softmax_scale, qkv_format,
                 attn_mask_type, window_size):
        super().__init__()
        assert attn_mask_type == {"thd": "padding_causal_bottom_right", "bshd": "causal_bottom_right"}[qkv_format]
        self.packed, self.scale, self.window = qkv_format == "thd", softmax_scale, window_size

    def forward(self, q, k, v, cu_seqlens_q=None, cu_seqlens_kv=None, max_seqlen_q=None, max_seqlen_kv=None):
        kernel, options = FlashAttn(three=True), {"softmax_scale": self.scale, "causal": True,
                                                  "window_size": self.window}
        if self.packed:
            out = kernel.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv,
                                                **options)
        else:
            out = kernel.flash_attn_func(q, k, v, **options)
        return out[0].flatten(-2)
