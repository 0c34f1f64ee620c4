"""SwiGLU (Shazeer 2020, arXiv:2002.05202), gate and up projections fused in one tensor.

    y = silu(gate) * up,  gate = x[..., :f],  up = x[..., f:],  silu(g) = g * s,  s = sigmoid(g)

Backward recomputes s instead of storing it: dgate = dy * up * s * (1 + gate * (1 - s)),  dup = dy * gate * s.

Shapes: n rows (all leading dimensions), f feed-forward width. Arithmetic in fp32, rounded once to x's dtype. C++:
csrc/cpu/swiglu.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch


def swiglu_reference(x_n2f: Tensor) -> Tensor:
    """The formula in plain torch, computed in fp32 (fp64 for fp64 input)."""
    wide = x_n2f if x_n2f.dtype == torch.float64 else x_n2f.float()
    gate, up = wide.chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x_n2f.dtype)


def clamped_swiglu(x_n2f: Tensor, *, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), gate clamped to at most ``limit``, up to [-limit, limit]: GPT-OSS's.

    [..., 2 f] -> [..., f], gate in the first half and up in the second (GPT-OSS's own weights interleave them; source:
    its torch/model.py). Plain torch, in fp32 (fp64 for fp64 input). Raises ValueError if the last dimension is odd.
    """
    if x_n2f.shape[-1] % 2:
        raise ValueError(f"clamped_swiglu: the last dimension must be even, got {x_n2f.shape[-1]}")
    wide = x_n2f if x_n2f.dtype == torch.float64 else x_n2f.float()
    gate, up = wide.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(x_n2f.dtype)


@torch.library.custom_op("engine_kernels::swiglu_fwd", mutates_args=(), device_types="cpu")
def _forward(x: Tensor) -> Tensor:
    """[..., 2 f] -> [..., f], contiguous."""
    f = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], f), dtype=x.dtype)
    if y.numel():
        x_n2f = dispatch.as_rows(x)
        n = x_n2f.shape[0]
        dispatch.extension().swiglu_fwd(
            dispatch.dtype_code(x), x_n2f.data_ptr(), y.data_ptr(), n, f, x_n2f.stride(0), dispatch.num_threads(n * f)
        )
    return y


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("engine_kernels::swiglu_bwd", mutates_args=(), device_types="cpu")
def _backward(dy: Tensor, x: Tensor) -> Tensor:
    """-> dx like x, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    if dx.numel():
        x_n2f, dy_nf = dispatch.as_rows(x), dispatch.as_rows(dy)
        n, f = dy_nf.shape
        dispatch.extension().swiglu_bwd(
            dispatch.dtype_code(x), x_n2f.data_ptr(), dy_nf.data_ptr(), dx.data_ptr(),
            n, f, x_n2f.stride(0), dy_nf.stride(0), dispatch.num_threads(n * f),
        )
    return dx


@_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy: Tensor) -> Tensor:
    return torch.ops.engine_kernels.swiglu_bwd(dy, *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def swiglu(x_n2f: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up for x [..., 2 f], gate in the first half and up in the second -> [..., f].

    fp32 or bf16 for the C++ kernel, any float dtype for torch. Raises ValueError if the last dimension is odd.
    """
    if x_n2f.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension must be even, got {x_n2f.shape[-1]}")
    if dispatch.choose(impl, "swiglu", {"x": x_n2f}, kernels=("cpu",)) == "torch":
        return swiglu_reference(x_n2f)
    return torch.ops.engine_kernels.swiglu_fwd(x_n2f)
