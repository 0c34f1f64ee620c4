"""RMSNorm and gated activations that write their output as e4m3, for a linear layer that multiplies in fp8.

The same numbers as ``rms_norm`` (``add_rms_norm``) or ``swiglu`` followed by ``quantise``: y is rounded to x's dtype,
then to fp8. Only the fp8 is written: n d bytes, where y and its quantisation move 2 n d (written) + 2 n d (read) + n d.
Tensorwise the scale is known beforehand, and the maximum of this output is measured for later steps; rowwise a program
has whole rows, and scales them by themselves. Gradients are those of ``rms_norm`` and ``swiglu``.

Shapes: n rows, d hidden, f feed-forward width. See ``engine_kernels.fp8`` for scales and maxima.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine_kernels import dispatch, fp8, jit
from engine_kernels.fp8 import E4M3, Quantised, raise_to, scale_from, to_fp8_bits
from engine_kernels.jit import launch, tl, triton
from engine_kernels.rms_norm import rms_norm_reference
from engine_kernels.swiglu import swiglu_reference


class Normed(NamedTuple):
    """``q``: of the normalised rows. ``total``: x + residual (x itself without); ``rstd_n``: what backward needs."""

    q: Quantised
    total: Tensor
    rstd_n: Tensor


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, q_ptr, total_ptr, rstd_ptr, scale_ptr, measured_ptr, n, d, x_stride,
    residual_stride, eps, offset, ADD: tl.constexpr, ROWWISE: tl.constexpr, MEASURE: tl.constexpr,
    POWER_OF_2: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < d)[None, :]
    place = row[:, None] * d + column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / d + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < n)
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0).to(tl.float32) + offset
    y = (x * rstd[:, None] * weight[None, :]).to(x_ptr.dtype.element_ty).to(tl.float32)
    y = tl.where(inside, y, 0.0)
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if ROWWISE:
        scale = scale_from(tl.max(bits, 1), True, POWER_OF_2)
        tl.store(scale_ptr + row, scale, mask=row < n)
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    else:
        if MEASURE:
            raise_to(measured_ptr, tl.max(bits), True)
        inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    tl.store(q_ptr + place, to_fp8_bits(y * inverse, True, NATIVE), mask=inside)


@triton.jit
def _activated(x_ptr, row, column, n, f, x_stride, ALPHA: tl.constexpr, LIMIT: tl.constexpr, CLAMPED: tl.constexpr):
    """A block of ``swiglu``'s output, rounded to x's dtype; zeros outside."""
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = x_ptr + row[:, None] * x_stride + column[None, :]
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + f, mask=inside, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
    y = gate / (1.0 + tl.exp(-ALPHA * gate)) * up
    return y.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _activation_kernel(
    x_ptr, q_ptr, scale_ptr, measured_ptr, n, f, x_stride, ROWWISE: tl.constexpr, MEASURE: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, CLAMPED: tl.constexpr, POWER_OF_2: tl.constexpr, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Rowwise a program walks twice over its rows, the second time in the cache."""
    if ROWWISE:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        largest = tl.zeros((ROWS,), tl.int32)
        for first in range(0, f, COLUMNS):
            y = _activated(x_ptr, row, first + tl.arange(0, COLUMNS), n, f, x_stride, ALPHA, LIMIT, CLAMPED)
            largest = tl.maximum(largest, tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        scale = scale_from(largest, True, POWER_OF_2)
        tl.store(scale_ptr + row, scale, mask=row < n)
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
        for first in range(0, f, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            y = _activated(x_ptr, row, column, n, f, x_stride, ALPHA, LIMIT, CLAMPED)
            tl.store(q_ptr + row[:, None] * f + column[None, :], to_fp8_bits(y * inverse, True, NATIVE),
                     mask=(row < n)[:, None] & (column < f)[None, :])
    else:
        tiles = tl.cdiv(f, COLUMNS)
        row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
        y = _activated(x_ptr, row, column, n, f, x_stride, ALPHA, LIMIT, CLAMPED)
        if MEASURE:
            raise_to(measured_ptr, tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF), True)
        q = to_fp8_bits(y * tl.div_rn(1.0, tl.load(scale_ptr)), True, NATIVE)
        tl.store(q_ptr + row[:, None] * f + column[None, :], q, mask=(row < n)[:, None] & (column < f)[None, :])


@torch.library.custom_op("engine_kernels::rms_norm_fp8", mutates_args=("measured",))
def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, scale: Tensor | None,
          measured: Tensor | None, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q [n, d], total like x (empty without residual), rstd_n, scale_n (empty where the scale is given)."""
    outputs = _norm_outputs(x, residual, weight, eps, offset, scale, measured, power_of_2)
    q_nd, total, rstd_n, scale_n = outputs
    if not x.numel():
        scale_n.fill_(1.0)
        return outputs
    x_nd, weight_d = dispatch.as_rows(x), weight.contiguous()
    residual_nd = x_nd if residual is None else dispatch.as_rows(residual)
    n, d = x_nd.shape
    columns = jit.next_power_of_2(d)
    rows = max(1, 2048 // columns)
    given = scale_n if scale is None else scale
    launch(_norm_kernel, (jit.cdiv(n, rows),), x_nd, residual_nd, weight_d, q_nd, total, rstd_n, given,
           given if measured is None else measured, n, d, x_nd.stride(0), residual_nd.stride(0), eps, offset,
           ADD=residual is not None, ROWWISE=scale is None, MEASURE=measured is not None, POWER_OF_2=power_of_2,
           NATIVE=fp8.native(), ROWS=rows, COLUMNS=columns, num_warps=min(32, max(4, rows * columns // 512)))
    return outputs


@_norm.register_fake
def _norm_outputs(x, residual, weight, eps, offset, scale, measured, power_of_2):
    n = x.shape[:-1].numel()
    return (x.new_empty((n, x.shape[-1]), dtype=torch.uint8), x.new_empty(0 if residual is None else x.shape),
            x.new_empty(n, dtype=torch.float32), x.new_empty(n if scale is None else 0, dtype=torch.float32))


@torch.library.custom_op("engine_kernels::swiglu_fp8", mutates_args=("measured",))
def _activation(x: Tensor, alpha: float, limit: float | None, scale: Tensor | None, measured: Tensor | None,
                power_of_2: bool) -> tuple[Tensor, Tensor]:
    """-> q [n, f], scale_n (empty where the scale is given)."""
    q_nf, scale_n = outputs = _activation_outputs(x, alpha, limit, scale, measured, power_of_2)
    if not x.numel():
        scale_n.fill_(1.0)
        return outputs
    x_n2f = dispatch.as_rows(x)
    n, f = q_nf.shape
    columns = min(1024, jit.next_power_of_2(f))
    rows = 1 if scale is None else max(1, 2048 // columns)
    programs = jit.cdiv(n, rows) * (1 if scale is None else jit.cdiv(f, columns))
    given = scale_n if scale is None else scale
    launch(_activation_kernel, (programs,), x_n2f, q_nf, given,
           given if measured is None else measured, n, f, x_n2f.stride(0), ROWWISE=scale is None,
           MEASURE=measured is not None, ALPHA=alpha, LIMIT=limit or 0.0, CLAMPED=limit is not None,
           POWER_OF_2=power_of_2, NATIVE=fp8.native(), ROWS=rows, COLUMNS=columns, num_warps=4)
    return outputs


@_activation.register_fake
def _activation_outputs(x, alpha, limit, scale, measured, power_of_2):
    n = x.shape[:-1].numel()
    return (x.new_empty((n, x.shape[-1] // 2), dtype=torch.uint8),
            x.new_empty(n if scale is None else 0, dtype=torch.float32))


def _check(op: str, x: Tensor, scale: Tensor | None, measured: Tensor | None) -> None:
    if scale is not None and (scale.shape != (1,) or scale.dtype != torch.float32):
        raise ValueError(f"{op}: scale is {scale.dtype} of shape {tuple(scale.shape)}, needs torch.float32 of (1,)")
    if measured is not None and (measured.shape != (1,) or measured.dtype != torch.int32):
        raise ValueError(f"{op}: measured is {measured.dtype} of shape {tuple(measured.shape)}, needs torch.int32 of "
                         "(1,)")
    if measured is not None and scale is None:
        raise ValueError(f"{op}: measured is of a whole tensor, but without a scale rows are scaled by themselves")


def _reference(y: Tensor, scale: Tensor | None, measured: Tensor | None, power_of_2: bool) -> Quantised:
    return fp8.quantise_reference(y.reshape(-1, y.shape[-1]), E4M3, rowwise=scale is None, scale=scale,
                                  measured=measured, power_of_2=power_of_2)


def rms_norm_fp8(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, zero_centered: bool = False,
                 scale: Tensor | None = None, measured: Tensor | None = None, power_of_2: bool = True,
                 impl: str = "auto") -> Normed:
    """``quantise(rms_norm(x [+ residual], weight), e4m3)``: with ``scale`` [1] tensorwise, without rowwise.

    Not differentiable; ``engine_kernels::rms_norm_bwd`` takes what comes out. Raises ValueError naming the argument.
    """
    _check("rms_norm_fp8", x, scale, measured)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm_fp8: weight has shape {tuple(weight.shape)}, needs {tuple(x.shape[-1:])}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm_fp8: residual has shape {tuple(residual.shape)}, needs {tuple(x.shape)}")
    same = {"x": x} if residual is None else {"x": x, "residual": residual}
    if fp8.which("rms_norm_fp8", same, impl, weight=weight) == "triton":
        q_nd, total, rstd_n, scale_n = torch.ops.engine_kernels.rms_norm_fp8(
            x, residual, weight, eps, float(zero_centered), scale, measured, power_of_2)
        q = Quantised(q_nd.view(E4M3), scale_n if scale is None else scale)
        return Normed(q, x if residual is None else total, rstd_n)
    total = x if residual is None else x + residual
    y = rms_norm_reference(total, weight, eps=eps, zero_centered=zero_centered)
    rstd_n = torch.rsqrt(total.float().square().mean(-1) + eps).flatten()
    return Normed(_reference(y, scale, measured, power_of_2), total, rstd_n)


def swiglu_fp8(x_n2f: Tensor, *, alpha: float = 1.0, limit: float | None = None, scale: Tensor | None = None,
               measured: Tensor | None = None, power_of_2: bool = True, impl: str = "auto") -> Quantised:
    """``quantise(swiglu(x), e4m3)``: with ``scale`` [1] tensorwise, without rowwise; alpha and limit as in swiglu.py.

    Not differentiable; ``engine_kernels::swiglu_bwd`` takes x. Raises ValueError naming the argument.
    """
    _check("swiglu_fp8", x_n2f, scale, measured)
    if x_n2f.shape[-1] % 2:
        raise ValueError(f"swiglu_fp8: the last dimension must be even, got {x_n2f.shape[-1]}")
    if fp8.which("swiglu_fp8", {"x": x_n2f}, impl) == "triton":
        q_nf, scale_n = torch.ops.engine_kernels.swiglu_fp8(x_n2f, alpha, limit, scale, measured, power_of_2)
        return Quantised(q_nf.view(E4M3), scale_n if scale is None else scale)
    return _reference(swiglu_reference(x_n2f, alpha=alpha, limit=limit), scale, measured, power_of_2)
