"""Gated activations: n rows, f feed-forward width. Forward reads gate and up and writes y: 3 n f elements; backward
reads dy, gate and up and writes both gradients: 5 n f. The weighted form also reads and writes one number a row.

8 operations an element forward, 14 backward, the exponential counted as one.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, optional
from engine_kernels.swiglu import QUICK, clamped_swiglu, quick_geglu, swiglu, swiglu_reference

# Llama-3.2 1B, Qwen3-30B's experts, Llama 2 7B, Llama 3 8B, Llama 3 70B.
SIZES = {"full": [(16384, 8192), (65536, 768), (16384, 11008), (16384, 14336), (8192, 28672)],
         "tiny": [(5, 24), (3, 1300)]}


def _liger():
    """Liger takes gate and up apart, each contiguous: of one projection's halves it first makes copies."""
    function = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    return {} if function is None else {"liger (copies the halves)": lambda x: function.apply(*x.chunk(2, -1))}


def _case(op: str, n: int, f: int, dtype: torch.dtype, runs: dict, weighted: bool = False) -> Case:
    moved, weights = n * f * dtype.itemsize, 4 * n * weighted
    return Case(
        op, f"{n}x{f} {str(dtype).removeprefix('torch.')}",
        lambda new: (new.normal(n, 2 * f, dtype=dtype, grad=True),
                     *([new.normal(n, dtype=torch.float32, grad=True)] if weighted else [])),
        runs, forward_bytes=3 * moved + weights, forward_flops=8 * n * f, backward_bytes=5 * moved + 2 * weights,
        backward_flops=14 * n * f)


def cases(scale: str) -> list[Case]:
    found = []
    for n, f in SIZES[scale]:
        for dtype in (torch.bfloat16,) if scale == "full" else (torch.bfloat16, torch.float32):
            found.append(_case("swiglu", n, f, dtype,
                               {"ours": partial(swiglu, impl="triton"), "eager": swiglu_reference, **_liger()}))
    # The other forms where their models use them: GPT-OSS 20B's experts, a routing weight in 30B's.
    for n, f in [(65536, 2880)] if scale == "full" else [(4, 40)]:
        found.append(_case("clamped_swiglu", n, f, torch.bfloat16,
                           {"ours": partial(clamped_swiglu, impl="triton"),
                            "eager": partial(swiglu_reference, alpha=QUICK, limit=7.0)}))
        found.append(_case("quick_geglu", n, f, torch.bfloat16,
                           {"ours": partial(quick_geglu, impl="triton"),
                            "eager": partial(swiglu_reference, alpha=QUICK)}))
    for n, f in [(65536, 768), (65536, 14336)] if scale == "full" else [(5, 24)]:
        found.append(_case("weighted_swiglu", n, f, torch.bfloat16,
                           {"ours": lambda x, w: swiglu(x, weights_n=w, impl="triton"),
                            "eager": lambda x, w: swiglu_reference(x, weights_n=w)}, weighted=True))
    return found
