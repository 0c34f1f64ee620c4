"""Frozen weights in 4 bits: NF4 (Dettmers et al. 2023, arXiv:2305.14314), blocks of 64 along the input features.

    absmax = max |w| of a block,   code = the nearest of 16 levels to w / absmax,   w' = level[code] * absmax

Levels are the quantiles of a normal distribution, scaled to [-1, 1]. Codes and absmax are bitsandbytes' bit for bit: a
byte holds two codes, the first in its upper half; what lies in the middle of two levels gets the lower one.

Shapes: m output and k input features (a multiple of 64), e experts where there are more than one. A block never spans
two rows, so it does not matter how rows are ordered or split; columns may be split between blocks.

Scales can be quantised as well (``compressed``), to 8 bits over groups of at most 256 along a dimension that the caller
knows to be whole on every rank: absmax' = low + q * step. bitsandbytes subtracts the mean of the whole tensor, which a
rank that holds a part of it does not know. low and step are bf16, so that q * step is exact in fp32: with and without
fused multiply-adds the sum is the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton

BLOCK, GROUP = 64, 256
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_LEAST = 1e-38  # a block of zeros is divided by this
_PAIR = torch.bfloat16  # of low and step


@dataclass(frozen=True)
class Nf4:
    """A weight [m, k], or [e, m, k]: ``codes`` uint8 [.., m, k / 2]; ``absmax`` fp32 [.., m, k / 64], or uint8 with
    ``low`` and ``step`` (bf16): a pair for each group of ``group`` (rows, columns) of absmax."""

    codes: Tensor
    absmax: Tensor
    low: Tensor | None = None
    step: Tensor | None = None
    group: tuple[int, int] = (1, GROUP)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.codes.shape[:-1], 2 * self.codes.shape[-1]])

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.codes, self.absmax, self.low, self.step) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def __getitem__(self, i: int) -> Nf4:
        """One expert's part, in the same memory."""
        low, step = (None if t is None else t[i] for t in (self.low, self.step))
        return Nf4(self.codes[i], self.absmax[i], low, step, self.group)

    def copy_(self, other: Nf4) -> None:
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)


def empty(*shape: int, device: torch.device | str = "cpu", group: tuple[int, int] | None = None) -> Nf4:
    """Memory for a weight of this shape; with ``group``, for compressed scales."""
    *lead, m, k = shape
    codes = torch.empty(*lead, m, k // 2, dtype=torch.uint8, device=device)
    if group is None:
        return Nf4(codes, torch.empty(*lead, m, k // BLOCK, device=device))
    groups = [*lead, jit.cdiv(m, group[0]), jit.cdiv(k // BLOCK, group[1])]
    low, step = (torch.empty(groups, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Nf4(codes, torch.empty(*lead, m, k // BLOCK, dtype=torch.uint8, device=device), low, step, group)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@functools.cache
def _bounds(device: torch.device) -> Tensor:
    """What lies between two levels' neighbourhoods, [15]."""
    levels = torch.tensor(LEVELS)
    return ((levels[:-1] + levels[1:]) / 2).to(device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Both levels of every byte, [256, 2]."""
    byte, levels = torch.arange(256), torch.tensor(LEVELS)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).to(device)


def quantise_nf4_reference(weight: Tensor) -> Nf4:
    """The formula in plain torch, in fp32."""
    blocks = weight.detach().float().contiguous().unflatten(-1, (-1, BLOCK))
    absmax = blocks.abs().amax(-1) if blocks.numel() else blocks.new_empty(blocks.shape[:-1])
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST))[..., None]).clamp(-1, 1)
    code = torch.bucketize(scaled, _bounds(weight.device), out_int32=True).to(torch.uint8).flatten(-2)
    return Nf4(code[..., ::2] << 4 | code[..., 1::2], absmax)


def absmax_of(q: Nf4) -> Tensor:
    """The scales in fp32 [.., m, k / 64], whether compressed or not."""
    if q.low is None or q.step is None:
        return q.absmax
    (rows, columns), (m, blocks) = q.group, q.absmax.shape[-2:]
    low, step = (t.float().repeat_interleave(rows, -2)[..., :m, :].repeat_interleave(columns, -1)[..., :blocks]
                 for t in (q.low, q.step))
    return low + q.absmax.float() * step


def dequantise_nf4_reference(q: Nf4, dtype: torch.dtype) -> Tensor:
    """The formula in plain torch: the product in fp32, rounded once."""
    levels = torch.nn.functional.embedding(q.codes.int(), _pairs(q.codes.device))
    return (levels.view(*q.absmax.shape, BLOCK) * absmax_of(q)[..., None]).flatten(-2).to(dtype)


def _up_to_bf16(x: Tensor) -> Tensor:
    """Non-negative fp32 numbers, rounded up."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def compressed(q: Nf4, *, along: int) -> Nf4:
    """``q`` with its scales in 8 bits, in groups along the rows (``along`` 0) or the columns (1) of absmax.

    A scale is off by at most half a step: (max - min) / 510 of its group, and 2^-7 of max / 510 more for the rounding
    of low and step. Raises ValueError for scales that are compressed already.
    """
    if q.low is not None:
        raise ValueError("compressed: the scales are in 8 bits already")
    if not q.absmax.numel():
        return empty(*q.shape, device=q.codes.device, group=(GROUP, 1) if along == 0 else (1, GROUP))
    absmax = q.absmax.transpose(-1, -2) if along == 0 else q.absmax  # groups in the last dimension
    n = absmax.shape[-1]
    groups = jit.cdiv(n, GROUP)
    # The last value once more where a group is not full: it changes neither the least nor the greatest.
    filled = torch.cat([absmax, absmax[..., -1:].expand(*absmax.shape[:-1], groups * GROUP - n)], -1)
    filled = filled.unflatten(-1, (groups, GROUP))
    low = (filled.amin(-1).contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)  # rounded down
    step = _up_to_bf16((filled.amax(-1) - low.float()) / 255)
    part = (filled - low.float()[..., None]) / step.float().clamp(min=_LEAST)[..., None]
    found = part.round().clamp(0, 255).to(torch.uint8).flatten(-2)[..., :n]
    if along == 0:
        found, low, step = (t.transpose(-1, -2).contiguous() for t in (found, low, step))
    return Nf4(q.codes, found.contiguous(), low, step, (GROUP, 1) if along == 0 else (1, GROUP))


@triton.jit
def _quantise_kernel(x_ptr, codes_ptr, absmax_ptr, bounds_ptr, blocks, LEAST: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    x = tl.load(x_ptr + block[:, None] * 64 + tl.arange(0, 64)[None, :], mask=inside, other=0.0).to(tl.float32)
    # NaN would be lost in a maximum; a scale that is not finite is found by whoever looks.
    absmax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)
    least = tl.full((BLOCKS,), LEAST, tl.float32)  # as a literal it would be fp64: it is subnormal in fp32
    inverse = tl.math.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), tl.maximum(absmax, least))
    scaled = tl.minimum(tl.maximum(x * inverse[:, None], -1.0), 1.0)
    code = tl.zeros((BLOCKS, 64), dtype=tl.int32)
    for i in tl.static_range(15):
        code += (scaled > tl.load(bounds_ptr + i)).to(tl.int32)
    upper, lower = tl.split(tl.reshape(code, (BLOCKS, 32, 2)))
    tl.store(codes_ptr + block[:, None] * 32 + tl.arange(0, 32)[None, :], (upper << 4 | lower).to(tl.uint8),
             mask=inside)


@triton.jit
def _dequantise_kernel(
    words_ptr, absmax_ptr, low_ptr, step_ptr, levels_ptr, out_ptr, words, m, row_blocks, groups_m, groups_k,
    COMPRESSED: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):
    """A word is four bytes of codes: eight numbers, an eighth of a block of 64."""
    first, lane = tl.program_id(0), tl.arange(0, WORDS)
    word = first.to(tl.int64) * WORDS + lane
    inside = word < words
    packed = tl.load(words_ptr + word, mask=inside, other=0)
    block = first * (WORDS // 8) + lane // 8
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.float32)
    if COMPRESSED:
        row = block // row_blocks
        group_row = row // m * groups_m + row % m // GROUP_ROWS
        group = group_row * groups_k + block % row_blocks // GROUP_COLUMNS
        step = tl.load(step_ptr + group, mask=inside, other=0.0).to(tl.float32)
        absmax = tl.load(low_ptr + group, mask=inside, other=0.0).to(tl.float32) + absmax * step
    place = tl.arange(0, 8)
    code = (packed[:, None] >> (place // 2 * 8 + 4 - place % 2 * 4)[None, :]) & 15
    # Sixteen levels, from the L1 cache: four times what it must deliver for the memory's rate.
    value = tl.load(levels_ptr + code) * absmax[:, None]
    tl.store(out_ptr + word[:, None] * 8 + place[None, :], value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@torch.library.custom_op("engine_kernels::nf4_quantise", mutates_args=())
def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-> codes, absmax."""
    codes, absmax = _quantised_outputs(weight)
    launch(_quantise_kernel, (jit.cdiv(absmax.numel(), 32),), weight.contiguous(), codes, absmax,
           _bounds(weight.device), absmax.numel(), LEAST=_LEAST, BLOCKS=32, num_warps=4)
    return codes, absmax


@_quantise.register_fake
def _quantised_outputs(weight):
    *lead, k = weight.shape
    return (weight.new_empty(*lead, k // 2, dtype=torch.uint8),
            weight.new_empty(*lead, k // BLOCK, dtype=torch.float32))


@torch.library.custom_op("engine_kernels::nf4_dequantise", mutates_args=())
def _dequantise(codes: Tensor, absmax: Tensor, low: Tensor | None, step: Tensor | None, group_rows: int,
                group_columns: int, dtype: torch.dtype) -> Tensor:
    weight = _weight_like(codes, absmax, low, step, group_rows, group_columns, dtype)
    words, (m, row_blocks) = codes.contiguous().view(torch.int32), absmax.shape[-2:]
    absmax = absmax.contiguous()
    low, step = (absmax if t is None else t.contiguous() for t in (low, step))
    launch(_dequantise_kernel, (jit.cdiv(words.numel(), 512),), words, absmax, low, step, _levels(codes.device),
           weight, words.numel(), m, row_blocks, jit.cdiv(m, group_rows), jit.cdiv(row_blocks, group_columns),
           COMPRESSED=absmax.dtype == torch.uint8, GROUP_ROWS=group_rows, GROUP_COLUMNS=group_columns,
           WORDS=512, num_warps=8)
    return weight


@_dequantise.register_fake
def _weight_like(codes, absmax, low, step, group_rows, group_columns, dtype):
    return codes.new_empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=dtype)


def quantise_nf4(weight: Tensor, *, impl: str = "auto") -> Nf4:
    """weight [.., m, k] (fp32, bf16 or fp16) -> NF4. Not differentiable.

    A block with NaN or infinity gets a scale that is not finite. Raises ValueError if k is no multiple of 64.
    """
    if weight.dim() < 2 or weight.shape[-1] % BLOCK:
        raise ValueError(f"quantise_nf4: weight has shape {tuple(weight.shape)}, needs rows of a multiple of {BLOCK}")
    if dispatch.choose(impl, "quantise_nf4", {"weight": weight}, kernels=("triton",)) == "torch":
        return quantise_nf4_reference(weight)
    return Nf4(*torch.ops.engine_kernels.nf4_quantise(weight.detach()))


def dequantise_nf4(q: Nf4, dtype: torch.dtype = torch.bfloat16, *, impl: str = "auto") -> Tensor:
    """-> [.., m, k] in ``dtype``. The same bits from every implementation. Raises ValueError naming the argument."""
    *lead, m, half = q.codes.shape
    if q.codes.dtype != torch.uint8 or half % (BLOCK // 2):
        raise ValueError(f"dequantise_nf4: codes are {q.codes.dtype} {tuple(q.codes.shape)}, need uint8 and rows of a "
                         f"multiple of {BLOCK // 2}")
    blocks = half // (BLOCK // 2)
    groups = (*lead, jit.cdiv(m, q.group[0]), jit.cdiv(blocks, q.group[1]))
    scales = torch.float32 if q.low is None else torch.uint8
    for name, found, wanted, shape in (("absmax", q.absmax, scales, (*lead, m, blocks)), ("low", q.low, _PAIR, groups),
                                       ("step", q.step, _PAIR, groups)):
        if found is not None and (found.dtype != wanted or found.shape != shape):
            raise ValueError(f"dequantise_nf4: {name} is {found.dtype} {tuple(found.shape)}, needs {wanted} {shape}")
    if (q.low is None) != (q.step is None):
        raise ValueError("dequantise_nf4: low and step come together")
    first = {"absmax": q.absmax} if q.low is None else {"low": q.low}
    if dispatch.choose(impl, "dequantise_nf4", first, {"codes": q.codes}, kernels=("triton",)) == "torch":
        return dequantise_nf4_reference(q, dtype)
    return torch.ops.engine_kernels.nf4_dequantise(q.codes, q.absmax, q.low, q.step, *q.group, dtype)
