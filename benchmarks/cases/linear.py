"""A weight's gradient summed into main_grad [m, k]: n tokens, m output features, k input features.

2 n m k operations; grad_y and x are read, main_grad is read and written: 2 n (m + k) + 2 · 4 m k bytes with fp32 sums.
"ours" is the Triton kernel; "cuBLAS" is what the engine uses, the sum inside cuBLAS's product.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from engine_kernels.linear import add_matmul_tn_

# Llama-3.2 1B and Llama 3 8B: attention's output, gate and up, down; a narrow projection, where tiles are few.
SIZES = {"full": [(16384, 2048, 2048), (16384, 4096, 4096), (16384, 28672, 4096), (16384, 4096, 14336),
                  (16384, 1024, 2048)],
         "tiny": [(33, 24, 40), (2100, 8, 16)]}


def _sum(main_grad_mk: Tensor, grad_nm: Tensor, x_nk: Tensor, impl: str) -> Tensor:
    add_matmul_tn_(main_grad_mk, grad_nm, x_nk, first=False, impl=impl)
    return main_grad_mk


def _eager(main_grad_mk: Tensor, grad_nm: Tensor, x_nk: Tensor) -> Tensor:
    """A product rounded to 16 bits, and a sum: what an engine without Apex does."""
    return main_grad_mk.add_(grad_nm.t().matmul(x_nk))


def cases(scale: str) -> list[Case]:
    found = []
    for n, m, k in SIZES[scale]:
        for sums in (torch.float32, torch.bfloat16):
            found.append(Case(
                "linear_wgrad", f"{n}x{m}x{k} into {str(sums).removeprefix('torch.')}",
                lambda new, n=n, m=m, k=k, sums=sums: (
                    new.normal(m, k, dtype=sums), new.normal(n, m), new.normal(n, k)),
                {"ours": partial(_sum, impl="triton"), "eager": _eager, "cuBLAS": partial(_sum, impl="torch")},
                forward_bytes=2 * n * (m + k) + 2 * sums.itemsize * m * k, forward_flops=2 * n * m * k))
    return found
