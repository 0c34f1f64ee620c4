"""Newton–Schulz orthogonalisation of matrices that one rank holds whole, or that ranks hold parts of.

Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix U S Vᵀ by about U Vᵀ: from X / ‖X‖,
steps of X ← (a I + b G + c G²) X with the Gram matrix G = X Xᵀ. The three coefficients raise small singular values
fast and leave all of them between about 0.7 and 1.2.

    n matrices of one shape, r rows, c columns; k the dimension that G keeps, l the one that it sums over

A matrix split along l needs no gathering: its ranks all-reduce their partial G in every step, and each has its own part
of the result. A matrix split along k is the transposed case, (a I + b G + c G²) with G = Xᵀ X, k and l exchanged: both
polynomials give the same result, so the split dimension can always be made l. Or its ranks gather it, and each computes
all of it. ``cheaper_split`` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

from engine_kernels.linear import matmul_nn, matmul_nt, onednn_is_faster_in_fp32

EPS = 1e-7  # least norm that is divided by, torch.optim.Muon's
# What a byte between tensor ranks costs, in floating-point operations: an H200's 700 TFLOP/s in bf16 products this
# large over NVLink's 450 GB/s.
FLOPS_A_BYTE = 1500
Reduce = Callable[[torch.Tensor], Any]
Coefficients = tuple[float, float, float]


def orthogonalise(x_nrc: torch.Tensor, coefficients: Coefficients, steps: int) -> torch.Tensor:
    """[n, r, c] whole matrices -> about U Vᵀ of each, in their dtype. In bf16 torch.optim.Muon's to the bit.

    A zero matrix stays zero.
    """
    tall = x_nrc.shape[1] > x_nrc.shape[2]  # the smaller Gram matrix
    result = _iterate(x_nrc.mT if tall else x_nrc, coefficients, steps, None)
    return result.mT if tall else result


def orthogonalise_split(x_nrc: torch.Tensor, dim: int, group: Any, coefficients: Coefficients,
                        steps: int) -> torch.Tensor:
    """This rank's part of ``orthogonalise`` of matrices split along ``dim`` (0 rows, 1 columns), by Gram matrices.

    Collective over ``group``: one all-reduce of n numbers, and one of n Gram matrices in each step.
    """

    def reduce(values: torch.Tensor) -> None:
        dist.all_reduce(values, group=group)

    result = _iterate(x_nrc.mT if dim == 0 else x_nrc, coefficients, steps, reduce)
    return result.mT if dim == 0 else result


def gather(x_nrc: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """The whole matrices of which each rank of ``group`` holds a part along ``dim`` (0 rows, 1 columns)."""
    x_nrc = x_nrc.contiguous()
    flat = x_nrc.new_empty(group.size() * x_nrc.numel())
    dist.all_gather_into_tensor(flat, x_nrc.view(-1), group=group)
    parts_tnrc = flat.view(group.size(), *x_nrc.shape)
    return torch.cat(list(parts_tnrc), dim=1 + dim)


def flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of ``orthogonalise`` for one matrix: G, G² and the product with X in every step."""
    return _flops(min(rows, columns), max(rows, columns), steps)


def _flops(k: int, length: int, steps: int) -> int:
    return steps * (4 * k * k * length + 2 * k**3)


def cheaper_split(rows: int, columns: int, dim: int, ranks: int, steps: int, size: int) -> Literal["gram", "gather"]:
    """Whether ``ranks`` that hold parts along ``dim`` of a [rows, columns] matrix reduce Gram matrices or gather it.

    ``size``: bytes a number. Per rank, with K steps, T ranks, k the whole and l the split dimension:

        gram     K (4 k² l / T + 2 k³) flops    2 K k² size (T-1)/T bytes
        gather   K (4 s² b + 2 s³) flops        k l size (T-1)/T bytes     s, b the smaller and the larger of k, l

    Llama 3 8B at T = 8 in bf16: a gate of [14336, 4096] split along 14336 takes 1.3 TFLOP and 294 MB by Gram matrices,
    5.5 TFLOP and 103 MB gathered. A Qwen3-MoE gate of [768, 2048] split along 768 over 2 ranks takes 0.12 TFLOP and
    42 MB by Gram matrices of 2048², 0.03 TFLOP and 1.6 MB gathered.
    """
    split, k = (rows, columns) if dim == 0 else (columns, rows)
    share = (ranks - 1) / ranks
    gram = _flops(k, split // ranks, steps) + FLOPS_A_BYTE * steps * 2 * k * k * size * share
    gathered = flops(rows, columns, steps) + FLOPS_A_BYTE * rows * columns * size * share
    return "gram" if gram <= gathered else "gather"


def _iterate(x_nkl: torch.Tensor, coefficients: Coefficients, steps: int, reduce: Reduce | None) -> torch.Tensor:
    """``reduce`` sums a tensor over the ranks that hold the other parts of l, in place."""
    a, b, c = coefficients
    norm_n11 = torch.linalg.vector_norm(x_nkl, dim=(1, 2), keepdim=True, dtype=torch.float32)
    if reduce:
        squares_n11 = norm_n11.square()
        reduce(squares_n11)
        norm_n11 = squares_n11.sqrt()
    x_nkl = x_nkl / norm_n11.to(x_nkl.dtype).clamp(min=EPS)
    for _ in range(steps):
        gram_nkk = _gram(x_nkl)
        if reduce:
            reduce(gram_nkk)
        polynomial_nkk = _add_product(gram_nkk, b, gram_nkk, gram_nkk, c)
        x_nkl = _add_product(x_nkl, a, polynomial_nkk, x_nkl, 1.0)
    return x_nkl


def _one_by_one(x_nkl: torch.Tensor) -> bool:
    """Where the engine's fp32 products of single matrices beat torch's batched ones: 113 ms for 257 ms of six
    [1024, 384] on an EPYC core, even at k = 64."""
    fp32_on_cpu = x_nkl.dtype == torch.float32 and x_nkl.device.type == "cpu"
    return fp32_on_cpu and x_nkl.shape[1] >= 128 and onednn_is_faster_in_fp32()


def _gram(x_nkl: torch.Tensor) -> torch.Tensor:
    if _one_by_one(x_nkl):
        return torch.stack([matmul_nt(x, x) for x in x_nkl])
    return x_nkl @ x_nkl.mT


def _add_product(base: torch.Tensor, scale: float, left_nkk: torch.Tensor, right: torch.Tensor,
                 factor: float) -> torch.Tensor:
    """scale · base + factor · left right."""
    if _one_by_one(right):
        products = torch.stack([matmul_nn(left, r) for left, r in zip(left_nkk, right, strict=True)])
        return products.mul_(factor).add_(base, alpha=scale)
    return torch.baddbmm(base, left_nkk, right, beta=scale, alpha=factor)
