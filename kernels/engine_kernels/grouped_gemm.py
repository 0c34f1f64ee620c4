"""Products of the experts' linear layers: y = x W^T, dx = dy W, dW = dy^T x, each expert with its own rows.

    y_p = x_p W_e^T + s_p b_e,  dx_p = dy_p W_e,  dW_e = sum over e's rows of dy_p x_p^T,  e the expert of row p

Shapes: p rows in expert order, e experts, k inputs and m outputs of an expert, c the dimension a product sums over,
n the columns of its result. Weights are [m, k] tensors of their own (kernels get their addresses) or one [e, m, k].
``tokens_per_expert_e``: int64, where x is; the host never waits for it. Rows past the last expert's give zeros: a
buffer may be longer than what was dispatched.

Programs of a fixed number walk over the tiles of all experts, each taking every so many-th, and find a tile's expert by
adding up the tokens themselves. Tiles of an expert go down ``GROUP`` row blocks before the next column, so that both
operands are read from the L2 cache. Sums are in fp32 (fp64 for fp64) and rounded once; no tile is split over programs,
so results are deterministic. The layer with its gradients: ``grouped_linear``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton
from engine_kernels.linear import matmul_nn, matmul_nt, matmul_tn

Weights = Tensor | Sequence[Tensor]


@triton.jit
def _place(tile, row_blocks, column_blocks, GROUP: tl.constexpr):
    """-> row and column block of an expert's tile: down GROUP row blocks, then on to the next column."""
    group = tile // (GROUP * column_blocks)
    within = tile - group * GROUP * column_blocks
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def own_tensor(at, expert, stride, there, like, STACKED: tl.constexpr, ALIGNED: tl.constexpr):
    """The expert's own tensor: part of a stack, or at its address in a list of them (of ``like``'s element type)."""
    if STACKED:
        own = at + tl.cast(expert, tl.int64) * stride
    else:
        own = tl.load(at + expert, mask=there, other=0).to(like.dtype)
        if ALIGNED:
            own = tl.multiple_of(own, 16)
    return own


@triton.jit
def _rows_kernel(
    a_ptr, weights_at, biases_at, scale_ptr, out_ptr, tokens_ptr, p, e, n, c, a_stride, weight_stride, bias_stride,
    n_stride, c_stride, STACKED: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):
    """out[p, n] = a[p, c] times each expert's matrix [c, n], given by its strides: W^T forward, W for dx."""
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    column_blocks = tl.cdiv(n, COLUMNS)
    tile = tl.program_id(0)
    first_tile, first_row = 0, 0
    for expert in range(e + 1):  # the last group are the rows of no expert
        there = expert < e
        tokens = tl.load(tokens_ptr + expert, mask=there, other=p).to(tl.int32)
        end_row = tl.minimum(first_row + tokens, p)
        row_blocks = tl.cdiv(end_row - first_row, ROWS)
        depth = tl.where(there, c, 0)
        while tile < first_tile + row_blocks * column_blocks:
            row_block, column_block = _place(tile - first_tile, row_blocks, column_blocks, GROUP)
            weight_ptr = own_tensor(weights_at, expert, weight_stride, there, a_ptr, STACKED, ALIGNED)
            start, left = first_row + row_block * ROWS, n - column_block * COLUMNS
            # A block's rows past the expert's end repeat its last one: read, never written.
            a_row = tl.minimum(row, end_row - 1 - start)[:, None] * a_stride + inner[None, :]
            b_place = inner[:, None] * c_stride + column[None, :] * n_stride
            a_at = a_ptr + tl.cast(start, tl.int64) * a_stride
            b_at = weight_ptr + tl.cast(column_block * COLUMNS, tl.int64) * n_stride
            sums = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
            for first in range(0, depth, INNER):
                if EVEN_C:
                    a = tl.load(a_at + a_row)
                else:
                    a = tl.load(a_at + a_row, mask=(inner < c - first)[None, :], other=0.0)
                if EVEN_C and EVEN_N:
                    b = tl.load(b_at + b_place)
                else:
                    b = tl.load(b_at + b_place, mask=(inner < c - first)[:, None] & (column < left)[None, :], other=0.0)
                sums = tl.dot(a, b, sums, input_precision="ieee", out_dtype=WIDE)
                a_at += INNER
                b_at += INNER * tl.cast(c_stride, tl.int64)
            there_row = row < end_row - start
            if BIAS:
                bias_at = own_tensor(biases_at, expert, bias_stride, there, a_ptr, STACKED, False)
                bias = tl.load(bias_at + column_block * COLUMNS + column, mask=(column < left) & there, other=0.0)
                bias = bias.to(WIDE)[None, :]
                if SCALE:
                    bias = bias * tl.load(scale_ptr + start + row, mask=there_row, other=0.0).to(WIDE)[:, None]
                sums += bias
            out_row, out_column = start + row, column_block * COLUMNS + column
            out_at = out_ptr + out_row.to(tl.int64)[:, None] * n + out_column[None, :]
            inside = (out_row < end_row)[:, None] & (out_column < n)[None, :]
            tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=inside)
            tile += tl.num_programs(0)
        first_tile += row_blocks * column_blocks
        first_row = end_row


@triton.jit
def _store(tile, out_ptr, row_block, column_block, m, k, ADD: tl.constexpr):
    """``tile`` to its place in a matrix [m, k], or added to what is there."""
    row = row_block * tile.shape[0] + tl.arange(0, tile.shape[0])
    column = column_block * tile.shape[1] + tl.arange(0, tile.shape[1])
    place = out_ptr + row.to(tl.int64)[:, None] * k + column[None, :]
    inside = (row < m)[:, None] & (column < k)[None, :]
    if ADD:
        tile += tl.load(place, mask=inside, other=0.0).to(tile.dtype)
    tl.store(place, tile.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights_kernel(
    dy_ptr, x_ptr, out_at, out_like, tokens_ptr, p, e, m, k, dy_stride, x_stride, out_stride,
    STACKED: tl.constexpr, ALIGNED: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):
    """dW_e = dy_e^T x_e, or added to what is there (then experts without rows are left alone)."""
    row_blocks, column_blocks = tl.cdiv(m, ROWS), tl.cdiv(k, COLUMNS)
    tile = tl.program_id(0)
    first_row = 0
    for expert in range(e):
        end_row = tl.minimum(first_row + tl.load(tokens_ptr + expert).to(tl.int32), p)
        while tile < (expert + 1) * row_blocks * column_blocks:
            within = tile - expert * row_blocks * column_blocks
            row_block, column_block = _place(within, row_blocks, column_blocks, GROUP)
            sums = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
            row, column = row_block * ROWS + tl.arange(0, ROWS), column_block * COLUMNS + tl.arange(0, COLUMNS)
            for first in range(first_row, end_row, INNER):
                token = first + tl.arange(0, INNER)
                dy = tl.load(dy_ptr + token.to(tl.int64)[None, :] * dy_stride + row[:, None],
                             mask=(token < end_row)[None, :] & (row < m)[:, None], other=0.0)
                x = tl.load(x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :],
                            mask=(token < end_row)[:, None] & (column < k)[None, :], other=0.0)
                sums = tl.dot(dy, x, sums, input_precision="ieee", out_dtype=WIDE)
            dw_at = own_tensor(out_at, expert, out_stride, True, out_like, STACKED, ALIGNED)
            if ADD:  # in two halves, for want of registers
                left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
                kept = tl.where(end_row > first_row, m, 0)
                _store(left, dw_at, row_block, 2 * column_block, kept, k, ADD)
                _store(right, dw_at, row_block, 2 * column_block + 1, kept, k, ADD)
            else:
                _store(sums, dw_at, row_block, column_block, m, k, ADD)
            tile += tl.num_programs(0)
        first_row = end_row


def _capability(x: Tensor) -> int:
    """Of the GPU that runs or is compiled for, as 80, 90 or 100; 0 in the interpreter."""
    if jit.interpreted():
        return 0
    driver: Any = triton.runtime.driver.active
    return int(driver.get_current_target().arch)


def _blocks(x: Tensor, rows: int, columns: int, inner: int, widest: int = 256) -> dict[str, Any]:
    """Tile sizes for a product of about this size, by dtype and GPU, that fit registers and shared memory.

    Two operands in half precision: 96 KiB in flight on an A100 (of 163), 144 KiB from the H100 on (of 227), where 8
    warps share the reads of a block twice as wide, but for gradients of weights on a B200, which would spill.
    """
    if x.dtype in (torch.float32, torch.float64):  # no tensor cores at full precision
        limits, stages = ((64, 64, 32) if x.dtype == torch.float32 else (32, 32, 16)), 2
    elif _capability(x) >= 90 and widest == 256:
        limits, stages = (128, 256, 64), 3
    else:
        limits, stages = (128, 128, 64), 4
    sizes = [max(16, min(limit, jit.next_power_of_2(size)))
             for limit, size in zip(limits, (rows, columns, inner), strict=True)]
    warps = 8 if sizes[0] * sizes[1] > 128 * 64 or stages == 2 else 4
    return {"ROWS": sizes[0], "COLUMNS": sizes[1], "INNER": sizes[2], "GROUP": 8,
            "num_warps": warps, "num_stages": stages}


@functools.lru_cache(maxsize=4096)
def _sent(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on a GPU; parameters and main gradients stay where they are, so these are sent once."""
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)


def located(tensors: Sequence[Tensor], rank: int) -> tuple[Tensor, int, bool, bool]:
    """For a kernel: a stack of the experts' tensors (of ``rank`` dimensions each) or a list's addresses; the stack's
    stride; whether it is a stack; whether every address is a multiple of 16 bytes."""
    if tensors[0].dim() > rank:
        return tensors[0], tensors[0].stride(0), True, True
    addresses = tuple(t.data_ptr() for t in tensors)
    return _sent(addresses, tensors[0].device), 0, False, not any(a % 16 for a in addresses)


def contiguous(tensors: Weights) -> list[Tensor]:
    """A list of the experts' tensors, or of their stack alone."""
    return [tensors.contiguous()] if isinstance(tensors, Tensor) else [t.contiguous() for t in tensors]


def _programs(a: Tensor, tiles: int, blocks: dict[str, Any]) -> tuple[int]:
    """As many as run at once, or as there can be ``tiles`` (without knowing the experts' sizes)."""
    return (min(tiles, jit.multiprocessors(a) * max(1, min(4, 8192 // (blocks["ROWS"] * blocks["COLUMNS"])))),)


def _rows(a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scale_p: Tensor | None,
          tokens_e: Tensor, transposed: bool) -> Tensor:
    """``a`` times every expert's W^T, or W (``transposed``: the strides of W change places)."""
    a_pc, (m, k), e = dispatch.as_rows(a), weights[0].shape[-2:], tokens_e.numel()
    (p, c), (n, n_stride, c_stride) = a_pc.shape, (k, 1, k) if transposed else (m, k, 1)
    out_pn = a.new_empty(p, n)
    if not c:
        return out_pn.zero_()
    blocks = _blocks(a, jit.cdiv(p, e), n, c)
    weight_at, weight_stride, stacked, aligned = located(weights, 2)
    bias_at, bias_stride, biases_stacked, _ = located(biases, 1) if biases else (weight_at, 0, stacked, False)
    assert biases_stacked == stacked, "weights and biases both stacked, or neither"
    tiles = (p // blocks["ROWS"] + e + 1) * jit.cdiv(n, blocks["COLUMNS"]) if p else 0
    launch(_rows_kernel, _programs(a, tiles, blocks), a_pc, weight_at, bias_at,
           a_pc if scale_p is None else scale_p.contiguous(), out_pn, tokens_e,
           p, e, n, c, a_pc.stride(0), weight_stride, bias_stride, n_stride, c_stride,
           STACKED=stacked, BIAS=bool(biases), SCALE=scale_p is not None, ALIGNED=aligned,
           EVEN_N=n % blocks["COLUMNS"] == 0, EVEN_C=c % blocks["INNER"] == 0, WIDE=jit.wide(a), **blocks)
    return out_pn


def _weight_gradients(dy: Tensor, x: Tensor, tokens_e: Tensor, into: Sequence[Tensor], add: bool) -> None:
    dy_pm, x_pk, e = dispatch.as_rows(dy), dispatch.as_rows(x), tokens_e.numel()
    (p, m), k = dy_pm.shape, x_pk.shape[1]
    blocks = _blocks(dy, m, k, jit.cdiv(p, e), 128 if _capability(dy) >= 100 else 256)
    out_at, out_stride, stacked, aligned = located(into, 2)
    tiles = e * jit.cdiv(m, blocks["ROWS"]) * jit.cdiv(k, blocks["COLUMNS"])
    launch(_weights_kernel, _programs(dy, tiles, blocks), dy_pm, x_pk, out_at, into[0], tokens_e, p, e, m, k,
           dy_pm.stride(0), x_pk.stride(0), out_stride,
           STACKED=stacked, ALIGNED=aligned, ADD=add, WIDE=jit.wide(dy), **blocks)


@torch.library.custom_op("engine_kernels::grouped_linear_fwd", mutates_args=())
def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scale_p: Tensor | None,
             tokens_per_expert_e: Tensor) -> Tensor:
    """``weights``: the experts' [m, k], or one [e, m, k] alone; ``biases`` alike or none. -> y [p, m]."""
    return _rows(x, weights, biases, scale_p, tokens_per_expert_e, transposed=False)


@_forward.register_fake
def _(x, weights, biases, scale_p, tokens_per_expert_e):
    return x.new_empty(x.shape[0], weights[0].shape[-2])


@torch.library.custom_op("engine_kernels::grouped_linear_dgrad", mutates_args=())
def _dgrad(dy: Tensor, weights: Sequence[Tensor], tokens_per_expert_e: Tensor) -> Tensor:
    """-> dx [p, k]."""
    return _rows(dy, weights, [], None, tokens_per_expert_e, transposed=True)


@_dgrad.register_fake
def _(dy, weights, tokens_per_expert_e):
    return dy.new_empty(dy.shape[0], weights[0].shape[-1])


@torch.library.custom_op("engine_kernels::grouped_linear_wgrad", mutates_args=())
def _wgrad(dy: Tensor, x: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """-> dw [e, m, k], zeros for an expert without rows."""
    dw_emk = x.new_empty(tokens_per_expert_e.numel(), dy.shape[1], x.shape[1])
    _weight_gradients(dy, x, tokens_per_expert_e, [dw_emk], add=False)
    return dw_emk


@_wgrad.register_fake
def _(dy, x, tokens_per_expert_e):
    return x.new_empty(tokens_per_expert_e.shape[0], dy.shape[1], x.shape[1])


@torch.library.custom_op("engine_kernels::grouped_linear_wgrad_into", mutates_args=("into",))
def _wgrad_into(dy: Tensor, x: Tensor, tokens_per_expert_e: Tensor, into: Sequence[Tensor],
                add: bool) -> None:
    """Into a contiguous [m, k] for every expert, or one [e, m, k] alone, of any float dtype."""
    _weight_gradients(dy, x, tokens_per_expert_e, into, add)


def choose(impl: str, op: str, x: Tensor, others: dict[str, Tensor], tokens_per_expert_e: Tensor) -> str:
    """"triton", or "torch": a loop over ``linear``'s products, which is the CPU's kernel too."""
    return dispatch.choose("torch" if impl == "cpu" else impl, op, {"x": x, **others},
                           {"tokens_per_expert_e": tokens_per_expert_e}, kernels=("triton",))


def rows_of(x_pk: Tensor, tokens_per_expert_e: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each expert's rows, and those past the last one's. Waits for the numbers where they are on a GPU."""
    tokens = tokens_per_expert_e.tolist()
    *own, rest = x_pk.split([*tokens, x_pk.shape[0] - sum(tokens)])
    return own, rest


def grouped_nt(x_pk: Tensor, weights: Weights, tokens_per_expert_e: Tensor, biases: Weights | None = None,
               scale_p: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x W^T of each row's expert, plus its bias times the row's ``scale_p`` -> [p, m]: the layer's forward."""
    if choose(impl, "grouped_nt", x_pk, {"weights": weights[0]}, tokens_per_expert_e) == "triton":
        return torch.ops.engine_kernels.grouped_linear_fwd(
            x_pk, contiguous(weights), [] if biases is None else contiguous(biases), scale_p, tokens_per_expert_e)
    own, rest = rows_of(x_pk, tokens_per_expert_e)
    parts = [matmul_nt(x, weights[i]) for i, x in enumerate(own)]
    if biases is not None:
        scales = [None] * len(own) if scale_p is None else rows_of(scale_p, tokens_per_expert_e)[0]
        for i, (y, scale) in enumerate(zip(parts, scales, strict=True)):
            y += biases[i] if scale is None else biases[i] * scale[:, None]
    return torch.cat([*parts, rest.new_zeros(rest.shape[0], weights[0].shape[0])])


def grouped_nn(dy_pm: Tensor, weights: Weights, tokens_per_expert_e: Tensor, *, impl: str = "auto") -> Tensor:
    """dy W of each row's expert -> [p, k]: the gradient of the layer's input."""
    if choose(impl, "grouped_nn", dy_pm, {"weights": weights[0]}, tokens_per_expert_e) == "triton":
        return torch.ops.engine_kernels.grouped_linear_dgrad(dy_pm, contiguous(weights), tokens_per_expert_e)
    own, rest = rows_of(dy_pm, tokens_per_expert_e)
    parts = [matmul_nn(dy, weights[i]) for i, dy in enumerate(own)]
    return torch.cat([*parts, rest.new_zeros(rest.shape[0], weights[0].shape[1])])


def grouped_tn(dy_pm: Tensor, x_pk: Tensor, tokens_per_expert_e: Tensor, *, into: Sequence[Tensor] | None = None,
               add: bool = False, impl: str = "auto") -> Sequence[Tensor]:
    """dy^T x over each expert's rows -> e of [m, k] (zeros without rows): the gradients of the layer's weights.

    ``into``: contiguous tensors of any float dtype that get them, each on top of what it holds if ``add``.
    """
    if choose(impl, "grouped_tn", x_pk, {"dy": dy_pm}, tokens_per_expert_e) == "triton":
        if into is None:
            return torch.ops.engine_kernels.grouped_linear_wgrad(dy_pm, x_pk, tokens_per_expert_e).unbind(0)
        torch.ops.engine_kernels.grouped_linear_wgrad_into(dy_pm, x_pk, tokens_per_expert_e, into, add)
        return into
    pairs = zip(rows_of(dy_pm, tokens_per_expert_e)[0], rows_of(x_pk, tokens_per_expert_e)[0], strict=True)
    if into is None:
        return [matmul_tn(dy, x) for dy, x in pairs]
    for dw, (dy, x) in zip(into, pairs, strict=True):
        if add and dy.shape[0]:
            dw.add_(matmul_tn(dy, x))
        elif not add:
            dw.copy_(matmul_tn(dy, x))
    return into


