"""NF4 in blocks of 64: [m, k] weights, k multiples of 64; fp32 scales, or 8-bit ones in groups.

Quantising reads m k elements and writes half a byte and 1/16 byte each. Dequantising, which a frozen layer does before
each of its products, reads what that wrote (with compressed scales 1/64 byte in place of 1/16) and writes m k elements.
An element costs a look-up and a product; quantising compares it with 15 bounds. bitsandbytes where it is installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, optional
from engine_kernels.nf4 import (
    BLOCK,
    GROUP,
    Nf4,
    compressed,
    dequantise_nf4,
    dequantise_nf4_reference,
    quantise_nf4,
    quantise_nf4_reference,
)

# Llama 3 8B's and 70B's fc1, and all experts of a layer of Qwen3 30B.
SIZES: dict[str, list[tuple[int, ...]]] = {"full": [(28672, 4096), (57344, 8192), (128, 1536, 2048)],
                                           "tiny": [(5, 128), (2, 3, 192)]}
DTYPES = {"full": (torch.bfloat16,), "tiny": (torch.bfloat16, torch.float32)}


def _parts(q: Nf4) -> tuple[Tensor, ...]:
    return q.codes, q.absmax


def _codes(new: Inputs, shape: tuple[int, ...], double: bool) -> tuple[Any, ...]:
    """Random codes with scales around those of weights of standard deviation 0.02."""
    *lead, k = shape
    codes = new.integers(0, 256, *lead, k // 2, dtype=torch.uint8)
    absmax = new.normal(*lead, k // BLOCK, dtype=torch.float32, scale=1e-3).add_(0.05)
    if not double:
        return codes, absmax, None, None
    if new.device.type == "cpu" and not codes.any():  # unfilled: what scales are does not matter
        groups = (*lead, -(-(k // BLOCK) // GROUP))
        low, step = (new.normal(*groups, dtype=torch.bfloat16) for _ in range(2))
        return codes, new.integers(0, 256, *lead, k // BLOCK, dtype=torch.uint8), low, step
    q = compressed(Nf4(codes, absmax), along=1)
    return q.codes, q.absmax, q.low, q.step


def _dequantise(function: Any, dtype: torch.dtype, codes: Tensor, absmax: Tensor, low: Any, step: Any) -> Tensor:
    return function(Nf4(codes, absmax, low, step), dtype)


def _exact(dtype: torch.dtype, codes: Tensor, absmax: Tensor, low: Any, step: Any) -> Tensor:
    """Every implementation gives the same bits; scales came in fp64."""
    if low is None:
        return dequantise_nf4_reference(Nf4(codes, absmax.float()), dtype)
    return dequantise_nf4_reference(Nf4(codes, absmax, low.bfloat16(), step.bfloat16()), dtype)


def _bitsandbytes(quantises: bool, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    if optional("bitsandbytes.functional", "quantize_4bit") is None:
        return {}
    ops: Any = torch.ops.bitsandbytes
    if quantises:
        return {"bitsandbytes": lambda w: ops.quantize_4bit(w, BLOCK, "nf4", torch.uint8)}
    return {"bitsandbytes": lambda codes, absmax, low, step: ops.dequantize_4bit(
        codes.view(-1, 1), absmax.flatten(), BLOCK, "nf4", list(shape), dtype)}


def cases(scale: str) -> list[Case]:
    found = []
    for shape in SIZES[scale]:
        elements = torch.Size(shape).numel()
        for dtype in DTYPES[scale]:
            size, wide = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}", elements * dtype.itemsize
            found.append(Case(
                "nf4_quantise", size, lambda new, shape=shape, dtype=dtype: (new.normal(*shape, dtype=dtype),),
                {"ours": lambda w: _parts(quantise_nf4(w, impl="triton")),
                 "eager": lambda w: _parts(quantise_nf4_reference(w)), **_bitsandbytes(True, shape, dtype)},
                forward_bytes=wide + elements * (1 / 2 + 1 / 16), forward_flops=16 * elements, tolerance=0.0,
                exact=lambda w, dtype=dtype: _parts(quantise_nf4_reference(w.to(dtype)))))
            for double in (False, True):
                scales = 1 / 64 if double else 1 / 16
                runs = {"ours": partial(_dequantise, partial(dequantise_nf4, impl="triton"), dtype),
                        "eager": partial(_dequantise, dequantise_nf4_reference, dtype)}
                found.append(Case(
                    "nf4_dequantise", f"{size}{' double' if double else ''}",
                    lambda new, shape=shape, double=double: _codes(new, shape, double),
                    runs | ({} if double else _bitsandbytes(False, shape, dtype)),
                    forward_bytes=wide + elements * (1 / 2 + scales), forward_flops=elements, tolerance=0.0,
                    exact=partial(_exact, dtype)))
    return found
