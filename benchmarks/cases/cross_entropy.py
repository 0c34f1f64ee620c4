"""Cross-entropy of logits [n, v], a loss a token. Labels and losses, 12 bytes a token, are left out.

Forward reads the logits: n v elements. Backward reads them and writes their gradient, in place: 2 n v. 3 operations an
element forward (maximum, exponential, sum), 4 backward; label smoothing adds a sum. Liger makes its gradient in its
forward pass, so compare the sums of both.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, optional
from engine_kernels.cross_entropy import cross_entropy

# Llama 3 (padded to 131,072 for tensor parallelism), Llama 2, GPT-2 padded, and GPT-2 not: rows at odd addresses.
SIZES = {"full": [(8192, 131072), (16384, 32000), (8192, 50304), (8192, 50257)], "tiny": [(3, 64), (2, 5003)]}
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-4}


def _eager(x_nv: Tensor, labels_n: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    wide_nv = x_nv if x_nv.dtype == torch.float64 else x_nv.float()
    loss_n = F.cross_entropy(wide_nv, labels_n, reduction="none", label_smoothing=label_smoothing)
    return loss_n + z_loss * wide_nv.logsumexp(-1).square() if z_loss else loss_n


def _liger(label_smoothing: float = 0.0, z_loss: float = 0.0) -> dict[str, Any]:
    function = optional("liger_kernel.transformers.functional", "liger_cross_entropy")
    if function is None:
        return {}
    return {"liger": lambda x, labels: function(x, labels, reduction="none", label_smoothing=label_smoothing,
                                                lse_square_scale=z_loss)}


def _quack() -> dict[str, Any]:
    function = optional("quack", "cross_entropy")
    return {} if function is None else {
        "quack": lambda x, labels: function(x, labels, reduction="none", inplace_backward=True)}


def _megatron() -> dict[str, Any]:
    """megatron-core's, for tensor-parallel logits: it reduces over a group, here one of this process alone."""
    if not torch.cuda.is_available():
        return {}
    function = optional("megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy")
    if function is None:
        return {}

    def run(x_nv: Tensor, labels_n: Tensor) -> Tensor:
        if not dist.is_initialized():
            dist.init_process_group("nccl", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        return function(x_nv[:, None], labels_n[:, None], dist.group.WORLD)[:, 0]

    return {"megatron": run}


def _case(op: str, n: int, v: int, dtype: torch.dtype, terms: dict[str, float], others: dict[str, Any]) -> Case:
    moved = n * v * dtype.itemsize
    return Case(
        op, f"{n}x{v} {str(dtype).removeprefix('torch.')}",
        lambda new: (new.normal(n, v, dtype=dtype, grad=True), new.integers(0, v, n)),
        {"ours": partial(cross_entropy, reduction="none", impl="triton", **terms), "eager": partial(_eager, **terms),
         **others},
        forward_bytes=moved, forward_flops=(4 if terms else 3) * n * v, backward_bytes=2 * moved,
        backward_flops=4 * n * v)


def cases(scale: str) -> list[Case]:
    dtypes = (torch.bfloat16,) if scale == "full" else (torch.bfloat16, torch.float32)
    others = {**_liger(), **_quack(), **_megatron()}
    found = [_case("cross_entropy", n, v, dtype, {}, others) for n, v in SIZES[scale] for dtype in dtypes]
    n, v = SIZES[scale][0]
    return [*found, _case("smoothed_cross_entropy", n, v, torch.bfloat16, SMOOTHED, _liger(**SMOOTHED))]
