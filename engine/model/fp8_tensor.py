"""An output that exists as fp8 only, on its way from a norm or an activation to the linear layer that multiplies it.

Outwardly it is the tensor that the module returns otherwise: its shape, its dtype, its gradient. Megatron's modules in
between pass it on. The engine's linear layer takes the fp8 out; any other operation gets the numbers back in the
outward dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from engine.model.fp8_scaling import INPUT, LayerScaling
from engine_kernels.fp8_outputs import rms_norm_fp8, swiglu_fp8
from engine_kernels.swiglu import QUICK

_CONSTANTS = {"swiglu": (1.0, None), "quick_geglu": (QUICK, None), "clamped_swiglu": (QUICK, 7.0)}  # alpha, limit


class Fp8Tensor(torch.Tensor):
    """q [n, k] in e4m3 under ``scale`` [1], outwardly [..., k] in a wider dtype."""

    q_nk: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, q_nk: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype):
        make: Any = torch.Tensor._make_wrapper_subclass
        tensor = make(cls, shape, dtype=dtype, device=q_nk.device)
        tensor.q_nk, tensor.scale = q_nk, scale
        return tensor

    def __init__(self, *_: Any):
        pass

    def dequantised(self) -> torch.Tensor:
        return (self.q_nk.float() * self.scale).to(self.dtype).view(self.shape)

    def __repr__(self, **_: Any) -> str:
        return f"Fp8Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, scale={self.scale.item():g})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # what saving for a backward pass does
            return cls(args[0].q_nk, args[0].scale, args[0].shape, args[0].dtype)
        plain_args, plain_kwargs = pytree.tree_map_only(cls, cls.dequantised, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


def _options(scaling: LayerScaling) -> dict[str, Any]:
    return {"scale": scaling.known_scale(INPUT), "measured": scaling.to_measure(INPUT),
            "power_of_2": scaling.whole.recipe.power_of_2_scales, "impl": "triton"}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, scaling):
        normed = rms_norm_fp8(x, weight, eps=eps, residual=residual, **_options(scaling))
        ctx.save_for_backward(normed.total, weight, normed.rstd_n)
        ctx.set_materialize_grads(False)
        return Fp8Tensor(normed.q.q_nk, normed.q.scale, x.shape, x.dtype), None if residual is None else normed.total

    @staticmethod
    def backward(ctx, grad_y, grad_total=None):
        total, weight, rstd_n = ctx.saved_tensors
        if grad_y is None:
            return grad_total, grad_total, None, None, None
        grad_x, grad_weight = torch.ops.engine_kernels.rms_norm_bwd(grad_y, grad_total, total, weight, rstd_n, 0.0,
                                                                    "triton")
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, limit, scaling):
        ctx.save_for_backward(x)
        ctx.alpha, ctx.limit = alpha, limit
        q = swiglu_fp8(x, alpha=alpha, limit=limit, **_options(scaling))
        return Fp8Tensor(q.q_nk, q.scale, x.shape[:-1] + q.q_nk.shape[1:], x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        grad_x, _ = torch.ops.engine_kernels.swiglu_bwd(grad_y, x, None, ctx.alpha, ctx.limit, "triton")
        return grad_x, None, None, None


def fuses(scaling: LayerScaling | None, x: torch.Tensor) -> bool:
    """Whether the input of a layer can be written as fp8 right away: its scale is known, and kernels are Triton's."""
    if scaling is None or scaling.known_scale(INPUT) is None or x.dtype == torch.float64:
        return False
    return scaling.whole.impl == "triton" or (scaling.whole.impl == "auto" and x.device.type == "cuda")


def rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, eps: float,
             scaling: LayerScaling) -> Any:
    """``RMSNorm`` with its output in fp8 -> the output, with a residual also the sum."""
    y, total = _Norm.apply(x, residual, weight, eps, scaling)
    return y if residual is None else (y, total)


def activation(x_sb2f: torch.Tensor, name: str, *, scaling: LayerScaling) -> torch.Tensor:
    """``SwiGLU`` (``name``: which, as in ``engine_kernels.swiglu.ACTIVATIONS``) with its output in fp8."""
    return _Activation.apply(x_sb2f, *_CONSTANTS[name], scaling)
