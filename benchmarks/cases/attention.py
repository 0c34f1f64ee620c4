"""Causal attention: b rows, h query heads, g key/value groups, s positions, d head dimension; "ours" is what the
dispatcher takes (impl="auto"), "eager" torch's scaled_dot_product_attention as it chooses, documents one by one.

A pair of query and key that sees each other costs 4 d operations a head forward (half of all pairs where every query
sees all before it) and 10 d backward, which computes the scores again. Forward reads q, k and v and writes the result;
backward reads these four and the result's gradient and writes three.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case
from engine_kernels import attention_backends as backends
from engine_kernels import jit
from engine_kernels.attention import causal_attention, causal_attention_reference
from engine_kernels.documents import Documents

_BLOCK = 1024  # queries whose scores the exact reference holds at a time


@dataclass(frozen=True)
class Shape:
    """``mean``: of the documents' lengths, or None for whole rows."""

    name: str
    b: int
    h: int
    g: int
    s: int
    d: int
    window: int | None = None
    sinks: bool = False
    mean: int | None = None

    def documents(self) -> Documents | None:
        """Lengths spread as those of text: many short, few long; the same in every process."""
        if self.mean is None:
            return None
        lengths, rows = random.Random(self.s), []
        for _ in range(self.b):
            row = [0]
            while row[-1] < self.s:
                row.append(min(self.s, row[-1] + 1 + int(lengths.expovariate(1 / self.mean))))
            rows.append(row)
        return Documents(rows)

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over all rows and heads."""
        documents = self.documents() or Documents([[0, self.s]] * self.b)
        lowest_bs, position_s = documents.lowest(self.window, torch.device("cpu"))
        return self.h * int((position_s - lowest_bs + 1).sum(dtype=torch.int64))


# Llama 3 8B from 4k to 32k (eight groups of four heads), Llama 3.2 1B, one head a group, rows packed with documents,
# GPT-OSS 20B's two kinds of layers.
SHAPES = {
    "full": [
        Shape("4x4096", 4, 32, 8, 4096, 128), Shape("2x8192", 2, 32, 8, 8192, 128),
        Shape("1x16384", 1, 32, 8, 16384, 128), Shape("1x32768", 1, 32, 8, 32768, 128),
        Shape("8x4096", 8, 32, 8, 4096, 64), Shape("4x4096", 4, 32, 32, 4096, 128),
        Shape("packed 1x16384", 1, 32, 8, 16384, 128, mean=1024), Shape("packed 4x8192", 4, 32, 8, 8192, 64, mean=512),
        Shape("window 128, sinks 2x8192", 2, 64, 8, 8192, 64, 128, True),
        Shape("sinks 2x8192", 2, 64, 8, 8192, 64, None, True),
        Shape("window 128, sinks, packed 2x8192", 2, 64, 8, 8192, 64, 128, True, 1024),
    ],
    "tiny": [Shape("2x70", 2, 4, 2, 70, 16), Shape("window 9, sinks, packed 2x50", 2, 4, 1, 50, 8, 9, True, 12)],
}


def _exact(shape: Shape, documents: Documents | None, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
    """The formula by blocks of queries, whose scores the backward pass computes again."""
    scale, rows = shape.d**-0.5, []
    for i, boundaries in enumerate((documents or Documents([[0, shape.s]] * shape.b)).boundaries_b):
        parts = []
        for begin, end in itertools.pairwise(boundaries):
            for first in range(begin, end, _BLOCK):
                last = min(end, first + _BLOCK)
                oldest = begin if shape.window is None else max(begin, first - shape.window + 1)
                seen = (x[i : i + 1, :, oldest:last] for x in (k, v))
                parts.append(checkpoint(causal_attention_reference, q[i : i + 1, :, first:last], *seen, scale,
                                        shape.window, *sinks, use_reentrant=False))
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def _run(impl: str, shape: Shape, documents: Documents | None, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor
         ) -> Tensor:
    return causal_attention(q, k, v, window=shape.window, sinks=sinks[0] if sinks else None, documents=documents,
                            impl=impl)


def _ours(shape: Shape, documents: Documents | None, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
    if q.device.type == "cpu" and not jit.interpreted() and not jit.obstacle(q):
        return q.view_as(q)  # while kernels are compiled ahead of time: none of attention's is ours in Triton
    return _run("auto", shape, documents, q, k, v, *sinks)


def _others(shape: Shape, documents: Documents | None, dtype: torch.dtype, device: str
            ) -> dict[str, Callable[..., Any]]:
    """Every backend that can serve the case on this machine."""
    request = backends.Request(device, dtype, shape.d, shape.s, shape.s, shape.window, shape.sinks,
                               documents is not None)
    here = device == "cpu" or torch.cuda.is_available()
    machine = backends.this_machine(device) if here else backends.Machine()
    names = [name for name in backends.BACKENDS if not backends.obstacle(name, request, machine)] if here else []
    if shape.s > 4096 and "math" in names:
        names.remove("math")  # all scores would be 34 GB and more
    return {name: partial(_run, name, shape, documents) for name in names}


def _case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    documents, pairs = shape.documents(), shape.pairs()
    queries, keys = (dtype.itemsize * shape.b * heads * shape.s * shape.d for heads in (shape.h, shape.g))

    def make(new: Any) -> list[Tensor]:
        made = [new.normal(shape.b, shape.s, heads, shape.d, dtype=dtype).transpose(1, 2).requires_grad_()
                for heads in (shape.h, shape.g, shape.g)]
        return made + ([new.normal(shape.h, dtype=dtype, grad=True)] if shape.sinks else [])

    return Case(
        "causal_attention",
        f"{shape.name} heads {shape.h}/{shape.g} d {shape.d} {str(dtype).removeprefix('torch.')}", make,
        {"ours": partial(_ours, shape, documents), "eager": partial(_run, "torch", shape, documents),
         **_others(shape, documents, dtype, device)},
        forward_bytes=2 * queries + 2 * keys, forward_flops=4 * shape.d * pairs,
        backward_bytes=4 * queries + 4 * keys, backward_flops=10 * shape.d * pairs,
        exact=partial(_exact, shape, documents), notes={"arithmetic": "bf16"})


def cases(scale: str) -> list[Case]:
    dtypes = (torch.bfloat16,) if scale == "full" else (torch.bfloat16, torch.float32)
    device = "cuda" if scale == "full" or torch.cuda.is_available() else "cpu"
    return [_case(shape, dtype, device) for shape in SHAPES[scale] for dtype in dtypes]
