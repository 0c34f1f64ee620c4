"""Causal attention with grouped queries (Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245).

    out = softmax(scale * q k^T, keys up to the query's own position) v,  query head i reads key group i // (h / g)

The queries are the last of the keys' positions: a chunk of a sequence against what precedes it, or new tokens against
a cache. A window hides all but the last keys up to the query's own (Beltagy et al. 2020, arXiv:2004.05150). A sink is
a logit of the head in the softmax without a value: sum + exp(sink) is the denominator (Xiao et al. 2023,
arXiv:2309.17453; learned in GPT-OSS).

Shapes: b batch, h query heads, g key/value groups (g divides h), s queries, t >= s keys, d head dimension. Beside its
inputs and `out` the forward pass saves lse [b, h, s] fp32, the log of each query's denominator; the backward pass
recomputes the probabilities. The C++ kernel never repeats keys and values, skips tiles above the diagonal and before
the window, and in bf16 multiplies with AVX512_BF16 where there is one (fp32 sums; elsewhere wholly in fp32). Its unit
of parallel work is one (batch, group). C++: csrc/cpu/attention.h.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from engine_kernels import dispatch


def causal_attention_reference(
    q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, scale: float, window: int | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch, with all scores in fp32 (fp64 for fp64 input)."""
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q_bhsd, k_bgtd, v_bgtd))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores_bhst = (q @ k.transpose(-1, -2) * scale).masked_fill(~_visible(q, k, window), -torch.inf)
    if sinks_h is not None:
        sinks_bhs1 = sinks_h.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
        scores_bhst = torch.cat((scores_bhst, sinks_bhs1), -1)
    return (scores_bhst.softmax(-1)[..., : k.shape[2]] @ v).to(q_bhsd.dtype)


def _visible(q_bhsd: Tensor, k_bgtd: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, bool [s, t]: those up to its own position, the last `window` of them."""
    s, t = q_bhsd.shape[2], k_bgtd.shape[2]
    mask_st = torch.ones(s, t, dtype=torch.bool, device=q_bhsd.device).tril(t - s)
    return mask_st if window is None else mask_st.triu(t - s - window + 1)


def _arguments(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, sinks: Tensor | None, window: int,
               backward: bool) -> tuple[list[int], Tensor, int, list[int], list[int], int]:
    """Addresses, workspace, its bytes a thread, sizes, strides, threads."""
    (b, h, s, d), (g, t) = q.shape, k.shape[1:3]
    threads = max(1, min(dispatch.num_threads(b * h * s * min(window, t)), b * g))
    size = dispatch.extension().attention_workspace(dispatch.dtype_code(q), s, t, d, backward)
    workspace = torch.empty(threads * size, dtype=torch.uint8)
    strides = [stride for x in (q, k, v, dout, out) for stride in x.stride()[:3]]
    addresses = [*(x.data_ptr() for x in (q, k, v, dout)), 0 if sinks is None else sinks.data_ptr()]
    return addresses, workspace, size, [b, s, t, min(window, t), g, h // g, d], strides, threads


def _empty_out(q: Tensor) -> Tensor:
    b, h, s, d = q.shape
    return q.new_empty(s, b, h, d).permute(1, 2, 0, 3)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("engine_kernels::causal_attention_fwd", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """-> out [b, h, s, d] (in memory [s, b, h, d]), lse [b, h, s] fp32."""
    out, lse = _empty_out(q), torch.empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        wide = None if sinks is None else sinks.float().contiguous()
        inputs, workspace, size, sizes, strides, threads = _arguments(q, k, v, q, out, wide, window, False)
        dispatch.extension().attention_fwd(
            dispatch.dtype_code(q), inputs, out.data_ptr(), lse.data_ptr(), workspace.data_ptr(), size, sizes, strides,
            scale, threads)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int) -> tuple[Tensor, Tensor]:
    return _empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("engine_kernels::causal_attention_bwd", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=q.dtype) if not dout.numel() else torch.empty(x.shape, dtype=q.dtype)
                  for x in (q, k, v))
    if dout.numel():
        q, k, v, dout = (_unit_stride(x) for x in (q, k, v, dout))
        inputs, workspace, size, sizes, strides, threads = _arguments(q, k, v, dout, out, None, window, True)
        dispatch.extension().attention_bwd(
            dispatch.dtype_code(q), inputs, out.data_ptr(), lse.data_ptr(), [x.data_ptr() for x in (dq, dk, dv)],
            workspace.data_ptr(), size, sizes, strides, scale, threads)
    return dq, dk, dv


@_backward.register_fake
def _(dout, q, k, v, out, lse, scale, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, sinks, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)


def _autograd(ctx, dout: Tensor, _dlse: Tensor):
    q, k, v, sinks, out, lse = ctx.saved_tensors
    grads = torch.ops.engine_kernels.causal_attention_bwd(dout, q, k, v, out, lse, ctx.scale, ctx.window)
    dsinks = None
    if sinks is not None:  # a sink's probability times (its value's part of dout, which is 0, less dout . out)
        share_bhs = torch.exp(sinks.float()[:, None] - lse)
        dsinks = -(share_bhs * (dout.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
    return (*grads, dsinks, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _sdpa(q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, scale: float, dropout: float, mask: Tensor | None) -> Tensor:
    """torch's own kernel. enable_gqa spares the copies of k and v: 2 to 12% of forward and backward here."""
    s, t = q_bhsd.shape[2], k_bgtd.shape[2]
    if mask is None and 1 < s < t:
        mask = causal_lower_right(s, t)  # flash attention's own mask on a GPU
    return torch.nn.functional.scaled_dot_product_attention(
        q_bhsd, k_bgtd, v_bgtd, attn_mask=mask, is_causal=mask is None and s == t, scale=scale, dropout_p=dropout,
        enable_gqa=q_bhsd.shape[1] != k_bgtd.shape[1])


def _with_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks_h: Tensor, scale: float):
    """The sink as a first key: orthogonal to the others by one more dimension, in which each query holds its head's
    logit; its value is zero. So any kernel can do sinks, and their gradient is part of the queries'."""
    b, h, s, _ = q.shape
    q = torch.cat((q, (sinks_h / scale).to(q.dtype)[None, :, None, None].expand(b, h, s, 1)), -1)
    k, v = (torch.nn.functional.pad(x, (0, 1, 1, 0)) for x in (k, v))
    axis = torch.zeros_like(k[:, :, :1])
    axis[..., -1] = 1.0
    k = torch.cat((axis, k[:, :, 1:]), 2)
    return q, k, v, None if mask is None else torch.nn.functional.pad(mask, (1, 0), value=True)


_BLOCK = 128  # queries at least; smaller blocks of smaller windows would leave the matrix units idle


def _banded(q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, scale: float, window: int, sinks: Tensor | None,
            dropout: float) -> Tensor:
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
    if sinks is not None:
        q, k, v, mask = _with_sink(q, k, v, mask, sinks, scale)
    out = _sdpa(q, k, v, scale, dropout, mask)[..., :d]
    return out.unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)[:, :, n * c - s :]


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None,
           dropout: float) -> Tensor:
    """All through torch's kernel."""
    if window is not None and q.shape[2] > 2 * max(window, _BLOCK):
        return _banded(q, k, v, scale, window, sinks, dropout)
    d, mask = q.shape[-1], None
    if window is not None and window < k.shape[2]:
        mask = _visible(q, k, window)
    if sinks is not None:
        q, k, v, mask = _with_sink(q, k, v, mask, sinks, scale)
    return _sdpa(q, k, v, scale, dropout, mask)[..., :d]


def causal_attention(
    q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, *, scale: float | None = None, window: int | None = None,
    sinks: Tensor | None = None, dropout: float = 0.0, impl: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v for q [b, h, s, d], k and v [b, g, t, d], g dividing h -> [b, h, s, d].

    The queries are the last s of the t positions, 1 <= s <= t. scale defaults to 1 / sqrt(d). A query sees the last
    `window` keys up to its own (None: all). `sinks` [h]: a logit of each query head that takes part in the softmax and
    brings no value. Any strides with unit stride in d. The kernel's result is [s, b, h, d] in memory:
    `.permute(2, 0, 1, 3).reshape(s, b, h * d)`, what Megatron's output projection takes, is a view of it. "torch" is
    scaled_dot_product_attention, which also serves dropout. Raises ValueError for shapes that do not fit.
    """
    (b, h, s, d), (g, t) = q_bhsd.shape, k_bgtd.shape[1:3]
    if k_bgtd.shape != (b, g, t, d) or v_bgtd.shape != k_bgtd.shape or g < 1 or h % g or s > t:
        raise ValueError(f"causal_attention: q {tuple(q_bhsd.shape)}, k {tuple(k_bgtd.shape)}, v {tuple(v_bgtd.shape)} "
                         "must be [b, h, s, d], [b, g, t, d] and [b, g, t, d] with g dividing h and s <= t")
    if (window is not None and window < 1) or (sinks is not None and sinks.shape != (h,)):
        raise ValueError(f"causal_attention: window {window} must be positive, and sinks one for each of {h} heads")
    factor = d**-0.5 if scale is None else scale
    if window is not None and t > s + window - 1:  # the others no query sees
        t = s + window - 1
        k_bgtd, v_bgtd = k_bgtd[:, :, -t:], v_bgtd[:, :, -t:]
    if dropout > 0.0 or dispatch.choose(impl, "causal_attention", {"q": q_bhsd, "k": k_bgtd, "v": v_bgtd},
                                           kernels=("cpu",)) == "torch":
        return _torch(q_bhsd, k_bgtd, v_bgtd, factor, window, sinks, dropout)
    return torch.ops.engine_kernels.causal_attention_fwd(
        q_bhsd, k_bgtd, v_bgtd, sinks, factor, t if window is None else window)[0]
