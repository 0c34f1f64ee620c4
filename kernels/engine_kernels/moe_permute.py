"""Copies of tokens to the rows of their experts, and the sum of a token's rows back; with or without its weights.

    permute     y[place[t, i]] = x[t],  carried[place[t, i]] = weights[t, i]    for every place that is not negative
    unpermute   x[t] = sum over i of (weights[t, i] *) y[place[t, i]]           in the order of i, in fp32, rounded once

Each is the other's backward pass; that of a weighted unpermute also gives dweights[t, i] = <dx[t], y[place[t, i]]>.

Shapes: t tokens, h hidden, k places of a token (-1: none), p rows, as many as places. Places come from `moe_sort` or
`transpose_chunks` (k = 1). With ``expert_tk`` the weights are [t, e] and token t's i-th is in column expert_tk[t, i].
A token is read once however many copies it has, and every row of y is written by one program: nothing is added
atomically. All sums are in fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton


def _picked(weights: Tensor, expert_tk: Tensor | None) -> Tensor:
    return weights if expert_tk is None else weights.gather(1, expert_tk.clamp(min=0))


def permute_reference(x_th: Tensor, place_tk: Tensor, rows: int, weights: Tensor | None = None,
                      expert_tk: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`permute` in plain torch."""
    has_tk = place_tk >= 0
    token_n, place_n = has_tk.nonzero()[:, 0], place_tk[has_tk]
    y_ph = x_th.new_zeros(rows, x_th.shape[1]).index_copy(0, place_n, x_th.index_select(0, token_n))
    if weights is None:
        return y_ph, None
    return y_ph, weights.new_zeros(rows).index_copy(0, place_n, _picked(weights, expert_tk)[has_tk])


def unpermute_reference(y_ph: Tensor, place_tk: Tensor, weights_tk: Tensor | None = None) -> Tensor:
    """`unpermute` in plain torch."""
    with_none_ph = torch.nn.functional.pad(y_ph.to(jit.wide_dtype(y_ph)), (0, 0, 0, 1))  # the row of -1, zeros
    rows_tkh = with_none_ph[place_tk % with_none_ph.shape[0]]
    if weights_tk is not None:
        rows_tkh = rows_tkh * weights_tk.to(rows_tkh.dtype)[..., None]
    return rows_tkh.sum(1).to(y_ph.dtype)


@triton.jit
def _scatter_kernel(
    x_ptr, place_ptr, weights_ptr, expert_ptr, y_ptr, carried_ptr, p, h, x_stride, w_stride, K,
    WEIGHTED: tl.constexpr, BY_EXPERT: tl.constexpr, UNROLL: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr,
):
    """A token's columns to all its rows; the first columns' program also takes its weights along."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + token * x_stride + column, mask=column < h, other=0.0)
    for i in tl.range(0, K, loop_unroll_factor=UNROLL):
        place = tl.load(place_ptr + token * K + i)
        tl.store(y_ptr + place * h + column, x, mask=(column < h) & (place >= 0) & (place < p))
    if WEIGHTED:
        i = tl.arange(0, PLACES)
        mine = (i < K) & (tl.program_id(1) == 0)
        place = tl.load(place_ptr + token * K + i, mask=mine, other=-1)
        mine = mine & (place >= 0) & (place < p)
        at = tl.load(expert_ptr + token * K + i, mask=mine, other=0) if BY_EXPERT else i
        tl.store(carried_ptr + place, tl.load(weights_ptr + token * w_stride + at, mask=mine, other=0.0), mask=mine)


@triton.jit
def _gather_kernel(
    y_ptr, place_ptr, weights_ptr, x_ptr, carried_ptr, expert_ptr, dweights_ptr, h, y_stride, w_stride, d_stride, K,
    SCALED: tl.constexpr, CARRIED: tl.constexpr, BY_EXPERT: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr,
    PLACES: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The sum of a token's rows, scaled or not; as a backward pass it also brings back what it CARRIED."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=WIDE)
    for i in tl.range(0, K, loop_unroll_factor=UNROLL):
        place = tl.load(place_ptr + token * K + i)
        y = tl.load(y_ptr + place * y_stride + column, mask=(column < h) & (place >= 0), other=0.0).to(WIDE)
        if SCALED:
            y *= tl.load(weights_ptr + token * w_stride + i).to(WIDE)
        total += y
    tl.store(x_ptr + token * h + column, total.to(x_ptr.dtype.element_ty), mask=column < h)
    if CARRIED:
        i = tl.arange(0, PLACES)
        mine = (i < K) & (tl.program_id(1) == 0)
        place = tl.load(place_ptr + token * K + i, mask=mine, other=-1)
        carried = tl.load(carried_ptr + place, mask=place >= 0, other=0.0)
        if BY_EXPERT:  # in dweights of zeros
            at = tl.load(expert_ptr + token * K + i, mask=mine, other=0)
            tl.store(dweights_ptr + token * d_stride + at, carried, mask=place >= 0)
        else:
            tl.store(dweights_ptr + token * d_stride + i, carried, mask=mine)


@triton.jit
def _weighted_backward_kernel(
    dx_ptr, y_ptr, place_ptr, weights_ptr, dy_ptr, dweights_ptr, h, dx_stride, y_stride, w_stride, K,
    WIDE: tl.constexpr, UNROLL: tl.constexpr, COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    dx = tl.load(dx_ptr + token * dx_stride + column, mask=column < h, other=0.0).to(WIDE)
    for i in tl.range(0, K, loop_unroll_factor=UNROLL):
        place = tl.load(place_ptr + token * K + i)
        inside = (column < h) & (place >= 0)
        y = tl.load(y_ptr + place * y_stride + column, mask=inside, other=0.0).to(WIDE)
        weight = tl.load(weights_ptr + token * w_stride + i).to(WIDE)
        tl.store(dweights_ptr + token * K + i, tl.sum(dx * y, 0).to(dweights_ptr.dtype.element_ty))
        tl.store(dy_ptr + place * h + column, (dx * weight).to(dy_ptr.dtype.element_ty), mask=inside)


def _blocks(h: int, k: int) -> dict[str, int]:
    """Columns of a program, 16 bytes of bf16 a thread, and how many of a token's rows are in flight together."""
    columns = min(1024, jit.next_power_of_2(h))
    return {"COLUMNS": columns, "UNROLL": min(8, jit.next_power_of_2(k)), "num_warps": max(1, columns // 256)}


def _scatter(x_th: Tensor, place_tk: Tensor, weights: Tensor | None, expert_tk: Tensor | None, y_ph: Tensor,
             carried_p: Tensor) -> None:
    x_th, place_tk, (t, k), (p, h) = dispatch.as_rows(x_th), place_tk.contiguous(), place_tk.shape, y_ph.shape
    w = x_th if weights is None else dispatch.as_rows(weights)
    experts = place_tk if expert_tk is None else expert_tk.contiguous()
    blocks = _blocks(h, k)
    launch(_scatter_kernel, (t, jit.cdiv(h, blocks["COLUMNS"])), x_th, place_tk, w, experts, y_ph, carried_p,
           p, h, x_th.stride(0), w.stride(0), k, WEIGHTED=weights is not None, BY_EXPERT=expert_tk is not None,
           PLACES=jit.next_power_of_2(k), **blocks)


def _gather(y_ph: Tensor, place_tk: Tensor, x_th: Tensor, *, weights_tk: Tensor | None = None,
            carried_p: Tensor | None = None, expert_tk: Tensor | None = None, dweights: Tensor | None = None) -> None:
    y_ph, place_tk, (t, k), h = dispatch.as_rows(y_ph), place_tk.contiguous(), place_tk.shape, x_th.shape[1]
    w = y_ph if weights_tk is None else dispatch.as_rows(weights_tk)
    carried = y_ph if carried_p is None else carried_p.contiguous()
    experts = place_tk if expert_tk is None else expert_tk.contiguous()
    d = y_ph if dweights is None else dweights
    blocks = _blocks(h, k)
    launch(_gather_kernel, (t, jit.cdiv(h, blocks["COLUMNS"])), y_ph, place_tk, w, x_th, carried, experts, d,
           h, y_ph.stride(0), w.stride(0), d.stride(0), k, SCALED=weights_tk is not None, CARRIED=dweights is not None,
           BY_EXPERT=expert_tk is not None, WIDE=jit.wide(y_ph), PLACES=jit.next_power_of_2(k), **blocks)


@torch.library.custom_op("engine_kernels::moe_permute_fwd", mutates_args=())
def _permute(x_th: Tensor, place_tk: Tensor, rows: int, weights: Tensor | None, expert_tk: Tensor | None
             ) -> tuple[Tensor, Tensor]:
    """-> y_ph, and carried_p like weights (empty without)."""
    y_ph, carried_p = _permute_outputs(x_th, place_tk, rows, weights, expert_tk)
    _scatter(x_th, place_tk, weights, expert_tk, y_ph, carried_p)
    return y_ph, carried_p


@_permute.register_fake
def _permute_outputs(x_th, place_tk, rows, weights, expert_tk):
    carried = x_th.new_empty(0) if weights is None else weights.new_empty(rows)
    return x_th.new_empty(rows, x_th.shape[1]), carried


@torch.library.custom_op("engine_kernels::moe_permute_bwd", mutates_args=())
def _permute_backward(dy_ph: Tensor, dcarried_p: Tensor | None, place_tk: Tensor, expert_tk: Tensor | None,
                      weight_columns: int) -> tuple[Tensor, Tensor]:
    """-> dx_th, and dweights [t, weight_columns] (empty without dcarried_p)."""
    dx_th, dweights = _permute_backward_outputs(dy_ph, dcarried_p, place_tk, expert_tk, weight_columns)
    if expert_tk is not None:
        dweights.zero_()
    _gather(dy_ph, place_tk, dx_th, carried_p=dcarried_p, expert_tk=expert_tk,
            dweights=None if dcarried_p is None else dweights)
    return dx_th, dweights


@_permute_backward.register_fake
def _permute_backward_outputs(dy_ph, dcarried_p, place_tk, expert_tk, weight_columns):
    t = place_tk.shape[0]
    dweights = dy_ph.new_empty(0) if dcarried_p is None else dcarried_p.new_empty(t, weight_columns)
    return dy_ph.new_empty(t, dy_ph.shape[1]), dweights


@torch.library.custom_op("engine_kernels::moe_unpermute_fwd", mutates_args=())
def _unpermute(y_ph: Tensor, place_tk: Tensor, weights_tk: Tensor | None) -> Tensor:
    x_th = _unpermute_output(y_ph, place_tk, weights_tk)
    _gather(y_ph, place_tk, x_th, weights_tk=weights_tk)
    return x_th


@_unpermute.register_fake
def _unpermute_output(y_ph, place_tk, weights_tk):
    return y_ph.new_empty(place_tk.shape[0], y_ph.shape[1])


@torch.library.custom_op("engine_kernels::moe_unpermute_bwd", mutates_args=())
def _weighted_backward(dx_th: Tensor, y_ph: Tensor, place_tk: Tensor, weights_tk: Tensor) -> tuple[Tensor, Tensor]:
    """-> dy_ph, dweights_tk."""
    dy_ph, dweights_tk = _weighted_outputs(dx_th, y_ph, place_tk, weights_tk)
    dx_th, y_rows, w_tk = dispatch.as_rows(dx_th), dispatch.as_rows(y_ph), dispatch.as_rows(weights_tk)
    (t, k), h, columns = place_tk.shape, y_ph.shape[1], jit.next_power_of_2(y_ph.shape[1])
    unroll = min(4, jit.next_power_of_2(k))
    launch(_weighted_backward_kernel, (t,), dx_th, y_rows, place_tk.contiguous(), w_tk, dy_ph, dweights_tk, h,
           dx_th.stride(0), y_rows.stride(0), w_tk.stride(0), k, WIDE=jit.wide(y_ph),
           UNROLL=unroll, COLUMNS=columns, num_warps=min(32, max(1, columns // 512)))
    return dy_ph, dweights_tk


@_weighted_backward.register_fake
def _weighted_outputs(dx_th, y_ph, place_tk, weights_tk):
    return y_ph.new_empty(y_ph.shape), weights_tk.new_empty(weights_tk.shape)


def _setup_permute(ctx, inputs, output) -> None:
    _, place_tk, _, weights, expert_tk = inputs
    ctx.weight_columns = 0 if weights is None else weights.shape[1]
    ctx.save_for_backward(place_tk, expert_tk)


def _permute_autograd(ctx, dy_ph: Tensor, dcarried_p: Tensor):
    place_tk, expert_tk = ctx.saved_tensors
    dx_th, dweights = torch.ops.engine_kernels.moe_permute_bwd(
        dy_ph, dcarried_p if ctx.weight_columns else None, place_tk, expert_tk, ctx.weight_columns)
    return dx_th, None, None, dweights if ctx.weight_columns else None, None


def _setup_unpermute(ctx, inputs, output) -> None:
    y_ph, place_tk, weights_tk = inputs
    ctx.rows = y_ph.shape[0]
    ctx.save_for_backward(*(place_tk,) if weights_tk is None else (place_tk, y_ph, weights_tk))


def _unpermute_autograd(ctx, dx_th: Tensor):
    place_tk, *weighted = ctx.saved_tensors
    if not weighted:
        return torch.ops.engine_kernels.moe_permute_fwd(dx_th, place_tk, ctx.rows, None, None)[0], None, None
    dy_ph, dweights_tk = torch.ops.engine_kernels.moe_unpermute_bwd(dx_th, weighted[0], place_tk, weighted[1])
    return dy_ph, None, dweights_tk


_permute.register_autograd(_permute_autograd, setup_context=_setup_permute)
_unpermute.register_autograd(_unpermute_autograd, setup_context=_setup_unpermute)


def _check(op: str, name: str, found: Tensor, needs: tuple[int, ...]) -> None:
    if found.shape != needs:
        raise ValueError(f"{op}: {name} has shape {tuple(found.shape)}, needs {needs}")


def permute(x_th: Tensor, place_tk: Tensor, rows: int, weights: Tensor | None = None, expert_tk: Tensor | None = None,
            *, impl: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Copy token t of x [t, h] to the rows place_tk[t] of the result [rows, h], and its weights to those of [rows].

    ``rows``: how many places there are in all (t * k, if none is -1); a row without a place is left unwritten.
    ``weights``: [t, k], or with ``expert_tk`` [t, e], of a dtype of their own. Differentiable in x and weights. Raises
    ValueError for a place_tk or weights of another t, weights that are not [t, k] without expert_tk, and an expert_tk
    that is not shaped as place_tk.
    """
    t, k = x_th.shape[0], place_tk.shape[1]
    _check("permute", "place_tk", place_tk, (t, k))
    if expert_tk is not None:
        _check("permute", "expert_tk", expert_tk, (t, k))
    if weights is not None:
        _check("permute", "weights", weights, (t, k if expert_tk is None else weights.shape[-1]))
    others = {"place_tk": place_tk, "weights": weights, "expert_tk": expert_tk}
    given = {name: tensor for name, tensor in others.items() if tensor is not None}
    if dispatch.choose(impl, "permute", {"x_th": x_th}, given, kernels=("triton",)) == "torch":
        return permute_reference(x_th, place_tk, rows, weights, expert_tk)
    y_ph, carried_p = torch.ops.engine_kernels.moe_permute_fwd(
        x_th, place_tk, rows, weights, None if weights is None else expert_tk)
    return y_ph, None if weights is None else carried_p


def unpermute(y_ph: Tensor, place_tk: Tensor, weights_tk: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """The sum [t, h] of each token's rows of y [p, h], times its weights where they are given; zero without rows.

    ``weights_tk``: [t, k] of a dtype of their own. Differentiable in y and weights_tk (every row of y must be some
    token's). Raises ValueError if weights_tk is not shaped as place_tk.
    """
    if weights_tk is not None:
        _check("unpermute", "weights_tk", weights_tk, tuple(place_tk.shape))
    others = {"place_tk": place_tk} | ({} if weights_tk is None else {"weights_tk": weights_tk})
    if dispatch.choose(impl, "unpermute", {"y_ph": y_ph}, others, kernels=("triton",)) == "torch":
        return unpermute_reference(y_ph, place_tk, weights_tk)
    return torch.ops.engine_kernels.moe_unpermute_fwd(y_ph, place_tk, weights_tk)
