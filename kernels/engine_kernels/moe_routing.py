"""A router's choice of experts, the weights of the chosen ones, and the sums its auxiliary losses need, in one pass.

    softmax_after_topk   w = softmax of the k largest logits                    (Mixtral, arXiv:2401.04088; GPT-OSS)
    softmax_before_topk  w = softmax of all logits, the k largest of it         (Switch, arXiv:2101.03961; Qwen3)
    sigmoid              w = s_i / (sum of the k chosen s + 1e-20), s = sigmoid (DeepSeek-V3, arXiv:2412.19437; w = s
                         for k = 1); experts are chosen by s + expert_bias, which has no part in the weights

each times scaling_factor. An expert's share of a token's scores: the softmax of all logits, or s / (sum of s + 1e-20).

Shapes: t tokens, e experts, k chosen, b sequences; token t belongs to sequence t % b, as in Megatron's [s, b] order.
The k largest are taken one after the other, the lowest index first among equals; NaN counts as the largest number, so
every token has k different experts whatever its logits are. Without a bias, softmax and sigmoid keep the logits' order:
the choice is by logits, which rounding cannot make equal. All arithmetic is in fp32 (fp64 for fp64 logits).
Sums over tokens are partial sums of the programs, added in order: deterministic on a GPU. Backward reads the logits
again and keeps nothing else but the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton

ROUTERS = ("softmax_after_topk", "softmax_before_topk", "sigmoid")
_AFTER, _BEFORE, _SIGMOID = range(3)
_TINY = 1e-20


class Routing(NamedTuple):
    """What `route` returns. ``share_be``, ``counts_be``, ``balanced_be``, ``squares_b`` have no rows without sequences.

    ``weights``, ``chosen``: [t, k], best first (indices int64), or with ``dense`` [t, e] (zero where not chosen; bool).
    ``share_be``: the sum over each sequence's tokens of every expert's share; divide by its length for the mean.
    ``counts_be``: choices, int64; ``balanced_be``: those that the scores alone would have made, without expert_bias.
    ``squares_b``: the sum over each sequence's tokens of logsumexp(logits)^2.
    """

    weights: Tensor
    chosen: Tensor
    share_be: Tensor
    counts_be: Tensor
    balanced_be: Tensor
    squares_b: Tensor


def _largest(scores_te: Tensor, top_k: int) -> Tensor:
    """Indices of the k largest [t, k]; torch.topk leaves the order of equals open, a stable sort does not."""
    return scores_te.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def route_reference(logits_te: Tensor, *, top_k: int, router: str, expert_bias_e: Tensor | None = None,
                    scaling_factor: float = 1.0, sequences: int = 0, dense: bool = False) -> Routing:
    """`route` in plain torch."""
    wide_te, e = logits_te.to(jit.wide_dtype(logits_te)), logits_te.shape[1]
    scores_te = wide_te.sigmoid() if router == "sigmoid" else wide_te.softmax(-1)
    own_tk = chosen_tk = _largest(wide_te, top_k)
    if expert_bias_e is not None:
        chosen_tk = _largest(scores_te + expert_bias_e.to(wide_te.dtype), top_k)
    weights_tk = (wide_te if router == "softmax_after_topk" else scores_te).gather(1, chosen_tk)
    if router == "softmax_after_topk":
        weights_tk = weights_tk.softmax(-1)
    elif router == "sigmoid" and top_k > 1:  # a single normalised weight would always be 1
        weights_tk = weights_tk / (weights_tk.sum(-1, keepdim=True) + _TINY)
    weights_tk = weights_tk * scaling_factor
    mask_te = torch.zeros_like(logits_te, dtype=torch.bool).scatter_(1, chosen_tk, True)
    weights = torch.zeros_like(wide_te).scatter(1, chosen_tk, weights_tk) if dense else weights_tk
    chosen = mask_te if dense else chosen_tk
    if not sequences:
        none = chosen_tk.new_empty(0, e)
        return Routing(weights, chosen, wide_te[:0], none, none, wide_te[:0, 0])
    share_te = scores_te / (scores_te.sum(-1, keepdim=True) + _TINY) if router == "sigmoid" else scores_te
    own_te = torch.zeros_like(mask_te).scatter_(1, own_tk, True)
    share_be, counts_be, balanced_be = (x.unflatten(0, (-1, sequences)).sum(0) for x in (share_te, mask_te, own_te))
    squares_b = wide_te.logsumexp(-1).square().view(-1, sequences).sum(0)
    return Routing(weights, chosen, share_be, counts_be, balanced_be, squares_b)


@triton.jit
def _ranks(x, valid, column, K, E: tl.constexpr, DOUBLE: tl.constexpr):
    """At which of K picks of the row's largest each number is taken; K where it is not. E: padded columns.

    Picks compare integers in the order of the floats: with NaN made the largest, none is equal to the mark of the
    taken, so that nothing is taken twice.
    """
    x = tl.where(x == 0.0, 0.0, x)  # of both zeros
    if DOUBLE:
        bits = x.to(tl.int64, bitcast=True)
        key = tl.where(x != x, 0x7FFFFFFFFFFFFFFF, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
        taken = tl.full(x.shape, -0x8000000000000000, tl.int64)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        taken = tl.full(x.shape, -0x80000000, tl.int32)
    key = tl.where(valid, key, taken)
    rank = tl.full(x.shape, 0, tl.int32) + K
    for pick in range(K):
        largest = tl.max(key, 1)
        first = tl.min(tl.where(key == largest[:, None], column[None, :], E), 1)
        hit = column[None, :] == first[:, None]
        rank = tl.where(hit, pick, rank)
        key = tl.where(hit, taken, key)
    return rank


@triton.jit
def _forward_kernel(
    logits_ptr, bias_ptr, weights_ptr, chosen_ptr, share_ptr, counts_ptr, squares_ptr, length, e, stride, scale, K,
    ROUTER: tl.constexpr, BIASED: tl.constexpr, NORMALISED: tl.constexpr, DENSE: tl.constexpr, SUMS: tl.constexpr,
    WIDE: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
):
    """A program walks over blocks of one sequence's tokens and keeps its sums, which it writes at the end."""
    b, batch = tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, E)
    share_sum, squares_sum = tl.zeros((ROWS, E), dtype=WIDE), tl.zeros((ROWS,), dtype=WIDE)
    counted, balanced = tl.zeros((ROWS, E), dtype=tl.int32), tl.zeros((ROWS, E), dtype=tl.int32)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        place = first + tl.arange(0, ROWS)
        token = place.to(tl.int64) * batch + b
        valid = (column < e)[None, :]
        inside = (place < length)[:, None] & valid
        x = tl.load(logits_ptr + token[:, None] * stride + column[None, :], mask=inside, other=0.0).to(WIDE)
        largest = tl.max(tl.where(valid, x, float("-inf")), 1)
        power = tl.where(valid, tl.exp(x - largest[:, None]), 0.0)
        total = tl.sum(power, 1)
        scores = tl.where(valid, 1.0 / (1.0 + tl.exp(-x)), 0.0) if ROUTER == 2 else power / total[:, None]
        if BIASED:
            bias = tl.load(bias_ptr + column, mask=column < e, other=0.0).to(WIDE)
            rank = _ranks(scores + bias[None, :], valid, column, K, E, DOUBLE)
        else:
            rank = _ranks(x, valid, column, K, E, DOUBLE)
        taken = rank < K
        if ROUTER == 0:
            top = tl.max(tl.where(taken, x, float("-inf")), 1)
            weights = tl.where(taken, tl.exp(x - top[:, None]), 0.0)
            weights = weights / tl.sum(weights, 1)[:, None]
        else:
            weights = tl.where(taken, scores, 0.0)
            if NORMALISED:
                weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
        weights = tl.where(taken, weights * scale, 0.0)
        if DENSE:
            tl.store(weights_ptr + token[:, None] * e + column[None, :], weights, mask=inside)
            tl.store(chosen_ptr + token[:, None] * e + column[None, :], taken, mask=inside)
        else:
            tl.store(weights_ptr + token[:, None] * K + rank, weights, mask=taken & inside)
            tl.store(chosen_ptr + token[:, None] * K + rank, tl.zeros_like(rank) + column[None, :],
                     mask=taken & inside)
        if SUMS:
            shares = scores / (tl.sum(scores, 1) + 1e-20)[:, None] if ROUTER == 2 else scores
            share_sum += tl.where(inside, shares, 0.0)
            counted += (taken & inside).to(tl.int32)
            if BIASED:
                balanced += ((_ranks(x, valid, column, K, E, DOUBLE) < K) & inside).to(tl.int32)
            logsum = largest + tl.log(total)
            squares_sum += tl.where(place < length, logsum * logsum, 0.0)
    if SUMS:
        cell = tl.program_id(0) * batch + b
        tl.store(share_ptr + cell * e + column, tl.sum(share_sum, 0), mask=column < e)
        tl.store(counts_ptr + cell * 2 * e + column, tl.sum(counted, 0), mask=column < e)
        if BIASED:
            tl.store(counts_ptr + (cell * 2 + 1) * e + column, tl.sum(balanced, 0), mask=column < e)
        tl.store(squares_ptr + cell, tl.sum(squares_sum, 0))


@triton.jit
def _backward_kernel(
    logits_ptr, chosen_ptr, dweights_ptr, dshare_ptr, dsquares_ptr, dlogits_ptr, length, e, stride, dstride, scale, K,
    ROUTER: tl.constexpr, NORMALISED: tl.constexpr, DENSE: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, E: tl.constexpr,
):
    b, batch = tl.program_id(1), tl.num_programs(1)
    column, place = tl.arange(0, E), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = place.to(tl.int64) * batch + b
    valid = (column < e)[None, :]  # rows past the end compute something, and store nothing
    inside = (place < length)[:, None] & valid
    x = tl.load(logits_ptr + token[:, None] * stride + column[None, :], mask=inside, other=0.0).to(WIDE)
    if DENSE:
        at = token[:, None] * e + column[None, :]
        taken = (tl.load(chosen_ptr + at, mask=inside, other=1) != 0) & valid
        dweights = tl.load(dweights_ptr + token[:, None] * dstride + column[None, :], mask=inside & taken, other=0.0)
        dweights = dweights.to(WIDE)
    else:
        taken, dweights = tl.zeros((ROWS, E), dtype=tl.int32) != 0, tl.zeros((ROWS, E), dtype=WIDE)
        for i in range(K):
            expert = tl.load(chosen_ptr + token * K + i, mask=place < length, other=0)
            dweight = tl.load(dweights_ptr + token * dstride + i, mask=place < length, other=0.0).to(WIDE)
            hit = column[None, :] == expert[:, None]
            taken = taken | hit
            dweights = tl.where(hit, dweight[:, None], dweights)
    dweights = dweights * scale
    largest = tl.max(tl.where(valid, x, float("-inf")), 1)
    power = tl.where(valid, tl.exp(x - largest[:, None]), 0.0)
    total = tl.sum(power, 1)
    soft = power / total[:, None]  # of all logits
    dshare = tl.load(dshare_ptr + b * e + column, mask=(column < e) & SUMS, other=0.0)[None, :]
    if ROUTER == 2:
        scores = tl.where(valid, 1.0 / (1.0 + tl.exp(-x)), 0.0)
        dscores = dweights
        if NORMALISED:
            chosen_sum = (tl.sum(tl.where(taken, scores, 0.0), 1) + 1e-20)[:, None]
            mean = tl.sum(dweights * scores, 1)[:, None] / chosen_sum
            dscores = tl.where(taken, (dweights - mean) / chosen_sum, 0.0)
        if SUMS:
            score_sum = (tl.sum(scores, 1) + 1e-20)[:, None]
            dscores += (dshare - tl.sum(dshare * scores, 1)[:, None] / score_sum) / score_sum
        dx = dscores * scores * (1.0 - scores)
    elif ROUTER == 1:
        dscores = dweights + dshare if SUMS else dweights
        dx = soft * (dscores - tl.sum(dscores * soft, 1)[:, None])
    else:
        top = tl.max(tl.where(taken, x, float("-inf")), 1)
        few = tl.where(taken, tl.exp(x - top[:, None]), 0.0)
        few = few / tl.sum(few, 1)[:, None]
        dx = few * (dweights - tl.sum(dweights * few, 1)[:, None])
        if SUMS:
            dx += soft * (dshare - tl.sum(dshare * soft, 1)[:, None])
    if SUMS:
        dx += soft * (2.0 * (largest + tl.log(total)) * tl.load(dsquares_ptr + b))[:, None]
    tl.store(dlogits_ptr + token[:, None] * e + column[None, :], dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


def _blocks(e: int) -> dict[str, int]:
    """Rows and columns of a block of about 1024 elements, 8 a thread: a token's picks are a chain of reductions."""
    columns = jit.next_power_of_2(e)
    return {"ROWS": max(1, 1024 // columns), "E": columns, "num_warps": min(16, max(4, columns // 256))}


@torch.library.custom_op("engine_kernels::route_fwd", mutates_args=())
def _forward(logits_te: Tensor, expert_bias_e: Tensor | None, top_k: int, router: int, scale: float, sequences: int,
             dense: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> weights, chosen, share_be, counts_cbe (the choice's and, with a bias, the scores' own), squares_b."""
    weights, chosen, share_be, counts_cbe, squares_b = _outputs(
        logits_te, expert_bias_e, top_k, router, scale, sequences, dense)
    t, e = logits_te.shape
    if not t:
        return weights, chosen, share_be.zero_(), counts_cbe.zero_(), squares_b.zero_()
    blocks, batch, x_te = _blocks(e), max(1, sequences), dispatch.as_rows(logits_te)
    programs = min(jit.cdiv(t // batch, blocks["ROWS"]), max(1, 4 * jit.multiprocessors(logits_te) // batch))
    share_pbe = weights.new_empty(programs, *share_be.shape)
    squares_pb = weights.new_empty(programs, *squares_b.shape)
    counts_pbce = chosen.new_empty(programs, batch, 2, e, dtype=torch.int32)
    biased = expert_bias_e is not None
    launch(_forward_kernel, (programs, batch), x_te, expert_bias_e.contiguous() if biased else x_te, weights, chosen,
           share_pbe, counts_pbce, squares_pb, t // batch, e, x_te.stride(0), scale, top_k,
           ROUTER=router, BIASED=biased, NORMALISED=router == _SIGMOID and top_k > 1, DENSE=dense, SUMS=sequences > 0,
           WIDE=jit.wide(logits_te), DOUBLE=logits_te.dtype == torch.float64, **blocks)
    if sequences:
        share_be, squares_b = share_pbe.sum(0), squares_pb.sum(0)
        counts_cbe = counts_pbce[:, :, : 2 if biased else 1].sum(0).transpose(0, 1).contiguous()
    return weights, chosen, share_be, counts_cbe, squares_b


@_forward.register_fake
def _outputs(logits_te, expert_bias_e, top_k, router, scale, sequences, dense):
    (t, e), wide = logits_te.shape, jit.wide_dtype(logits_te)
    width = e if dense else top_k
    return (logits_te.new_empty(t, width, dtype=wide),
            logits_te.new_empty(t, width, dtype=torch.bool if dense else torch.int64),
            logits_te.new_empty(sequences, e, dtype=wide),
            logits_te.new_empty(1 if expert_bias_e is None else 2, sequences, e, dtype=torch.int64),
            logits_te.new_empty(sequences, dtype=wide))


@torch.library.custom_op("engine_kernels::route_bwd", mutates_args=())
def _backward(dweights: Tensor, dshare_be: Tensor, dsquares_b: Tensor, logits_te: Tensor, chosen: Tensor, top_k: int,
              router: int, scale: float, sequences: int, dense: bool) -> Tensor:
    """-> dlogits_te, contiguous."""
    dlogits_te = logits_te.new_empty(logits_te.shape)
    (t, e), blocks, batch = logits_te.shape, _blocks(logits_te.shape[1]), max(1, sequences)
    x_te, dweights = dispatch.as_rows(logits_te), dispatch.as_rows(dweights)
    launch(_backward_kernel, (jit.cdiv(t // batch, blocks["ROWS"]), batch), x_te, chosen, dweights,
           dshare_be.contiguous(), dsquares_b.contiguous(), dlogits_te, t // batch, e, x_te.stride(0),
           dweights.stride(0), scale, top_k, ROUTER=router, NORMALISED=router == _SIGMOID and top_k > 1, DENSE=dense,
           SUMS=sequences > 0, WIDE=jit.wide(logits_te), **blocks)
    return dlogits_te


@_backward.register_fake
def _(dweights, dshare_be, dsquares_b, logits_te, chosen, top_k, router, scale, sequences, dense):
    return logits_te.new_empty(logits_te.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits_te, _, *ctx.options = inputs
    ctx.save_for_backward(logits_te, output[1])
    ctx.mark_non_differentiable(output[1], output[3])


def _autograd(ctx, dweights: Tensor, _dchosen, dshare_be: Tensor, _dcounts, dsquares_b: Tensor):
    dlogits_te = torch.ops.engine_kernels.route_bwd(dweights, dshare_be, dsquares_b, *ctx.saved_tensors, *ctx.options)
    return dlogits_te, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)


def route(logits_te: Tensor, *, top_k: int, router: str, expert_bias_e: Tensor | None = None,
          scaling_factor: float = 1.0, sequences: int = 0, dense: bool = False, impl: str = "auto") -> Routing:
    """Choose ``top_k`` experts for each token by logits [t, e] of any float dtype: `Routing`, by the formulas above.

    ``sequences``: how many are interleaved in t; with 0 nothing is summed. ``dense``: weights and choice as [t, e], as
    Megatron passes them on. Everything but integers is in fp32 (fp64 for fp64 logits) and differentiable in the logits.
    Raises ValueError for an unknown router, a top_k that is not in 1..e, an expert_bias_e [e] that is misshapen or not
    for sigmoid, and a t that ``sequences`` does not divide.
    """
    (t, e) = logits_te.shape
    if router not in ROUTERS:
        raise ValueError(f"route: router must be one of {', '.join(ROUTERS)}, not {router!r}")
    if not 1 <= top_k <= e:
        raise ValueError(f"route: top_k is {top_k}, needs 1 to {e} for logits_te {tuple(logits_te.shape)}")
    if sequences and t % sequences:
        raise ValueError(f"route: sequences is {sequences}, which does not divide the {t} rows of logits_te")
    if expert_bias_e is not None and (router != "sigmoid" or expert_bias_e.shape != (e,)):
        raise ValueError(f"route: expert_bias_e has shape {tuple(expert_bias_e.shape)} and router is {router}; "
                         f"needs {(e,)} and sigmoid")
    others = {} if expert_bias_e is None else {"expert_bias_e": expert_bias_e}
    if dispatch.choose(impl, "route", {"logits_te": logits_te}, others, kernels=("triton",)) == "torch":
        return route_reference(logits_te, top_k=top_k, router=router, expert_bias_e=expert_bias_e,
                               scaling_factor=scaling_factor, sequences=sequences, dense=dense)
    weights, chosen, share_be, counts_cbe, squares_b = torch.ops.engine_kernels.route_fwd(
        logits_te, expert_bias_e, top_k, ROUTERS.index(router), scaling_factor, sequences, dense)
    return Routing(weights, chosen, share_be, counts_cbe[0], counts_cbe[-1], squares_b)
