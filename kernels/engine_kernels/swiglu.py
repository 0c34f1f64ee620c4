"""Gated activations of a feed-forward layer, gate and up projections fused in one tensor.

    y = w * gate * sigmoid(alpha * gate) * up,  gate = x[..., :f],  up = x[..., f:]

`swiglu` (Shazeer 2020, arXiv:2002.05202): alpha = 1. `quick_geglu`: alpha = 1.702, the sigmoid's approximation of GELU.
`clamped_swiglu` (GPT-OSS; source: its torch/model.py): gate at most limit, up within [-limit, limit] and 1 more.
w is optional, one weight a row: a mixture of experts' routing probability.

Backward recomputes s = sigmoid(alpha * gate) instead of storing it, and past a clamp the gradient is 0:
    dgate = w dy up s (1 + alpha gate (1 - s)),  dup = w dy gate s,  dw = sum over f of dy gate s up

Shapes: n rows (all leading dimensions), f feed-forward width. Arithmetic in fp32 (fp64 for fp64 input), rounded once to
x's dtype. dw is the sum of one partial sum a block of columns, in order. C++: csrc/cpu/swiglu.h.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton

QUICK = 1.702  # sigmoid(1.702 x) x is GELU to 0.02 (Hendrycks and Gimpel 2016, arXiv:1606.08415)


def swiglu_reference(x_n2f: Tensor, *, alpha: float = 1.0, limit: float | None = None, weights_n: Tensor | None = None
                     ) -> Tensor:
    """The formula in plain torch, computed in fp32 (fp64 for fp64 input); `limit`: the clamped form."""
    wide = x_n2f if x_n2f.dtype == torch.float64 else x_n2f.float()
    gate, up = wide.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
    y = (torch.nn.functional.silu(gate) if alpha == 1 else gate * torch.sigmoid(alpha * gate)) * up
    return (y if weights_n is None else y * weights_n.to(y.dtype)[..., None]).to(x_n2f.dtype)


@triton.jit
def _forward_kernel(
    x_ptr, weights_ptr, y_ptr, n, f, x_stride, column_blocks, WEIGHTED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, CLAMPED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    row = (block // column_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = x_ptr + row[:, None] * x_stride + column[None, :]
    gate = tl.load(place, mask=inside, other=0.0).to(WIDE)
    up = tl.load(place + f, mask=inside, other=0.0).to(WIDE)
    if CLAMPED:  # a NaN fails the comparisons and stays
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
    y = gate / (1.0 + tl.exp(-ALPHA * gate)) * up
    if WEIGHTED:
        y *= tl.load(weights_ptr + row, mask=row < n, other=0.0).to(WIDE)[:, None]
    tl.store(y_ptr + row[:, None] * f + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weights_ptr, dx_ptr, partial_ptr, n, f, dy_stride, x_stride, column_blocks, WEIGHTED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, CLAMPED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    row = (block // column_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = x_ptr + row[:, None] * x_stride + column[None, :]
    raw_gate = tl.load(place, mask=inside, other=0.0).to(WIDE)
    raw_up = tl.load(place + f, mask=inside, other=0.0).to(WIDE)
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
    gate, up = raw_gate, raw_up
    if CLAMPED:
        gate = tl.where(raw_gate > LIMIT, LIMIT, raw_gate)
        up = tl.where(raw_up > LIMIT, LIMIT, tl.where(raw_up < -LIMIT, -LIMIT, raw_up)) + 1.0
    s = 1.0 / (1.0 + tl.exp(-ALPHA * gate))
    if WEIGHTED:
        dw = tl.sum(dy * gate * s * up, 1)
        tl.store(partial_ptr + row * column_blocks + block % column_blocks, dw, mask=row < n)
        dy *= tl.load(weights_ptr + row, mask=row < n, other=0.0).to(WIDE)[:, None]
    dgate, dup = dy * up * s * (1.0 + ALPHA * gate * (1.0 - s)), dy * gate * s
    if CLAMPED:
        dgate = tl.where(raw_gate > LIMIT, 0.0, dgate)
        dup = tl.where((raw_up > LIMIT) | (raw_up < -LIMIT), 0.0, dup)
    place = dx_ptr + row[:, None] * (2 * f) + column[None, :]
    tl.store(place, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(place + f, dup.to(dx_ptr.dtype.element_ty), mask=inside)


def _blocks(n: int, f: int, elements: int) -> tuple[int, int, dict[str, int]]:
    """Programs, blocks of columns, and the block: `elements` in runs of at most 1024 columns, 4 warps."""
    columns = min(1024, jit.next_power_of_2(f))
    rows = max(1, elements // columns)
    column_blocks = jit.cdiv(f, columns)
    return jit.cdiv(n, rows) * column_blocks, column_blocks, {"ROWS": rows, "COLUMNS": columns, "num_warps": 4}


def _constants(x: Tensor, weights: Tensor | None, alpha: float, limit: float | None) -> dict:
    return {"WEIGHTED": weights is not None, "ALPHA": alpha, "LIMIT": limit or 0.0, "CLAMPED": limit is not None,
            "WIDE": jit.wide(x)}


def _triton_forward(x: Tensor, weights: Tensor | None, y: Tensor, alpha: float, limit: float | None) -> None:
    x_n2f, f = dispatch.as_rows(x), y.shape[-1]
    n = x_n2f.shape[0]
    programs, column_blocks, block = _blocks(n, f, 2048)
    weights_n = x_n2f if weights is None else weights.reshape(-1).contiguous()
    launch(_forward_kernel, (programs,), x_n2f, weights_n, y, n, f, x_n2f.stride(0), column_blocks,
           **_constants(x, weights, alpha, limit), **block)


def _triton_backward(dy: Tensor, x: Tensor, weights: Tensor | None, dx: Tensor, alpha: float, limit: float | None
                     ) -> Tensor:
    """-> dw of each row and block of columns, [n, blocks]; empty without weights."""
    x_n2f, dy_nf = dispatch.as_rows(x), dispatch.as_rows(dy)
    n, f = dy_nf.shape
    programs, column_blocks, block = _blocks(n, f, 1024)
    partial = x.new_empty(n if weights is not None else 0, column_blocks, dtype=jit.wide_dtype(x))
    weights_n = x_n2f if weights is None else weights.reshape(-1).contiguous()
    launch(_backward_kernel, (programs,), dy_nf, x_n2f, weights_n, dx, partial, n, f, dy_nf.stride(0), x_n2f.stride(0),
           column_blocks, **_constants(x, weights, alpha, limit), **block)
    return partial


def _cpu_forward(x: Tensor, weights: Tensor | None, y: Tensor, alpha: float, limit: float | None) -> None:
    x_n2f, f = dispatch.as_rows(x), y.shape[-1]
    n, weights_n = x_n2f.shape[0], None if weights is None else weights.float().contiguous()
    dispatch.extension().swiglu_fwd(
        dispatch.dtype_code(x), x_n2f.data_ptr(), 0 if weights_n is None else weights_n.data_ptr(), y.data_ptr(),
        n, f, x_n2f.stride(0), limit is not None, alpha, limit or 0.0, dispatch.num_threads(n * f),
    )


def _cpu_backward(dy: Tensor, x: Tensor, weights: Tensor | None, dx: Tensor, alpha: float, limit: float | None
                  ) -> Tensor:
    x_n2f, dy_nf = dispatch.as_rows(x), dispatch.as_rows(dy)
    n, f = dy_nf.shape
    weights_n = None if weights is None else weights.float().contiguous()
    dweights = torch.empty(n if weights is not None else 0, 1)
    dispatch.extension().swiglu_bwd(
        dispatch.dtype_code(x), x_n2f.data_ptr(), dy_nf.data_ptr(), 0 if weights_n is None else weights_n.data_ptr(),
        dx.data_ptr(), dweights.data_ptr(), n, f, x_n2f.stride(0), dy_nf.stride(0),
        limit is not None, alpha, limit or 0.0, dispatch.num_threads(n * f),
    )
    return dweights


@torch.library.custom_op("engine_kernels::swiglu_fwd", mutates_args=())
def _forward(x: Tensor, weights: Tensor | None, alpha: float, limit: float | None, impl: str) -> Tensor:
    """[..., 2 f] -> [..., f], contiguous."""
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if y.numel():
        (_triton_forward if impl == "triton" else _cpu_forward)(x, weights, y, alpha, limit)
    return y


@_forward.register_fake
def _(x, weights, alpha, limit, impl):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("engine_kernels::swiglu_bwd", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weights: Tensor | None, alpha: float, limit: float | None, impl: str
              ) -> tuple[Tensor, Tensor]:
    """-> dx like x, dweights like weights (empty without); contiguous."""
    dx, dweights = _gradients(dy, x, weights, alpha, limit, impl)
    if not dx.numel():
        return dx, dweights.zero_()
    partial = (_triton_backward if impl == "triton" else _cpu_backward)(dy, x, weights, dx, alpha, limit)
    if weights is not None:
        dweights = partial.sum(1).to(weights.dtype).view(weights.shape)
    return dx, dweights


@_backward.register_fake
def _gradients(dy, x, weights, alpha, limit, impl):
    return x.new_empty(x.shape), x.new_empty(0) if weights is None else weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weights, *ctx.rest = inputs
    ctx.save_for_backward(x, weights)


def _autograd(ctx, dy: Tensor):
    x, weights = ctx.saved_tensors
    dx, dweights = torch.ops.engine_kernels.swiglu_bwd(dy, x, weights, *ctx.rest)
    return dx, None if weights is None else dweights, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _run(op: str, x: Tensor, weights: Tensor | None, alpha: float, limit: float | None, impl: str) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"{op}: the last dimension must be even, got {x.shape[-1]}")
    if weights is not None and weights.shape != x.shape[:-1]:
        raise ValueError(f"{op}: weights_n has shape {tuple(weights.shape)}, needs {tuple(x.shape[:-1])}: one a row")
    chosen = dispatch.choose(impl, op, {"x": x}, {} if weights is None else {"weights_n": weights})
    if chosen == "torch":
        return swiglu_reference(x, alpha=alpha, limit=limit, weights_n=weights)
    return torch.ops.engine_kernels.swiglu_fwd(x, weights, alpha, limit, chosen)


def swiglu(x_n2f: Tensor, *, weights_n: Tensor | None = None, impl: str = "auto") -> Tensor:
    """silu(gate) * up for x [..., 2 f], gate in the first half and up in the second -> [..., f].

    weights_n [...]: one factor a row, of any float dtype. x is fp32 or bf16 for the C++ kernel, any float dtype
    otherwise. Differentiable in both. Raises ValueError if the last dimension is odd or weights_n is not one a row.
    """
    return _run("swiglu", x_n2f, weights_n, 1.0, None, impl)


def quick_geglu(x_n2f: Tensor, *, weights_n: Tensor | None = None, impl: str = "auto") -> Tensor:
    """gate * sigmoid(1.702 * gate) * up; arguments and errors as `swiglu`'s."""
    return _run("quick_geglu", x_n2f, weights_n, QUICK, None, impl)


def clamped_swiglu(x_n2f: Tensor, *, limit: float = 7.0, alpha: float = QUICK, weights_n: Tensor | None = None,
                   impl: str = "auto") -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), gate clamped to at most `limit`, up to [-limit, limit]: GPT-OSS's.

    gate stands in the first half and up in the second (GPT-OSS's own weights interleave them); arguments and errors as
    `swiglu`'s, and ValueError unless limit is positive and finite.
    """
    if not 0 < limit < math.inf:
        raise ValueError(f"clamped_swiglu: limit must be positive and finite, got {limit}")
    return _run("clamped_swiglu", x_n2f, weights_n, alpha, limit, impl)


ACTIVATIONS = {"swiglu": swiglu, "quick_geglu": quick_geglu, "clamped_swiglu": clamped_swiglu}
