"""Attention by FlexAttention (Dong et al. 2024, arXiv:2412.05496): documents, windows and sinks in one Triton kernel.

Every query sees one run of keys, from the lowest that its document and its window allow to its own position. So one
mask serves all, and which blocks of 128 x 128 are empty, full or mixed follows from those two numbers: O(s t / 128)
beside the O(s t) of create_block_mask. A sink scales the result by exp(lse) / (exp(lse) + exp(sink)); FlexAttention
differentiates its lse.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from engine_kernels.attention_sdpa import Call

_BLOCK = 128


def block_mask(lowest_bs: Tensor, position_bs: Tensor, t: int) -> Any:
    """The mask lowest[b, q] <= key <= position[b, q] over t keys and its tables of blocks; one row serves any batch."""
    from torch.nn.attention.flex_attention import BlockMask

    (b, s), device = lowest_bs.shape, lowest_bs.device
    queries, keys = -(-s // _BLOCK), -(-t // _BLOCK)
    padding = queries * _BLOCK - s  # queries that see nothing, so that a block with them is never full
    lowest = torch.nn.functional.pad(lowest_bs, (0, padding), value=t).view(b, queries, _BLOCK, 1)
    position = torch.nn.functional.pad(position_bs, (0, padding), value=-1).view(b, queries, _BLOCK, 1)
    first = torch.arange(keys, device=device) * _BLOCK
    last = first + _BLOCK - 1
    some = ((lowest <= last) & (position >= first) & (lowest <= position)).any(2)
    full = ((lowest <= first) & (position >= last)).all(2)
    tables = []
    for blocks in (some & ~full, full):
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        tables += [blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]]

    def mask_mod(row, _head, query, key):
        place = (0, query) if b == 1 else (row, query)
        return (key >= lowest_bs[place]) & (key <= position_bs[place])

    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(s, t))


@functools.lru_cache(maxsize=32)
def _rows_mask(s: int, t: int, window: int | None, device: torch.device) -> Any:
    position_s = torch.arange(t - s, t, dtype=torch.int32, device=device)
    lowest_s = torch.zeros_like(position_s) if window is None else (position_s - window + 1).clamp(min=0)
    return block_mask(lowest_s[None], position_s[None], t)


@functools.lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """q [b, h, s, d], k and v [b, g, t, d] -> [b, h, s, d]. Compiled on a GPU; on a CPU unfused, and forward only."""
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")  # slow, so only here
    (_, h, s, _), (g, t) = q.shape, k.shape[1:3]
    documents = call.documents
    if documents is None:
        mask = _rows_mask(s, t, call.window, q.device)
    else:
        mask = documents.keep(("flex", call.window, q.device),
                              lambda: block_mask(*documents.lowest(call.window, q.device), t))
    function = _compiled() if q.device.type == "cuda" else module.flex_attention
    wanted = module.AuxRequest(lse=True) if call.sinks is not None else None
    result = function(q, k, v, block_mask=mask, scale=call.scale, enable_gqa=h != g, return_aux=wanted)
    if call.sinks is None:
        return result
    out, lse_bhs = result[0], result[1].lse
    return (out * torch.sigmoid(lse_bhs - call.sinks.to(lse_bhs.dtype)[:, None])[..., None]).to(q.dtype)
