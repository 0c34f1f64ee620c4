"""Tokens to their experts' rows and back: t tokens, e experts, k of each token, h hidden (d bytes an element).

sort_mask       reads the mask (t e bytes) and writes two tables of t k int64
chunks          writes an int64 place a row, from the sizes of 8 senders' chunks for each of their experts
permute         reads t h and writes t k h elements, with their fp32 weights and int64 places; backward reads t k h
                gradients and writes t h
unpermute       reads t k h and writes t h; backward reads t h and writes t k h, and reads t k h again where weights are
                multiplied in, for their gradient
dispatch        sort_mask and permute, as the token dispatchers call it: with Megatron's unfused functions, and
                Transformer Engine's where it is installed

Additions and products are few: 1 or 2 an element that is read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, optional
from engine_kernels.moe_permute import permute, permute_reference, unpermute, unpermute_reference
from engine_kernels.moe_sort import (
    sort_by_expert_reference,
    sort_mask,
    sort_mask_reference,
    transpose_chunks,
    transpose_chunks_reference,
)

# Mixtral 8x7B, Qwen3 30B, GPT-OSS 20B.
MODELS = {"full": [(16384, 8, 2, 4096), (16384, 128, 8, 2048), (16384, 32, 4, 2880)],
          "tiny": [(6, 8, 2, 40), (5, 9, 3, 24)]}


def _chosen(new: Any, t: int, e: int, k: int) -> Tensor:
    """Different experts for each token, [t, k]."""
    return (new.integers(0, e, t, 1) + torch.arange(k, device=new.device) * (e // k)) % e


def _mask(new: Any, t: int, e: int, k: int) -> Tensor:
    return torch.zeros(t, e, dtype=torch.bool, device=new.device).scatter_(1, _chosen(new, t, e, k), True)


def _places(new: Any, t: int, e: int, k: int) -> Tensor:
    return sort_by_expert_reference(_chosen(new, t, e, k), e)[1]


def _carry(function: Any, rows: int, x_th: Tensor, place_tk: Tensor, weights_tk: Tensor) -> Any:
    return function(x_th, place_tk, rows, weights_tk)


def _dispatch(sort: Any, carry: Any, k: int, x_th: Tensor, mask_te: Tensor, probs_te: Tensor):
    _, place_tk, expert_tk = sort(mask_te, k)
    return carry(x_th, place_tk, x_th.shape[0] * k, probs_te, expert_tk)


def _megatron(k: int):
    function = optional("megatron.core.transformer.moe.moe_utils", "permute")
    return {} if function is None else {"megatron": lambda x_th, mask_te, probs_te: function(
        x_th, mask_te, probs=probs_te, num_out_tokens=x_th.shape[0] * k)[:2]}


def _te(k: int):
    function = optional("transformer_engine.pytorch.permutation", "moe_permute_with_probs")
    return {} if function is None else {"te": lambda x_th, mask_te, probs_te: function(
        x_th, probs_te, mask_te, num_out_tokens=x_th.shape[0] * k)[:2]}


def _chunks(t: int, e: int, k: int) -> Case:
    """Equal chunks: of how many rows each is does not matter to the kernel."""
    each = -(-t * k // (8 * e))
    rows = 8 * e * each
    return Case("transpose_chunks", f"{rows} rows of 8 senders, {e} experts",
                lambda new: (new.integers(each, each + 1, 8, e),),
                {"ours": lambda sizes_sl: transpose_chunks(sizes_sl, rows, impl="triton"),
                 "eager": lambda sizes_sl: transpose_chunks_reference(sizes_sl, rows)},
                forward_bytes=8 * (rows + 8 * e), forward_flops=rows)


def _cases_of(t: int, e: int, k: int, h: int) -> list[Case]:
    size, d = f"{t} tokens {e}/{k} of {h} bfloat16", 2
    token, rows, places, weights = d * t * h, d * t * k * h, 8 * t * k, 4 * t * k

    def x(new):
        return new.normal(t, h, grad=True)

    def y(new):
        return new.normal(t * k, h, grad=True)

    def w(new, width=k):
        return new.normal(t, width, dtype=torch.float32, grad=True)

    return [
        Case("sort_mask", f"{t} tokens {e}/{k}", lambda new: (_mask(new, t, e, k),),
             {"ours": partial(sort_mask, top_k=k, impl="triton"), "eager": partial(sort_mask_reference, top_k=k)},
             forward_bytes=t * e + 2 * places, forward_flops=t * e),
        _chunks(t, e, k),
        Case("permute", size, lambda new: (x(new), _places(new, t, e, k), w(new)),
             {"ours": partial(_carry, partial(permute, impl="triton"), t * k),
              "eager": partial(_carry, permute_reference, t * k)},
             forward_bytes=token + rows + places + 2 * weights, forward_flops=0,
             backward_bytes=token + rows + places + 2 * weights, backward_flops=t * k * h),
        Case("unpermute", size, lambda new: (y(new), _places(new, t, e, k)),
             {"ours": partial(unpermute, impl="triton"), "eager": unpermute_reference},
             forward_bytes=token + rows + places, forward_flops=t * k * h,
             backward_bytes=token + rows + places, backward_flops=0),
        Case("weighted_unpermute", size, lambda new: (y(new), _places(new, t, e, k), w(new)),
             {"ours": partial(unpermute, impl="triton"), "eager": unpermute_reference},
             forward_bytes=token + rows + places + weights, forward_flops=2 * t * k * h,
             backward_bytes=token + 2 * rows + places + 2 * weights, backward_flops=3 * t * k * h),
        Case("dispatch", size, lambda new: (x(new), _mask(new, t, e, k), w(new, e)),
             {"ours": partial(_dispatch, partial(sort_mask, impl="triton"), partial(permute, impl="triton"), k),
              "eager": partial(_dispatch, sort_mask_reference, permute_reference, k), **_megatron(k), **_te(k)},
             forward_bytes=t * e + token + rows + 2 * weights, forward_flops=t * e,
             backward_bytes=token + rows + weights + 4 * t * e, backward_flops=t * k * h),
    ]


def cases(scale: str) -> list[Case]:
    return [case for model in MODELS[scale] for case in _cases_of(*model)]
