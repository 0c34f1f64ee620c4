"""Rotary embedding: of queries and keys, and fused with the split of the QKV projection. s tokens of b rows, h query
and g key-value heads of d, all of which turns unless the case says otherwise.

Queries and keys are read and written: 2 (h + g) d elements a token; split in place the same, since values stay where
they are, and with new tensors 2 (h + 2 g) d. Backward writes the projection's whole gradient: 2 (h + 2 g) d. Beside
them the angles are read once, 2 r numbers of fp32 a position. 6 operations turn a pair.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, optional
from engine_kernels.qkv_rotary import split_qkv_rotary, split_qkv_rotary_reference
from engine_kernels.rotary import rotary

# s, b, h, g, d: Llama-3.2 1B, Qwen3-30B-A3B (its rank of 1), Llama 3 8B, Llama 3 70B on 8 tensor ranks, 4 short rows.
SIZES = {"full": [(16384, 1, 32, 8, 64), (16384, 1, 32, 4, 128), (16384, 1, 32, 8, 128), (16384, 1, 8, 1, 128),
                  (4096, 4, 32, 8, 128)],
         "tiny": [(5, 2, 4, 2, 16), (3, 1, 3, 1, 10)]}


def _angles(new: Inputs, *rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    theta = new.normal(*rows, pairs, dtype=torch.float32, scale=100.0)
    return theta.cos(), theta.sin()


@lru_cache(maxsize=64)
def _repeated(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), -1)[None]


def _liger() -> dict:
    """Liger turns [b, h, s, d] that is [b, s, h, d] in memory, in place, by a table that repeats its halves."""
    function = optional("liger_kernel.ops.rope", "LigerRopeFunction")

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = function.apply(q.transpose(1, 2), k.transpose(1, 2), _repeated(cos), _repeated(sin))
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    return {} if function is None else {"liger (in place)": run}


def _heads(s: int, b: int, h: int, g: int, d: int, r: int, dtype: torch.dtype, interleaved: bool) -> Case:
    """q and k [b, s, heads, d], as after their norms."""
    moved, table = s * b * (h + g) * d * dtype.itemsize, 2 * s * r * 4
    turn = partial(rotary, interleaved=interleaved)
    return Case(
        "rotary_interleaved" if interleaved else "rotary",
        f"s{s} b{b} h{h} g{g} d{d} r{r} {str(dtype).removeprefix('torch.')}",
        lambda new: (new.normal(b, s, h, d, dtype=dtype, grad=True), new.normal(b, s, g, d, dtype=dtype, grad=True),
                     *_angles(new, s, pairs=r)),
        {"ours": partial(turn, impl="triton"), "eager": partial(turn, impl="torch"),
         **({} if interleaved or 2 * r != d else _liger())},
        forward_bytes=2 * moved + table, forward_flops=6 * s * b * (h + g) * r,
        backward_bytes=2 * moved + table, backward_flops=6 * s * b * (h + g) * r)


def _split(s: int, b: int, h: int, g: int, d: int, dtype: torch.dtype) -> Case:
    """The whole projection, with new tensors: a benchmark runs forward again and again on one input."""
    layout = {"num_groups": g, "queries_per_group": h // g, "head_dim": d}
    moved, table, r = s * b * (h + 2 * g) * d * dtype.itemsize, 2 * s * (d // 2) * 4, d // 2
    return Case(
        "split_qkv_rotary", f"s{s} b{b} h{h} g{g} d{d} {str(dtype).removeprefix('torch.')}",
        lambda new: (new.normal(s, b, (h + 2 * g) * d, dtype=dtype, grad=True), *_angles(new, s, pairs=r)),
        {"ours": partial(split_qkv_rotary, **layout, impl="triton"),
         "eager": partial(split_qkv_rotary_reference, **layout)},
        forward_bytes=2 * moved + table, forward_flops=6 * s * b * (h + g) * r,
        backward_bytes=2 * moved + table, backward_flops=6 * s * b * (h + g) * r)


def _split_in_place(s: int, b: int, h: int, g: int, d: int, dtype: torch.dtype) -> Case:
    """As a model uses it without a gradient; keys turn on with every run."""
    layout = {"num_groups": g, "queries_per_group": h // g, "head_dim": d}
    moved, r = 2 * s * b * (h + g) * d * dtype.itemsize, d // 2
    return Case(
        "split_qkv_rotary_in_place", f"s{s} b{b} h{h} g{g} d{d} {str(dtype).removeprefix('torch.')}",
        lambda new: (new.normal(s, b, (h + 2 * g) * d, dtype=dtype), *_angles(new, s, pairs=r)),
        {"ours": partial(split_qkv_rotary, **layout, in_place=True, impl="triton"),
         "eager": partial(split_qkv_rotary_reference, **layout)},
        forward_bytes=moved + 2 * s * r * 4, forward_flops=6 * s * b * (h + g) * r)


def cases(scale: str) -> list[Case]:
    found = []
    for s, b, h, g, d in SIZES[scale]:
        for dtype in (torch.bfloat16,) if scale == "full" else (torch.bfloat16, torch.float32):
            found += [_heads(s, b, h, g, d, d // 2, dtype, False), _split(s, b, h, g, d, dtype)]
    for s, b, h, g, d in SIZES[scale][-1:]:
        found += [_heads(s, b, h, g, d, d // 2, torch.bfloat16, True),
                  _heads(s, b, h, g, d, d // 4, torch.bfloat16, False), _split_in_place(s, b, h, g, d, torch.bfloat16)]
    return found
