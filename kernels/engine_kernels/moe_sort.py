"""Where each token's copies go when tokens are sorted by expert: integers only, nothing waits for the device.

A counting sort, stable by token: programs count the choices of their stretch of tokens, a sum over those before
(experts first, then stretches) says where each begins, and a second pass gives out the places.

Shapes: t tokens, e experts, k places of a token, p sorted rows (as many as choices). Places are int64 rows in 0..p-1;
-1 where a token has no more. Both sorts are exact, so there is one result whatever the number of programs.

With expert parallelism rows also arrive in chunks, one for each sender and local expert; `transpose_chunks` gives their
places by expert first, then sender.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton


def _places(mask_te: Tensor) -> tuple[Tensor, Tensor]:
    """-> choices of each expert, and the place of each choice (what is not chosen has a meaningless one)."""
    counts_e = mask_te.sum(0)
    before_te = mask_te.cumsum(0) - mask_te.long()
    return counts_e, before_te + (counts_e.cumsum(0) - counts_e)


def sort_by_expert_reference(chosen_tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_by_expert` in plain torch."""
    t, k = chosen_tk.shape
    mask_te = torch.zeros(t, num_experts, dtype=torch.bool, device=chosen_tk.device).scatter_(1, chosen_tk, True)
    counts_e, place_te = _places(mask_te)
    place_tk = place_te.gather(1, chosen_tk)
    source_p = torch.empty(t * k, dtype=torch.int64, device=chosen_tk.device)
    source_p[place_tk.flatten()] = torch.arange(t, device=chosen_tk.device).repeat_interleave(k)
    return counts_e, place_tk, source_p


def sort_mask_reference(mask_te: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_mask` in plain torch."""
    counts_e, place_te = _places(mask_te)
    expert_tk = mask_te.long().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    has_tk = torch.arange(top_k, device=mask_te.device) < mask_te.sum(1, keepdim=True)
    return counts_e, place_te.gather(1, expert_tk).where(has_tk, -1), expert_tk.where(has_tk, -1)


def transpose_chunks_reference(sizes_sl: Tensor, rows: int) -> Tensor:
    """`transpose_chunks` in plain torch."""
    size_c, turned_c = sizes_sl.flatten(), sizes_sl.t().flatten()
    start_sl = (turned_c.cumsum(0) - turned_c).view(sizes_sl.shape[::-1]).t()
    shift_c = start_sl.flatten() - (size_c.cumsum(0) - size_c)
    return torch.arange(rows, device=sizes_sl.device) + shift_c.repeat_interleave(size_c, output_size=rows)


@triton.jit
def _chosen(choice_ptr, token, t, e, stride, K, column, MASK: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr):
    """Of each token and expert, the choice's number in its row; K or more where it is not chosen."""
    if MASK:
        inside = (token < t)[:, None] & (column < e)[None, :]
        mask = tl.load(choice_ptr + token[:, None] * stride + column[None, :], mask=inside, other=0) != 0
        rank = tl.where(mask, tl.cumsum(mask.to(tl.int32), 1) - 1, K)
    else:
        rank = tl.full((ROWS, E), 0, tl.int32) + K
        for i in range(K):
            expert = tl.load(choice_ptr + token * stride + i, mask=token < t, other=-1)
            rank = tl.where(column[None, :] == expert[:, None], i, rank)
    return rank


@triton.jit
def _count_kernel(choice_ptr, counts_ptr, t, e, stride, K, stretch, MASK: tl.constexpr, ROWS: tl.constexpr,
                  E: tl.constexpr):
    """counts [e, programs]: of each expert in the program's stretch of tokens."""
    column = tl.arange(0, E)
    counted = tl.zeros((ROWS, E), dtype=tl.int32)
    for first in range(0, stretch, ROWS):
        offset = first + tl.arange(0, ROWS)
        token = tl.program_id(0).to(tl.int64) * stretch + offset
        token = tl.where(offset < stretch, token, t)
        counted += (_chosen(choice_ptr, token, t, e, stride, K, column, MASK, ROWS, E) < K).to(tl.int32)
    tl.store(counts_ptr + column * tl.num_programs(0) + tl.program_id(0), tl.sum(counted, 0), mask=column < e)


@triton.jit
def _place_kernel(
    choice_ptr, ends_ptr, counts_ptr, place_ptr, other_ptr, t, e, stride, K, stretch,
    MASK: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
):
    """``other``: the expert of each place [t, k] for a mask, else the token of each sorted row [p]."""
    column, program = tl.arange(0, E), tl.program_id(0)
    at = column * tl.num_programs(0) + program
    start = tl.load(ends_ptr + at, mask=column < e, other=0) - tl.load(counts_ptr + at, mask=column < e, other=0)
    for first in range(0, stretch, ROWS):
        offset = first + tl.arange(0, ROWS)
        token = program.to(tl.int64) * stretch + offset
        token = tl.where(offset < stretch, token, t)
        rank = _chosen(choice_ptr, token, t, e, stride, K, column, MASK, ROWS, E)
        hit = (rank < K).to(tl.int32)
        place = start[None, :] + tl.cumsum(hit, 0) - hit
        cell = token[:, None] * K + rank
        tl.store(place_ptr + cell, place, mask=rank < K)
        if MASK:
            tl.store(other_ptr + cell, tl.zeros_like(rank) + column[None, :], mask=rank < K)
            free = tl.sum(hit, 1)
            for i in range(K):
                tl.store(place_ptr + token * K + i, -1, mask=(i >= free) & (token < t))
                tl.store(other_ptr + token * K + i, -1, mask=(i >= free) & (token < t))
        else:
            tl.store(other_ptr + place, tl.zeros_like(place) + token[:, None], mask=rank < K)
        start += tl.sum(hit, 0)


@triton.jit
def _transpose_kernel(sizes_ptr, place_ptr, rows, senders, experts, C: tl.constexpr, ROWS: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    size = tl.load(sizes_ptr + chunk, mask=chunk < senders * experts, other=0)
    # Chunks that end before the row: its own is the next.
    earlier = (tl.cumsum(size, 0)[None, :] <= row[:, None]) & (chunk < senders * experts)[None, :]
    own = tl.sum(earlier.to(tl.int32), 1)[:, None]
    expert, sender = (chunk % experts)[None, :], (chunk // experts)[None, :]
    before = (expert < own % experts) | ((expert == own % experts) & (sender < own // experts))
    place = row + tl.sum(tl.where(before, size[None, :], 0), 1) - tl.sum(tl.where(earlier, size[None, :], 0), 1)
    tl.store(place_ptr + row, place, mask=row < rows)


def _triton_sort(choice: Tensor, num_experts: int, top_k: int, place_tk: Tensor, other: Tensor, *, mask: bool
                 ) -> Tensor:
    """Fills place_tk and other; -> choices of each expert."""
    choice = dispatch.as_rows(choice)
    t, columns = choice.shape[0], jit.next_power_of_2(num_experts)
    rows = max(1, 1024 // columns)
    programs = max(1, min(jit.cdiv(t, rows), 2 * jit.multiprocessors(choice)))
    sizes = (t, num_experts, choice.stride(0), top_k, jit.cdiv(t, programs))
    counts_en = torch.empty(num_experts, programs, dtype=torch.int64, device=choice.device)
    launch(_count_kernel, (programs,), choice, counts_en, *sizes, MASK=mask, ROWS=rows, E=columns, num_warps=4)
    ends_en = counts_en.flatten().cumsum(0)
    launch(_place_kernel, (programs,), choice, ends_en, counts_en, place_tk, other, *sizes,
           MASK=mask, ROWS=rows, E=columns, num_warps=4)
    return counts_en.sum(1)


@torch.library.custom_op("engine_kernels::moe_sort_by_expert", mutates_args=())
def _sort_by_expert(chosen_tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    counts_e, place_tk, source_p = _sorted_outputs(chosen_tk, num_experts)
    if not chosen_tk.numel():
        return counts_e.zero_(), place_tk, source_p
    return _triton_sort(chosen_tk, num_experts, chosen_tk.shape[1], place_tk, source_p, mask=False), place_tk, source_p


@_sort_by_expert.register_fake
def _sorted_outputs(chosen_tk, num_experts):
    new = chosen_tk.new_empty
    return new(num_experts, dtype=torch.int64), new(chosen_tk.shape, dtype=torch.int64), \
        new(chosen_tk.numel(), dtype=torch.int64)


@torch.library.custom_op("engine_kernels::moe_sort_mask", mutates_args=())
def _sort_mask(mask_te: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    counts_e, place_tk, expert_tk = _mask_outputs(mask_te, top_k)
    if not mask_te.numel():
        return counts_e.zero_(), place_tk.fill_(-1), expert_tk.fill_(-1)
    return _triton_sort(mask_te, mask_te.shape[1], top_k, place_tk, expert_tk, mask=True), place_tk, expert_tk


@_sort_mask.register_fake
def _mask_outputs(mask_te, top_k):
    (t, e), new = mask_te.shape, mask_te.new_empty
    return new(e, dtype=torch.int64), new(t, top_k, dtype=torch.int64), new(t, top_k, dtype=torch.int64)


@torch.library.custom_op("engine_kernels::moe_transpose_chunks", mutates_args=())
def _transpose_chunks(sizes_sl: Tensor, rows: int) -> Tensor:
    place_p, columns = _chunk_output(sizes_sl, rows), jit.next_power_of_2(sizes_sl.numel())
    block = max(1, 1024 // columns)
    launch(_transpose_kernel, (jit.cdiv(rows, block),), sizes_sl.contiguous(), place_p, rows, *sizes_sl.shape,
           C=columns, ROWS=block, num_warps=4)
    return place_p


@_transpose_chunks.register_fake
def _chunk_output(sizes_sl, rows):
    return sizes_sl.new_empty(rows, dtype=torch.int64)


def _runs(impl: str, op: str, name: str, integers: Tensor) -> str:
    """`dispatch.choose` speaks of floats; an empty one stands for the integers, whose dtype the caller has checked."""
    return dispatch.choose(impl, op, {name: integers.new_empty(0, dtype=torch.float32)}, kernels=("triton",))


def sort_by_expert(chosen_tk: Tensor, num_experts: int, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Sort the choices [t, k] (experts 0..num_experts-1, none twice in a row) by expert, then by token.

    Returns tokens_per_expert_e, place_tk (the sorted row of each choice) and source_p (the token of each sorted row),
    all int64 on chosen_tk's device. Raises ValueError if chosen_tk is not int64 or int32 [t, k].
    """
    if chosen_tk.dim() != 2 or chosen_tk.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"sort_by_expert: chosen_tk is {chosen_tk.dtype} of shape {tuple(chosen_tk.shape)}, "
                         "needs int64 or int32 of [t, k]")
    if _runs(impl, "sort_by_expert", "chosen_tk", chosen_tk) == "torch":
        return sort_by_expert_reference(chosen_tk.long(), num_experts)
    return torch.ops.engine_kernels.moe_sort_by_expert(chosen_tk, num_experts)


def sort_mask(mask_te: Tensor, top_k: int, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Sort the choices of a mask [t, e], any number up to ``top_k`` in a row, by expert, then by token.

    Returns tokens_per_expert_e, place_tk and expert_tk: the sorted rows and the experts of a token's choices in the
    experts' order, -1 behind them; int64 on mask_te's device. Raises ValueError if mask_te is not bool [t, e].
    """
    if mask_te.dim() != 2 or mask_te.dtype != torch.bool:
        raise ValueError(f"sort_mask: mask_te is {mask_te.dtype} of shape {tuple(mask_te.shape)}, needs bool of [t, e]")
    top_k = min(top_k, mask_te.shape[1])
    if _runs(impl, "sort_mask", "mask_te", mask_te) == "torch":
        return sort_mask_reference(mask_te, top_k)
    return torch.ops.engine_kernels.moe_sort_mask(mask_te, top_k)


def transpose_chunks(sizes_sl: Tensor, rows: int, *, impl: str = "auto") -> Tensor:
    """The places [rows] of rows that lie in chunks of sizes_sl, by sender s and then expert l, when l comes first.

    ``rows``: the sum of sizes_sl (int64, on the device). Raises ValueError if sizes_sl is not int64 [s, l].
    """
    if sizes_sl.dim() != 2 or sizes_sl.dtype != torch.int64:
        raise ValueError(f"transpose_chunks: sizes_sl is {sizes_sl.dtype} of shape {tuple(sizes_sl.shape)}, "
                         "needs int64 of [s, l]")
    if _runs(impl, "transpose_chunks", "sizes_sl", sizes_sl) == "torch":
        return transpose_chunks_reference(sizes_sl, rows)
    return torch.ops.engine_kernels.moe_transpose_chunks(sizes_sl, rows)
