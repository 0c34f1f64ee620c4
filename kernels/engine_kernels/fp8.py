"""Quantisation to 8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433): e4m3 for values, e5m2 for gradients.

    scale = the smallest power of two with amax <= top * scale   (or amax / top),   q = saturate(round(x / scale))

so x is about q * scale. Tensorwise one scale [1]; rowwise one a row [n] for q_nk and one a column [k] for its transpose
q_km, whose rows are x's columns. Rounding is to the nearest, ties to even: torch's conversion, bit for bit.

Shapes: n rows, k columns, m is n rounded up to 16 (torch._scaled_mm contracts over multiples of 16), the rest zeros.

An amax is held as the bits of a non-negative fp32 number in an int32: they order as the numbers do, so a maximum is
exact and does not depend on the order (atomics, ranks), and 16-bit conversion of a model leaves them alone. NaN is
above everything. amax 0 gives scale 1; an amax that is not finite gives scale NaN, so that everything under it is NaN.
With a scale given beforehand, what is above top * scale saturates (infinity too) and NaN stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TOP_EXPONENT = {E4M3: 8, E5M2: 15}  # top is 1.75 * 2^8 = 448 and 1.75 * 2^15 = 57344
ALIGNMENT = 16


@dataclass(frozen=True)
class Quantised:
    """q_nk with ``scale`` [1] or [n]; where asked for, q_km (m: n rounded up to 16, zeros behind) with ``scale_k``."""

    q_nk: Tensor
    scale: Tensor
    q_km: Tensor | None = None
    scale_k: Tensor | None = None


def aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def amax_bits_reference(x: Tensor, dim: int | None = None) -> Tensor:
    """max |x| of all of x [1], or over ``dim`` of a matrix, as the bits of an fp32 number (int32)."""
    bits = x.detach().float().view(torch.int32) & 0x7FFFFFFF
    if not x.numel():
        return bits.new_zeros(1 if dim is None else x.shape[1 - dim])
    return bits.max().view(1) if dim is None else bits.amax(dim)


def scale_of(amax_bits: Tensor, dtype: torch.dtype, *, power_of_2: bool = True) -> Tensor:
    """The fp32 scale for a maximum of this size."""
    if power_of_2:
        # Up to the next power of two above 1.75 times one: 0x1FFFFF carries a mantissa above .75 into the exponent.
        exponent = ((amax_bits.long() + 0x1FFFFF) >> 23) - _TOP_EXPONENT[dtype]
        scale = (exponent.clamp(min=1) << 23).int().view(torch.float32)
    else:
        scale = (amax_bits.view(torch.float32) / torch.finfo(dtype).max).clamp(min=2.0**-126)
    scale = scale.where(amax_bits > 0, 1.0)
    return scale.where(amax_bits < 0x7F800000, torch.nan)


def _saturated(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    top = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-top, top).to(dtype)


def transpose_reference(q_nk: Tensor) -> Tensor:
    n, k = q_nk.shape
    q_km = torch.zeros(k, aligned(n), dtype=torch.uint8, device=q_nk.device)
    q_km[:, :n] = q_nk.view(torch.uint8).t()
    return q_km.view(q_nk.dtype)


def quantise_reference(x_nk: Tensor, dtype: torch.dtype, *, rowwise: bool = False, transpose: bool = False,
                       scale: Tensor | None = None, amax: Tensor | None = None, measured: Tensor | None = None,
                       power_of_2: bool = True) -> Quantised:
    """``quantise`` in plain torch."""
    x_nk = x_nk.detach()
    if rowwise:
        scale_n = scale_of(amax_bits_reference(x_nk, 1), dtype, power_of_2=power_of_2)
        q_nk = _saturated(x_nk, scale_n[:, None], dtype)
        if not transpose:
            return Quantised(q_nk, scale_n)
        scale_k = scale_of(amax_bits_reference(x_nk, 0), dtype, power_of_2=power_of_2)
        return Quantised(q_nk, scale_n, transpose_reference(_saturated(x_nk, scale_k, dtype)), scale_k)
    if measured is not None:
        measured.copy_(torch.maximum(measured, amax_bits_reference(x_nk)))
    if scale is None:
        scale = scale_of(amax_bits_reference(x_nk) if amax is None else amax, dtype, power_of_2=power_of_2)
    q_nk = _saturated(x_nk, scale, dtype)
    return Quantised(q_nk, scale, *((transpose_reference(q_nk), scale) if transpose else ()))


@triton.jit
def raise_to(amax_ptr, bits, mask):
    """The maximum is kept in memory; most programs read that theirs is not above it, and need no atomic."""
    seen = tl.load(amax_ptr, mask=mask, other=0)
    tl.atomic_max(amax_ptr, bits, mask=mask & (bits > seen), sem="relaxed")


@triton.jit
def scale_from(bits, E4M3: tl.constexpr, POWER_OF_2: tl.constexpr):
    """``scale_of``."""
    if POWER_OF_2:
        exponent = ((bits + 0x1FFFFF) >> 23) - (8 if E4M3 else 15)
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        top = 448.0 if E4M3 else 57344.0
        scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), top), 1.1754943508222875e-38)
    scale = tl.where(bits > 0, scale, 1.0)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def to_fp8_bits(v, E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 -> the byte of the nearest 8-bit float. GPUs before sm_90 lack the conversion, or round twice in Triton."""
    if NATIVE:
        if E4M3:
            return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        MANTISSA: tl.constexpr = 3 if E4M3 else 2  # pyright: ignore[reportAssignmentType]
        BIAS: tl.constexpr = 7 if E4M3 else 15  # pyright: ignore[reportAssignmentType]
        # The bits of 448 and 57344.
        TOP: tl.constexpr = 0x43E00000 if E4M3 else 0x47600000  # pyright: ignore[reportAssignmentType]
        bits = v.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        small = tl.minimum(size, TOP)
        # Below the smallest normal number: added to a number whose last place is the smallest subnormal, fp32 rounds.
        MAGIC: tl.constexpr = (151 - BIAS - MANTISSA) << 23  # pyright: ignore[reportAssignmentType]
        magic = tl.full(small.shape, MAGIC, tl.int32).to(tl.float32, bitcast=True)
        subnormal = (small.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - MAGIC
        odd = (small >> (23 - MANTISSA)) & 1
        normal = (small + (((BIAS - 127) << 23) + (0x7FFFF if E4M3 else 0xFFFFF)) + odd) >> (23 - MANTISSA)
        byte = tl.where(small < ((128 - BIAS) << 23), subnormal, normal)
        byte = tl.where(size > 0x7F800000, 0x7F, byte)
        return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, row_ptr, column_ptr, n, k, x_stride, ROWWISE: tl.constexpr, TRANSPOSE: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(k, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if ROWWISE:
        raise_to(row_ptr + row, tl.max(bits, 1), row < n)
        if TRANSPOSE:
            raise_to(column_ptr + column, tl.max(bits, 0), column < k)
    else:
        raise_to(amax_ptr, tl.max(bits), True)


@triton.jit
def _quantise_kernel(
    x_ptr, given_ptr, given_k_ptr, measured_ptr, q_ptr, qt_ptr, scale_ptr, scale_k_ptr, n, k, m, x_stride,
    SCALED: tl.constexpr, MEASURE: tl.constexpr, ROWWISE: tl.constexpr, TRANSPOSE: tl.constexpr, E4M3: tl.constexpr,
    POWER_OF_2: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """``given``: the scale (SCALED), or the bits of the amax of the tensor or of its rows; ``given_k`` of columns."""
    tiles = tl.cdiv(k, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if MEASURE:
        raise_to(measured_ptr, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), True)
    if ROWWISE:
        scale_n = scale_from(tl.load(given_ptr + row, mask=row < n, other=0), E4M3, POWER_OF_2)
        tl.store(scale_ptr + row, scale_n, mask=(row < n) & (tl.program_id(0) % tiles == 0))
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale_n)[:, None]
    else:
        if SCALED:
            scale = tl.load(given_ptr)
        else:
            scale = scale_from(tl.load(given_ptr), E4M3, POWER_OF_2)
            tl.store(scale_ptr, scale, mask=tl.program_id(0) == 0)
        inverse = tl.div_rn(1.0, scale)
    q = to_fp8_bits(x * inverse, E4M3, NATIVE)
    tl.store(q_ptr + row[:, None] * k + column[None, :], q, mask=inside)
    if TRANSPOSE:
        if ROWWISE:
            scale_k = scale_from(tl.load(given_k_ptr + column, mask=column < k, other=0), E4M3, POWER_OF_2)
            tl.store(scale_k_ptr + column, scale_k, mask=(column < k) & (tl.program_id(0) < tiles))
            q = to_fp8_bits(x * tl.div_rn(tl.full((COLUMNS,), 1.0, tl.float32), scale_k)[None, :], E4M3, NATIVE)
        place = column.to(tl.int64)[:, None] * m + row[None, :]
        tl.store(qt_ptr + place, tl.trans(q), mask=(column < k)[:, None] & (row < m)[None, :])


_WIDE = {"ROWS": 8, "COLUMNS": 512, "num_warps": 4}
SQUARE = {"ROWS": 128, "COLUMNS": 64, "num_warps": 8}  # a transposed row of a block is one line of 128 bytes
_SQUARE_ROWWISE = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}  # two sets of numbers in registers


def native() -> bool:
    """Whether Triton converts fp32 to fp8 in one instruction, rounding once, on the GPU that kernels are made for."""
    if jit.interpreted():
        return True
    driver: Any = triton.runtime.driver.active
    arch = driver.get_current_target().arch
    return isinstance(arch, int) and arch >= 90


def grid(n: int, k: int, blocks: dict[str, int]) -> tuple[int, ...]:
    return (jit.cdiv(n, blocks["ROWS"]) * jit.cdiv(k, blocks["COLUMNS"]),)


def _launch_amax(x_nk: Tensor, out: Tensor, out_k: Tensor, *, rowwise: bool, transpose: bool) -> None:
    n, k = x_nk.shape
    launch(_amax_kernel, grid(n, k, _WIDE), x_nk, out, out, out_k, n, k, x_nk.stride(0), ROWWISE=rowwise,
           TRANSPOSE=transpose, **_WIDE)


@torch.library.custom_op("engine_kernels::fp8_amax", mutates_args=())
def _amax(x: Tensor) -> Tensor:
    out = torch.zeros(1, dtype=torch.int32, device=x.device)
    _launch_amax(dispatch.as_rows(x), out, out, rowwise=False, transpose=False)
    return out


@_amax.register_fake
def _(x):
    return x.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("engine_kernels::fp8_quantise", mutates_args=("measured",))
def _quantise(x: Tensor, dtype: torch.dtype, rowwise: bool, transpose: bool, scale: Tensor | None, amax: Tensor | None,
              measured: Tensor | None, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q_nk, its scale (empty where given), q_km (empty without transpose), its scales (empty where not rowwise).

    Here and in the other ops fp8 goes as bytes, which all of torch's checks can compare.
    """
    outputs = q_nk, scale_out, q_km, scale_k = _outputs(x, dtype, rowwise, transpose, scale, amax, measured, power_of_2)
    x_nk = dispatch.as_rows(x)
    (n, k), m, given, given_k = x_nk.shape, q_km.shape[-1], scale, scale_k
    if not n * k:
        scale_out.fill_(1.0)
        scale_k.fill_(1.0)
        q_km.zero_()
        return outputs
    if given is None and amax is None:
        given = torch.zeros(n if rowwise else 1, dtype=torch.int32, device=x.device)
        given_k = torch.zeros(scale_k.shape, dtype=torch.int32, device=x.device)
        _launch_amax(x_nk, given, given_k, rowwise=rowwise, transpose=transpose)
    elif given is None:
        given = amax
    blocks = _WIDE if not transpose else _SQUARE_ROWWISE if rowwise else SQUARE
    launch(_quantise_kernel, grid(m if transpose else n, k, blocks), x_nk, given, given_k,
           given if measured is None else measured, q_nk, q_km, scale_out, scale_k, n, k, m, x_nk.stride(0),
           SCALED=scale is not None, MEASURE=measured is not None, ROWWISE=rowwise, TRANSPOSE=transpose,
           E4M3=dtype == E4M3, POWER_OF_2=power_of_2, NATIVE=native(), **blocks)
    return outputs


@_quantise.register_fake
def _outputs(x, dtype, rowwise, transpose, scale, amax, measured, power_of_2):
    n, k = x.shape

    def numbers(count):
        return x.new_empty(count, dtype=torch.float32)

    q_km = x.new_empty((k, aligned(n)) if transpose else (0,), dtype=torch.uint8)
    return (x.new_empty((n, k), dtype=torch.uint8), numbers(n if rowwise else 1 if scale is None else 0), q_km,
            numbers(k if rowwise and transpose else 0))


def _check(x_nk: Tensor, dtype: torch.dtype, rowwise: bool, **numbers: Tensor | None) -> None:
    if x_nk.dim() != 2:
        raise ValueError(f"quantise: x has shape {tuple(x_nk.shape)}, needs two dimensions")
    if dtype not in _TOP_EXPONENT:
        raise ValueError(f"quantise: dtype must be torch.float8_e4m3fn or torch.float8_e5m2, not {dtype}")
    for name, given in numbers.items():
        wanted = torch.float32 if name == "scale" else torch.int32
        if given is not None and (given.shape != (1,) or given.dtype != wanted):
            raise ValueError(f"quantise: {name} is {given.dtype} of shape {tuple(given.shape)}, needs {wanted} of (1,)")
        if given is not None and rowwise:
            raise ValueError(f"quantise: {name} is of a whole tensor, but rowwise is true")
    if numbers["scale"] is not None and numbers["amax"] is not None:
        raise ValueError("quantise: scale and amax are both given")


def which(op: str, same: dict[str, Tensor], impl: str, **others: Tensor | None) -> str:
    """``dispatch.choose`` for an op that has a Triton kernel only, and none for fp64."""
    given = {name: tensor for name, tensor in others.items() if tensor is not None}
    if next(iter(same.values())).dtype == torch.float64:
        if impl == "triton":
            raise RuntimeError(f"{op}: x is torch.float64, needs float32, bfloat16 or float16")
        impl = "torch"
    return dispatch.choose(impl, op, same, given, kernels=("triton",))


def amax_bits(x: Tensor, *, impl: str = "auto") -> Tensor:
    """max |x| over all of x [..., k], as the bits of an fp32 number: int32 [1]. Not differentiable."""
    if which("amax_bits", {"x": x}, impl) == "torch" or not x.numel():
        return amax_bits_reference(x)
    return torch.ops.engine_kernels.fp8_amax(x.detach())


def quantise(x_nk: Tensor, dtype: torch.dtype, *, rowwise: bool = False, transpose: bool = False,
             scale: Tensor | None = None, amax: Tensor | None = None, measured: Tensor | None = None,
             power_of_2: bool = True, impl: str = "auto") -> Quantised:
    """x [n, k] (fp32, bf16 or fp16) in ``dtype``, and with ``transpose`` its transpose as well, in one pass.

    Tensorwise, the scale comes from ``scale`` (fp32 [1]: known beforehand), else from ``amax`` (bits, int32 [1]:
    reduced over ranks), else from a pass over x before. ``measured`` (bits, int32 [1]) is raised to x's amax in place.
    Rowwise there is always a pass before, and none of them is given. Not differentiable. Raises ValueError naming the
    argument.
    """
    _check(x_nk, dtype, rowwise, scale=scale, amax=amax, measured=measured)
    if which("quantise", {"x": x_nk}, impl, scale=scale, amax=amax, measured=measured) == "torch":
        return quantise_reference(x_nk, dtype, rowwise=rowwise, transpose=transpose, scale=scale, amax=amax,
                                  measured=measured, power_of_2=power_of_2)
    q_nk, found, q_km, scale_k = torch.ops.engine_kernels.fp8_quantise(
        x_nk.detach(), dtype, rowwise, transpose, scale, amax, measured, power_of_2)
    found = found if scale is None else scale
    found_k = scale_k if rowwise else found
    return Quantised(q_nk.view(dtype), found, *((q_km.view(dtype), found_k) if transpose else ()))
