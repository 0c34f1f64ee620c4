"""The vocabulary's projection with its loss, and with each label's log-probability: n tokens, h hidden, v vocabulary.

Forward multiplies once: 2 n h v operations, and reads hidden states and weight: (n + v) h elements. Backward multiplies
twice, 4 n h v, reads both again and writes both gradients. The loss makes its gradients in the forward pass, so compare
the sums of both parts. The log-probabilities project a second time in backward (6 n h v are done there): their floor is
that of an implementation that keeps all logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, optional
from engine_kernels import jit
from engine_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs

# Llama 3 8B (its vocabulary padded), a 1B with GPT-2's, one with Llama 2's.
SIZES = {"full": [(8192, 4096, 131072), (16384, 2048, 50304), (16384, 2048, 32000)], "tiny": [(5, 24, 70)]}


def _compiled_only(hidden_nh: Tensor) -> bool:
    """While kernels are compiled ahead of time: those on the logits are cross_entropy's, the products are torch's."""
    return hidden_nh.device.type == "cpu" and not jit.interpreted() and not jit.obstacle(hidden_nh)


def _ours(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor) -> Tensor:
    if _compiled_only(hidden_nh):
        return hidden_nh.view_as(hidden_nh)
    ones_n = torch.ones(labels_n.shape, device=labels_n.device)
    return linear_cross_entropy(hidden_nh, weight_vh, labels_n, weights_n=ones_n, impl="triton")[0]


def _our_log_probs(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor) -> Tensor:
    if _compiled_only(hidden_nh):
        return hidden_nh.view_as(hidden_nh)
    return linear_log_probs(hidden_nh, weight_vh, labels_n, impl="triton")[0]


def _eager_log_probs(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor) -> Tensor:
    logits_nv = hidden_nh @ weight_vh.t()
    wide_nv = logits_nv if logits_nv.dtype == torch.float64 else logits_nv.float()
    return -F.cross_entropy(wide_nv, labels_n, reduction="none")


def _eager(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor) -> Tensor:
    return -_eager_log_probs(hidden_nh, weight_vh, labels_n).sum()


def _others() -> dict[str, Any]:
    liger = optional("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    quack = optional("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    found: dict[str, Any] = {}
    if liger is not None:
        found["liger"] = lambda h, w, labels: liger(h, w, labels, reduction="sum")
    if quack is not None:
        found["quack"] = lambda h, w, labels: quack(h, w, labels, reduction="sum")
    return found


def cases(scale: str) -> list[Case]:
    found = []
    for n, h, v in SIZES[scale]:
        for dtype in (torch.bfloat16,) if scale == "full" else (torch.bfloat16, torch.float32):
            size, moved = f"{n}x{h}x{v} {str(dtype).removeprefix('torch.')}", (n + v) * h * dtype.itemsize
            for op, ours, eager, others in (("linear_cross_entropy", _ours, _eager, _others()),
                                            ("linear_log_probs", _our_log_probs, _eager_log_probs, {})):
                found.append(Case(
                    op, size,
                    lambda new, n=n, h=h, v=v, dtype=dtype: (
                        new.normal(n, h, dtype=dtype, grad=True),
                        new.normal(v, h, dtype=dtype, scale=h**-0.5, grad=True), new.integers(0, v, n)),
                    {"ours": ours, "eager": eager, **others},
                    forward_bytes=moved, forward_flops=2 * n * h * v, backward_bytes=2 * moved,
                    backward_flops=4 * n * h * v))
    return found
