"""Causal attention with grouped queries (Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245).

    out = softmax(scale * q k^T, keys up to the query's own position) v,  query head i reads key group i // (h / g)

Shapes: b batch, h query heads, g key/value groups (g divides h), s sequence, d head dimension. Beside its inputs and
`out` the forward pass saves lse [b, h, s] fp32, the log of each query's sum of exponentials; the backward pass
recomputes the probabilities. The C++ kernel never repeats keys and values, skips tiles above the diagonal, and in bf16
multiplies with AVX512_BF16 where there is one (fp32 sums; elsewhere wholly in fp32). Its unit of parallel work is one
(batch, group). C++: csrc/cpu/attention.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch


def causal_attention_reference(q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, scale: float) -> Tensor:
    """The formula in plain torch, with all scores in fp32 (fp64 for fp64 input)."""
    q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (q_bhsd, k_bgsd, v_bgsd))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    later_ss = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores_bhss = (q @ k.transpose(-1, -2) * scale).masked_fill(later_ss, -torch.inf)
    return (scores_bhss.softmax(-1) @ v).to(q_bhsd.dtype)


def _sdpa(q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, scale: float) -> Tensor:
    """torch's own kernel. enable_gqa spares the copies of k and v: 2 to 12% of forward and backward here."""
    return torch.nn.functional.scaled_dot_product_attention(
        q_bhsd, k_bgsd, v_bgsd, is_causal=True, scale=scale, enable_gqa=q_bhsd.shape[1] != k_bgsd.shape[1])


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, backward: bool
) -> tuple[list[int], Tensor, int, list[int], list[int], int]:
    """Addresses, workspace, its bytes a thread, sizes, strides, threads."""
    (b, h, s, d), g = q.shape, k.shape[1]
    threads = max(1, min(dispatch.num_threads(b * h * s * s), b * g))
    size = dispatch.extension().attention_workspace(dispatch.dtype_code(q), s, d, backward)
    workspace = torch.empty(threads * size, dtype=torch.uint8)
    strides = [stride for t in (q, k, v, dout, out) for stride in t.stride()[:3]]
    return [t.data_ptr() for t in (q, k, v, dout)], workspace, size, [b, s, g, h // g, d], strides, threads


def _empty_out(q: Tensor) -> Tensor:
    b, h, s, d = q.shape
    return q.new_empty(s, b, h, d).permute(1, 2, 0, 3)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("engine_kernels::causal_attention_fwd", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> out [b, h, s, d] (in memory [s, b, h, d]), lse [b, h, s] fp32."""
    out, lse = _empty_out(q), torch.empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        inputs, workspace, size, sizes, strides, threads = _arguments(q, k, v, q, out, False)
        dispatch.extension().attention_fwd(
            dispatch.dtype_code(q), inputs, out.data_ptr(), lse.data_ptr(), workspace.data_ptr(), size, sizes, strides,
            scale, threads)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("engine_kernels::causal_attention_bwd", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype) for t in (q, k, v))
    if dout.numel():
        q, k, v, dout = (_unit_stride(t) for t in (q, k, v, dout))
        inputs, workspace, size, sizes, strides, threads = _arguments(q, k, v, dout, out, True)
        dispatch.extension().attention_bwd(
            dispatch.dtype_code(q), inputs, out.data_ptr(), lse.data_ptr(), [t.data_ptr() for t in (dq, dk, dv)],
            workspace.data_ptr(), size, sizes, strides, scale, threads)
    return dq, dk, dv


@_backward.register_fake
def _(dout, q, k, v, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx, dout: Tensor, _dlse: Tensor):
    return (*torch.ops.engine_kernels.causal_attention_bwd(dout, *ctx.saved_tensors, ctx.scale), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def causal_attention(
    q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v for q [b, h, s, d], k and v [b, g, s, d], g dividing h -> [b, h, s, d].

    scale defaults to 1 / sqrt(d). Any strides with unit stride in d. The kernel's result is [s, b, h, d] in memory:
    `.permute(2, 0, 1, 3).reshape(s, b, h * d)`, what Megatron's output projection takes, is a view of it. "torch" is
    scaled_dot_product_attention. Raises ValueError for shapes that do not fit; queries and keys must be of one length.
    """
    (b, h, s, d), g = q_bhsd.shape, k_bgsd.shape[1]
    if k_bgsd.shape != (b, g, s, d) or v_bgsd.shape != k_bgsd.shape or g < 1 or h % g:
        raise ValueError(f"causal_attention: q {tuple(q_bhsd.shape)}, k {tuple(k_bgsd.shape)}, v {tuple(v_bgsd.shape)} "
                         "must be [b, h, s, d], [b, g, s, d] and [b, g, s, d] with g dividing h")
    factor = d**-0.5 if scale is None else scale
    if dispatch.choose(impl, "causal_attention", q_bhsd, k_bgsd, v_bgsd) == "torch":
        return _sdpa(q_bhsd, k_bgsd, v_bgsd, factor)
    return torch.ops.engine_kernels.causal_attention_fwd(q_bhsd, k_bgsd, v_bgsd, factor)[0]
