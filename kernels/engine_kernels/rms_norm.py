"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = x * rstd * (weight + offset),  rstd = 1 / sqrt(mean(x^2) + eps),  offset = 1 if zero_centered else 0

Backward, with g = dy * (weight + offset) and xhat = x * rstd:
    dx = rstd * (g - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat

Shapes: n rows (all leading dimensions), d hidden. Only rstd_n is saved beside the inputs. All arithmetic is in fp32,
and y is rounded once to x's dtype. dweight is the sum of one partial sum a thread, in order: deterministic for a number
of threads. C++: csrc/cpu/rms_norm.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """The formula in plain torch, computed in fp32 (fp64 for fp64 input)."""
    x_wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    scale = weight.to(x_wide.dtype) + float(zero_centered)
    return (x_wide * rstd * scale).to(x.dtype)


@torch.library.custom_op("engine_kernels::rms_norm_fwd", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """-> y like x (contiguous), rstd_n fp32."""
    y = torch.empty(x.shape, dtype=x.dtype)
    rstd_n = torch.empty(x.shape[:-1].numel(), dtype=torch.float32)
    if y.numel():
        x_nd, weight_d = dispatch.as_rows(x), weight.float().contiguous()
        n, d = x_nd.shape
        dispatch.extension().rms_norm_fwd(
            dispatch.dtype_code(x), x_nd.data_ptr(), weight_d.data_ptr(), y.data_ptr(), rstd_n.data_ptr(),
            n, d, x_nd.stride(0), eps, offset, dispatch.num_threads(n * d),
        )
    return y, rstd_n


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("engine_kernels::rms_norm_bwd", mutates_args=(), device_types="cpu")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd_n: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """-> dx like x (contiguous), dweight like weight."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    x_nd, dy_nd, weight_d = dispatch.as_rows(x), dispatch.as_rows(dy), weight.float().contiguous()
    n, d = x_nd.shape
    threads = dispatch.num_threads(n * d)
    partial_td = torch.empty(threads, d)
    dispatch.extension().rms_norm_bwd(
        dispatch.dtype_code(x), x_nd.data_ptr(), dy_nd.data_ptr(), weight_d.data_ptr(), rstd_n.data_ptr(),
        dx.data_ptr(), partial_td.data_ptr(), n, d, x_nd.stride(0), dy_nd.stride(0), offset, threads,
    )
    return dx, partial_td.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd_n: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy: Tensor | None, _drstd):
    if dy is None:
        return None, None, None, None
    dx, dweight = torch.ops.engine_kernels.rms_norm_bwd(dy, *ctx.saved_tensors, ctx.offset)
    return dx, dweight, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False, impl: str = "auto") -> Tensor:
    """Normalise the last dimension of x [..., d] and scale it by weight [d] (plus one if `zero_centered`).

    x is fp32 or bf16 for the C++ kernel, any float dtype for torch; weight may have a dtype of its own. Returns
    [..., d] in x's dtype. Differentiable in x and weight. Raises ValueError if weight is not [d].
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, needs {tuple(x.shape[-1:])}")
    if dispatch.choose(impl, "rms_norm", x, others=(weight,)) == "torch":
        return rms_norm_reference(x, weight, eps=eps, zero_centered=zero_centered)
    return torch.ops.engine_kernels.rms_norm_fwd(x, weight, eps, float(zero_centered))[0]
