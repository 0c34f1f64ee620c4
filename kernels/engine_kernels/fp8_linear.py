"""Matrix products of 8-bit floats, and a linear layer made of them.

    y = x wᵀ,   dx = dy w,   dw = dyᵀ x        with x and w in e4m3, dy in e5m2, sums in fp32

    n tokens, k input features, m output features

The GPU multiplies rows by rows (A row-major, B column-major): forward takes x [n, k] and w [m, k], dx takes dy [n, m]
and wᵀ [k, m], dw takes dyᵀ [m, n] and xᵀ [k, n], so all three tensors are also needed transposed. Transposes are
padded to multiples of 16 tokens with zeros, which add nothing. torch._scaled_mm multiplies on GPUs of capability 8.9
and above. Elsewhere the same 8-bit numbers are multiplied in fp32 (emulation: for proof, not speed).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from engine_kernels import jit
from engine_kernels.fp8 import ALIGNMENT, E4M3, E5M2, SQUARE, Quantised, aligned, grid, quantise, transpose_reference
from engine_kernels.jit import launch, tl, triton
from engine_kernels.linear import matmul_nt

_log = logging.getLogger("engine_kernels")
scaled_mm: Any = getattr(torch, "_scaled_mm")  # noqa: B009 (private for pyright)


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why products are emulated on ``device``; empty where it multiplies 8-bit floats itself."""
    if device.type != "cuda":
        return f"{device.type} does not multiply 8-bit floats"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return ""
    return f"compute capability {capability[0]}.{capability[1]} is below 8.9"


@functools.cache
def announce(device: torch.device) -> None:
    """Says once where products run."""
    found = obstacle(device)
    _log.info("fp8: %s", f"emulated ({found}): the same 8-bit numbers, multiplied in fp32; a proof, not faster"
              if found else "products by torch._scaled_mm")


def product_reference(a_mk: Tensor, scale_a: Tensor, b_nk: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype
                      ) -> Tensor:
    """``product`` in fp32."""
    y_mn = matmul_nt(a_mk.float(), b_nk.float())
    return (y_mn * (scale_a[:, None] * scale_b[None, :])).to(out_dtype)


def product(a_mk: Tensor, scale_a: Tensor, b_nk: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype,
            fast: bool = False) -> Tensor:
    """(a * scale_a) (b * scale_b)ᵀ: [m, k] and [n, k] in fp8, scales both [1] or [m] and [n], -> [m, n].

    ``fast``: the GPU may add up with fewer bits (enough for a forward pass). k and n are multiples of 16 on a GPU.
    Raises ValueError naming the argument.
    """
    if a_mk.shape[1] != b_nk.shape[1]:
        raise ValueError(f"product: b has {b_nk.shape[1]} columns, a has {a_mk.shape[1]}")
    rowwise = scale_a.shape != (1,) or scale_b.shape != (1,)
    for name, scale, rows in (("scale_a", scale_a, len(a_mk)), ("scale_b", scale_b, len(b_nk))):
        if rowwise and scale.shape != (rows,):
            raise ValueError(f"product: {name} has shape {tuple(scale.shape)}, needs ({rows},), or (1,) as the other's")
    if not a_mk.numel() or not b_nk.numel():
        return torch.zeros(len(a_mk), len(b_nk), dtype=out_dtype, device=a_mk.device)
    if jit.only_compiles():
        return torch.empty(len(a_mk), len(b_nk), dtype=out_dtype, device=a_mk.device)
    if obstacle(a_mk.device):
        return product_reference(a_mk, scale_a, b_nk, scale_b, out_dtype=out_dtype)
    for name, size in (("a and b have {} columns", b_nk.shape[1]), ("b has {} rows", len(b_nk))):
        if size % ALIGNMENT:
            raise ValueError(f"product: {name.format(size)}, needs a multiple of {ALIGNMENT}")
    if not rowwise:
        return scaled_mm(a_mk, b_nk.t(), scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=fast)
    # With a scale for each row only bf16 comes out everywhere.
    return scaled_mm(a_mk, b_nk.t(), scale_a[:, None], scale_b[None, :], out_dtype=torch.bfloat16,
                     use_fast_accum=fast).to(out_dtype)


@triton.jit
def _transpose_kernel(q_ptr, qt_ptr, n, k, m, q_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(k, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < k)[None, :]
    q = tl.load(q_ptr + row[:, None] * q_stride + column[None, :], mask=inside, other=0)
    place = column.to(tl.int64)[:, None] * m + row[None, :]
    tl.store(qt_ptr + place, tl.trans(q), mask=(column < k)[:, None] & (row < m)[None, :])


@torch.library.custom_op("engine_kernels::fp8_transpose", mutates_args=())
def _transpose(q_nk: Tensor) -> Tensor:
    """Of bytes."""
    q_km = _transposed(q_nk)
    n, k = q_nk.shape
    launch(_transpose_kernel, grid(aligned(n), k, SQUARE), q_nk, q_km, n, k,
           aligned(n), q_nk.stride(0), **SQUARE)
    return q_km


@_transpose.register_fake
def _transposed(q_nk):
    return q_nk.new_empty(q_nk.shape[1], aligned(q_nk.shape[0]))


def transpose(q_nk: Tensor, *, impl: str = "auto") -> Tensor:
    """fp8 [n, k] -> [k, n rounded up to 16], zeros behind. Unit stride in q's last dimension."""
    if q_nk.dim() != 2 or q_nk.dtype not in (E4M3, E5M2):
        raise ValueError(f"transpose: q is {q_nk.dtype} of shape {tuple(q_nk.shape)}, needs an fp8 matrix")
    if impl == "torch" or (impl == "auto" and (q_nk.device.type != "cuda" or jit.obstacle(q_nk))):
        return transpose_reference(q_nk)
    if found := jit.obstacle(q_nk):
        raise RuntimeError(f'transpose: impl="{impl}" cannot run: q is {found}; use impl="auto" or "torch"')
    return torch.ops.engine_kernels.fp8_transpose(q_nk.view(torch.uint8)).view(q_nk.dtype)


class _Linear(torch.autograd.Function):
    """Scales of the moment (current scaling); of the input only its 8-bit transpose is kept."""

    @staticmethod
    def forward(ctx, x, weight_mk, rowwise, impl):
        def to_fp8(tensor: Tensor, dtype: torch.dtype) -> Quantised:
            return quantise(tensor, dtype, rowwise=rowwise, transpose=True, impl=impl)

        x_q, w_q = to_fp8(x.flatten(0, -2), E4M3), to_fp8(weight_mk, E4M3)
        ctx.save_for_backward(x_q.q_km, x_q.scale_k, w_q.q_km, w_q.scale_k)
        ctx.to_fp8, ctx.shape, ctx.weight_dtype = to_fp8, x.shape, weight_mk.dtype
        y_nm = product(x_q.q_nk, x_q.scale, w_q.q_nk, w_q.scale, out_dtype=x.dtype, fast=True)
        return y_nm.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        xt, xt_scale, wt, wt_scale = ctx.saved_tensors
        dy_q = ctx.to_fp8(dy.flatten(0, -2), E5M2)
        dx = product(dy_q.q_nk, dy_q.scale, wt[:, : dy.shape[-1]], wt_scale, out_dtype=dy.dtype).view(ctx.shape)
        return dx, product(dy_q.q_km, dy_q.scale_k, xt, xt_scale, out_dtype=ctx.weight_dtype), None, None


def fp8_linear(x: Tensor, weight_mk: Tensor, *, rowwise: bool = False, impl: str = "auto") -> Tensor:
    """x [..., k] weightᵀ -> [..., m] with products in fp8, forward and backward, scaled by what the tensors hold now.

    On a GPU k and m must be multiples of 16. ``impl``: of the quantisation. Raises ValueError for a weight that is not
    [m, k]. The engine's layers (engine/model/fp8.py) do the same around their communication.
    """
    if weight_mk.dim() != 2 or weight_mk.shape[1] != x.shape[-1]:
        raise ValueError(f"fp8_linear: weight has shape {tuple(weight_mk.shape)}, needs (m, {x.shape[-1]})")
    for name, size in (("x has {} columns", x.shape[-1]), ("weight has {} rows", len(weight_mk))):
        if size % ALIGNMENT and not obstacle(x.device):
            raise ValueError(f"fp8_linear: {name.format(size)}, needs a multiple of {ALIGNMENT}")
    return _Linear.apply(x, weight_mk, rowwise, impl)
