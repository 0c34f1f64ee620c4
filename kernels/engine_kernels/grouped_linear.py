"""Linear layers of experts, differentiable: y_p = x_p W_e^T + s_p b_e, e the expert of row p.

Gradients: those of ``grouped_gemm``, and db_e = sum over e's rows of s_p dy_p,  ds_p = dy_p . b_e.

Shapes: p rows in expert order, e experts, k inputs and m outputs of an expert, n blocks of outputs. s, where given, is
what the router weighs a row with: a bias is added once it was multiplied in. ``tokens_per_expert_e`` stays on the
device. Sums are in fp32 (fp64 for fp64), without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.grouped_gemm import Weights, choose, contiguous, located, own_tensor, rows_of
from engine_kernels.jit import launch, tl, triton


def grouped_linear_reference(x_pk: Tensor, weights: Weights, tokens_per_expert_e: Tensor,
                             biases: Weights | None = None, scale_p: Tensor | None = None) -> Tensor:
    """The formula in plain torch, one expert after the other; rows past the last expert's are zeros."""
    total, parts = 0, []
    for i, tokens in enumerate(tokens_per_expert_e.tolist()):
        y = x_pk[total:total + tokens] @ weights[i].t()
        if biases is not None:
            scale = 1.0 if scale_p is None else scale_p[total:total + tokens, None]
            y = (y + biases[i] * scale).to(x_pk.dtype)
        parts.append(y)
        total += tokens
    return torch.cat([*parts, x_pk.new_zeros(x_pk.shape[0] - total, weights[0].shape[0])])


@triton.jit
def _bias_kernel(
    dy_ptr, bias_at, scale_ptr, dbias_ptr, dscale_ptr, tokens_ptr, p, e, m, dy_stride, bias_stride,
    STACKED: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Of one expert and block of columns: db, and the columns' part of its rows' ds."""
    expert, block = tl.program_id(0), tl.program_id(1)
    first_row = 0
    for before in range(expert):
        first_row = tl.minimum(first_row + tl.load(tokens_ptr + before).to(tl.int32), p)
    end_row = tl.minimum(first_row + tl.load(tokens_ptr + expert).to(tl.int32), p)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    bias_ptr = own_tensor(bias_at, expert, bias_stride, True, dy_ptr, STACKED, False)
    bias = tl.load(bias_ptr + column, mask=column < m, other=0.0).to(WIDE)
    sums = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    for first in range(first_row, end_row, ROWS):
        row = first + tl.arange(0, ROWS)
        dy = tl.load(dy_ptr + row.to(tl.int64)[:, None] * dy_stride + column[None, :],
                     mask=(row < end_row)[:, None] & (column < m)[None, :], other=0.0).to(WIDE)
        if SCALE:
            tl.store(dscale_ptr + tl.cast(block, tl.int64) * p + row, tl.sum(dy * bias[None, :], 1), mask=row < end_row)
            dy = dy * tl.load(scale_ptr + row, mask=row < end_row, other=0.0).to(WIDE)[:, None]
        sums += dy
    place = dbias_ptr + tl.cast(expert, tl.int64) * m + column
    tl.store(place, tl.sum(sums, 0).to(dbias_ptr.dtype.element_ty), mask=column < m)


def _bias_gradients(dy: Tensor, biases: Sequence[Tensor], scale_p: Tensor | None, tokens_e: Tensor
                    ) -> tuple[Tensor, Tensor]:
    dy_pm, e = dispatch.as_rows(dy), tokens_e.numel()
    p, m = dy_pm.shape
    columns = min(128, jit.next_power_of_2(m))
    blocks = jit.cdiv(m, columns)
    bias_at, bias_stride, stacked, _ = located(biases, 1)
    dbias_em = dy.new_empty(e, m)
    dscale_np = dy.new_zeros(blocks, p if scale_p is not None else 0, dtype=jit.wide_dtype(dy))
    launch(_bias_kernel, (e, blocks), dy_pm, bias_at, dy_pm if scale_p is None else scale_p.contiguous(), dbias_em,
           dscale_np, tokens_e, p, e, m, dy_pm.stride(0), bias_stride,
           STACKED=stacked, SCALE=scale_p is not None, WIDE=jit.wide(dy), ROWS=32, COLUMNS=columns, num_warps=4)
    return dbias_em, dscale_np.sum(0)


@torch.library.custom_op("engine_kernels::grouped_linear_bias_bwd", mutates_args=())
def _bias_bwd(dy: Tensor, biases: Sequence[Tensor], scale_p: Tensor | None, tokens_per_expert_e: Tensor
              ) -> tuple[Tensor, Tensor]:
    """-> db [e, m] and, with a scale, ds [p] in fp32 (fp64 for fp64), else an empty one."""
    return _bias_gradients(dy, biases, scale_p, tokens_per_expert_e)


@_bias_bwd.register_fake
def _(dy, biases, scale_p, tokens_per_expert_e):
    ds_p = dy.new_empty(0 if scale_p is None else dy.shape[0], dtype=jit.wide_dtype(dy))
    return dy.new_empty(tokens_per_expert_e.shape[0], dy.shape[1]), ds_p


def bias_gradients(dy_pm: Tensor, biases: Weights, scale_p: Tensor | None, tokens_per_expert_e: Tensor, *,
                   impl: str = "auto") -> tuple[Sequence[Tensor], Tensor | None]:
    """-> db, e of [m], and ds [p] where there is a scale."""
    if choose(impl, "bias_gradients", dy_pm, {"biases": biases[0]}, tokens_per_expert_e) == "triton":
        db_em, ds_p = torch.ops.engine_kernels.grouped_linear_bias_bwd(dy_pm, contiguous(biases), scale_p,
                                                                       tokens_per_expert_e)
        return db_em.unbind(0), None if scale_p is None else ds_p.to(scale_p.dtype)
    own, rest = rows_of(dy_pm, tokens_per_expert_e)
    if scale_p is None:
        return [dy.sum(0) for dy in own], None
    scales, wide = rows_of(scale_p, tokens_per_expert_e)[0], jit.wide_dtype(dy_pm)
    db = [(dy * scale[:, None]).sum(0).to(dy.dtype) for dy, scale in zip(own, scales, strict=True)]
    ds = [(dy.to(wide) * biases[i]).sum(1) for i, dy in enumerate(own)]
    return db, torch.cat([*ds, rest.new_zeros(rest.shape[0], dtype=wide)]).to(scale_p.dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, weights, biases, scale_p, tokens_e = inputs
    ctx.weights, ctx.biases, ctx.scaled = len(weights), len(biases), scale_p is not None
    ctx.save_for_backward(x, tokens_e, scale_p, *weights, *biases)


def _autograd(ctx, dy: Tensor):
    x, tokens_e, scale_p, *parameters = ctx.saved_tensors
    weights, biases = parameters[:ctx.weights], parameters[ctx.weights:]
    needs_x, needs_weights, needs_biases, needs_scale, _ = ctx.needs_input_grad
    ops = torch.ops.engine_kernels
    dx = ops.grouped_linear_dgrad(dy, weights, tokens_e) if needs_x else None
    dweights, dbiases, dscale = [None] * len(weights), [None] * len(biases), None
    if any(needs_weights):
        dw_emk = ops.grouped_linear_wgrad(dy, x, tokens_e)
        dweights = [dw_emk] if weights[0].dim() == 3 else list(dw_emk.unbind(0))
    if biases and (any(needs_biases) or needs_scale):
        db_em, ds_p = ops.grouped_linear_bias_bwd(dy, biases, scale_p, tokens_e)
        dbiases = [db_em] if biases[0].dim() == 2 else list(db_em.unbind(0))
        dscale = None if scale_p is None else ds_p.to(scale_p.dtype)
    return dx, dweights, dbiases, dscale, None


torch.library.register_autograd("engine_kernels::grouped_linear_fwd", _autograd, setup_context=_setup_context)


def _check(x_pk: Tensor, weights: Weights, tokens_e: Tensor, biases: Weights | None, scale_p: Tensor | None) -> None:
    e, k = tokens_e.numel(), x_pk.shape[-1]
    if x_pk.dim() != 2 or tokens_e.dim() != 1 or not e or tokens_e.is_floating_point():
        raise ValueError(f"grouped_linear: x_pk must be [p, k] and tokens_per_expert_e integers [e], not "
                         f"{tuple(x_pk.shape)} and {tokens_e.dtype} {tuple(tokens_e.shape)}")
    for name, found, shape in (("weights", weights, (weights[0].shape[0], k)),
                               ("biases", biases, (weights[0].shape[0],))):
        if found is None:
            continue
        if len(found) != e:
            raise ValueError(f"grouped_linear: {len(found)} {name} for {e} experts of tokens_per_expert_e")
        for i in range(e):
            if found[i].shape != shape or found[i].dtype != x_pk.dtype:
                raise ValueError(f"grouped_linear: {name}[{i}] is {found[i].dtype} {tuple(found[i].shape)}, needs "
                                 f"{x_pk.dtype} {tuple(shape)}")
    if scale_p is not None and (biases is None or scale_p.shape != x_pk.shape[:1]):
        raise ValueError("grouped_linear: scale_p must be [p], and scales the biases")


def grouped_linear(x_pk: Tensor, weights: Weights, tokens_per_expert_e: Tensor, biases: Weights | None = None,
                   scale_p: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x [p, k], its rows in expert order, through each expert's layer -> [p, m], zeros past the last expert's rows.

    ``weights``: a [m, k] for each expert or one [e, m, k]; ``biases``: [m] or [e, m], as the weights are;
    ``scale_p``: what multiplies the bias in a row. Differentiable in all of them; gradients of frozen ones are not
    computed. impl "cpu" is "torch", a loop over the experts. Raises ValueError for shapes and dtypes that do not fit.
    """
    _check(x_pk, weights, tokens_per_expert_e, biases, scale_p)
    others = {"weights": weights[0]} | ({} if biases is None else {"biases": biases[0]})
    if choose(impl, "grouped_linear", x_pk, others, tokens_per_expert_e) == "torch":
        return grouped_linear_reference(x_pk, weights, tokens_per_expert_e, biases, scale_p)
    return torch.ops.engine_kernels.grouped_linear_fwd(
        x_pk, contiguous(weights), [] if biases is None else contiguous(biases), scale_p, tokens_per_expert_e)
