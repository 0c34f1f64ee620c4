"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), with the residual's sum before it.

    total = x + residual,  y = total * rstd * (weight + offset),  rstd = 1 / sqrt(mean(total^2) + eps)

with offset = 1 if zero_centered else 0. Backward, with g = dy * (weight + offset) and xhat = total * rstd:
    dx = dtotal + rstd * (g - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat

Shapes: n rows (all leading dimensions), d hidden. Only rstd_n is saved beside the inputs. All arithmetic is in fp32
(fp64 for fp64 input); total and y are rounded once to x's dtype. dweight is the sum of one partial sum a thread or
program, in order: deterministic for a number of threads or a GPU. C++: csrc/cpu/rms_norm.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """The formula in plain torch, computed in fp32 (fp64 for fp64 input)."""
    x_wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    scale = weight.to(x_wide.dtype) + float(zero_centered)
    return (x_wide * rstd * scale).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps=eps, zero_centered=zero_centered), total


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, n, d, x_stride, residual_stride, eps, offset,
    ADD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < d)[None, :]
    place = row[:, None] * d + column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
    if ADD:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        total = (x + residual.to(WIDE)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(WIDE)  # what is stored is what is normalised
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / d + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < n)
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0).to(WIDE) + offset
    tl.store(y_ptr + place, (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, n, d, dy_stride, dtotal_stride, x_stride,
    offset, ADD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Each program walks over its blocks of rows and keeps one sum of dweight, which it writes at the end."""
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n)[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < n, other=0.0)
        xhat = x.to(WIDE) * rstd[:, None]
        sums += dy.to(WIDE) * xhat
        # Loaded for every block: from the cache, while registers hold the sums.
        weight = tl.load(weight_ptr + column, mask=column < d, other=0.0).to(WIDE) + offset
        g = dy.to(WIDE) * weight[None, :]
        dx = (g - xhat * (tl.sum(g * xhat, 1) / d)[:, None]) * rstd[:, None]
        if ADD:
            dtotal = tl.load(dtotal_ptr + row[:, None] * dtotal_stride + column[None, :], mask=inside, other=0.0)
            dx += dtotal.to(WIDE)
        tl.store(dx_ptr + row[:, None] * d + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * d + column, tl.sum(sums, 0), mask=column < d)


@triton.jit
def _wide_backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, n, d, dy_stride, dtotal_stride, x_stride,
    offset, ADD: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The same for rows that do not fit the registers: twice over a row, the second time from the cache, where the
    program's sums are as well."""
    for first in range(tl.program_id(0), n, tl.num_programs(0)):
        row = first + tl.zeros((), dtype=tl.int64)
        rstd = tl.load(rstd_ptr + row)
        dots = tl.zeros((COLUMNS,), dtype=WIDE)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < d
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(WIDE) + offset
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(WIDE)
            dots += dy * weight * tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(WIDE)
        mean = tl.sum(dots, 0) * rstd / d
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < d
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(WIDE) + offset
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(WIDE)
            xhat = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(WIDE) * rstd
            dx = (dy * weight - xhat * mean) * rstd
            if ADD:
                dx += tl.load(dtotal_ptr + row * dtotal_stride + column, mask=inside, other=0.0).to(WIDE)
            tl.store(dx_ptr + row * d + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            place = partial_ptr + tl.program_id(0) * d + column
            tl.store(place, tl.load(place, mask=inside, other=0.0) + dy * xhat, mask=inside)


_WIDEST = 8192  # columns of a row that backward holds in registers, beside as many sums


def _blocks(d: int, backward: bool = False) -> dict[str, int]:
    """Rows and columns of a block of at least 2048 elements, and the warps for 16 elements a thread.

    Eight backward from 8192 columns on: two rows and a row of sums in flight would not fit the registers.
    """
    columns = jit.next_power_of_2(d)
    rows = max(1, 2048 // columns)
    elements = 256 if backward and columns >= 8192 else 512
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(32, max(4, rows * columns // elements))}


def _triton_forward(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor, rstd_n: Tensor,
                    eps: float, offset: float) -> None:
    x_nd, weight_d, blocks = dispatch.as_rows(x), weight.contiguous(), _blocks(x.shape[-1])
    residual_nd = x_nd if residual is None else dispatch.as_rows(residual)
    n, d = x_nd.shape
    launch(_forward_kernel, (jit.cdiv(n, blocks["ROWS"]),), x_nd, residual_nd, weight_d, y, total, rstd_n,
           n, d, x_nd.stride(0), residual_nd.stride(0), eps, offset,
           ADD=residual is not None, WIDE=jit.wide(x), **blocks)


def _triton_backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd_n: Tensor, dx: Tensor,
                     offset: float) -> Tensor:
    """-> the programs' sums of dweight, [p, d]."""
    x_nd, dy_nd, weight_d = dispatch.as_rows(x), dispatch.as_rows(dy), weight.contiguous()
    dtotal_nd = dy_nd if dtotal is None else dispatch.as_rows(dtotal)
    n, d = x_nd.shape
    if d <= _WIDEST:
        kernel, make, blocks = _backward_kernel, torch.empty, _blocks(d, backward=True)
    else:
        kernel, make, blocks = _wide_backward_kernel, torch.zeros, {"COLUMNS": 4096, "num_warps": 16}
    programs = min(jit.cdiv(n, blocks.get("ROWS", 1)), jit.multiprocessors(x) * max(1, 32 // blocks["num_warps"]))
    partial_pd = make(programs, d, dtype=rstd_n.dtype, device=x.device)
    launch(kernel, (programs,), dy_nd, dtotal_nd, x_nd, weight_d, rstd_n, dx, partial_pd,
           n, d, dy_nd.stride(0), dtotal_nd.stride(0), x_nd.stride(0), offset,
           ADD=dtotal is not None, WIDE=jit.wide(x), **blocks)
    return partial_pd


def _rows(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x as rows (to be kept alive), their address and stride; zeros for none."""
    if x is None:
        return None, 0, 0
    x_nd = dispatch.as_rows(x)
    return x_nd, x_nd.data_ptr(), x_nd.stride(0)


def _cpu_forward(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor, rstd_n: Tensor,
                 eps: float, offset: float) -> None:
    x_nd, (_kept, residual_at, residual_stride) = dispatch.as_rows(x), _rows(residual)
    weight_d = weight.float().contiguous()
    n, d = x_nd.shape
    dispatch.extension().rms_norm_fwd(
        dispatch.dtype_code(x), x_nd.data_ptr(), residual_at, weight_d.data_ptr(), y.data_ptr(), total.data_ptr(),
        rstd_n.data_ptr(), n, d, x_nd.stride(0), residual_stride, eps, offset, dispatch.num_threads(n * d),
    )


def _cpu_backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd_n: Tensor, dx: Tensor,
                  offset: float) -> Tensor:
    """-> the threads' sums of dweight, [t, d]."""
    x_nd, dy_nd, weight_d = dispatch.as_rows(x), dispatch.as_rows(dy), weight.float().contiguous()
    _kept, dtotal_at, dtotal_stride = _rows(dtotal)
    n, d = x_nd.shape
    threads = dispatch.num_threads(n * d)
    partial_td = torch.empty(threads, d)
    dispatch.extension().rms_norm_bwd(
        dispatch.dtype_code(x), x_nd.data_ptr(), dy_nd.data_ptr(), dtotal_at, weight_d.data_ptr(), rstd_n.data_ptr(),
        dx.data_ptr(), partial_td.data_ptr(), n, d, x_nd.stride(0), dy_nd.stride(0), dtotal_stride, offset, threads,
    )
    return partial_td


@torch.library.custom_op("engine_kernels::rms_norm_fwd", mutates_args=())
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, impl: str
             ) -> tuple[Tensor, Tensor, Tensor]:
    """-> y like x, total like x (empty without a residual), rstd_n fp32 (fp64 for fp64 x); contiguous."""
    y, total, rstd_n = _forward_outputs(x, residual, weight, eps, offset, impl)
    if y.numel() and impl == "triton":
        _triton_forward(x, residual, weight, y, total, rstd_n, eps, offset)
    elif y.numel():
        _cpu_forward(x, residual, weight, y, total, rstd_n, eps, offset)
    return y, total, rstd_n


@_forward.register_fake
def _forward_outputs(x, residual, weight, eps, offset, impl):
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1].numel(), dtype=jit.wide_dtype(x))


@torch.library.custom_op("engine_kernels::rms_norm_bwd", mutates_args=())
def _backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd_n: Tensor, offset: float, impl: str
              ) -> tuple[Tensor, Tensor]:
    """`x`: what was normalised. -> dx like x (contiguous), dweight like weight."""
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    partial = (_triton_backward if impl == "triton" else _cpu_backward)(dy, dtotal, x, weight, rstd_n, dx, offset)
    return dx, partial.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy, dtotal, x, weight, rstd_n, offset, impl):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, ctx.offset, ctx.impl = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(output[1] if ctx.added else x, weight, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy: Tensor | None, dtotal: Tensor | None, _drstd):
    if not ctx.added:
        dtotal = None  # of an empty tensor
    if dy is None:
        return dtotal, dtotal, None, None, None, None
    dx, dweight = torch.ops.engine_kernels.rms_norm_bwd(dy, dtotal, *ctx.saved_tensors, ctx.offset, ctx.impl)
    return dx, dx if ctx.added else None, dweight, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, needs {tuple(x.shape[-1:])}")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False, impl: str = "auto") -> Tensor:
    """Normalise the last dimension of x [..., d] and scale it by weight [d] (plus one if `zero_centered`).

    x is fp32 or bf16 for the C++ kernel, any float dtype otherwise; weight may have a dtype of its own. Returns
    [..., d] in x's dtype. Differentiable in x and weight. Raises ValueError if weight is not [d].
    """
    _check("rms_norm", x, weight)
    chosen = dispatch.choose(impl, "rms_norm", {"x": x}, {"weight": weight})
    if chosen == "torch":
        return rms_norm_reference(x, weight, eps=eps, zero_centered=zero_centered)
    return torch.ops.engine_kernels.rms_norm_fwd(x, None, weight, eps, float(zero_centered), chosen)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + residual [..., d], normalised as by `rms_norm`, and that sum itself (the next residual), in one pass.

    Raises ValueError if residual is not shaped as x or weight is not [d].
    """
    _check("add_rms_norm", x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual has shape {tuple(residual.shape)}, needs {tuple(x.shape)}")
    chosen = dispatch.choose(impl, "add_rms_norm", {"x": x, "residual": residual}, {"weight": weight})
    if chosen == "torch":
        return add_rms_norm_reference(x, residual, weight, eps=eps, zero_centered=zero_centered)
    return torch.ops.engine_kernels.rms_norm_fwd(x, residual, weight, eps, float(zero_centered), chosen)[:2]
