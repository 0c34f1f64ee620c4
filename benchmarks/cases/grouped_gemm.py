"""Linear layers of experts: p rows over e experts of [m, k] each, the busiest with 2.5 times the rows of the idlest.

A product is 2 p m k operations; forward is one, backward two. Forward reads x and all weights and writes y: 2 (p k +
e m k + p m) bytes; backward reads dy twice, x and the weights, and writes dx and the weights' gradients. Biases are
left out of both. "grouped_linear" has its weights in one tensor, as ``torch.nn.functional.grouped_mm`` needs them;
"grouped_linear_list" a tensor for each expert, as the engine's models do, and scaled biases where the model has them.
"grouped_wgrad_sum" adds to fp32 main gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, optional
from engine_kernels.grouped_gemm import grouped_tn
from engine_kernels.grouped_linear import grouped_linear, grouped_linear_reference

# 8192 tokens: gate and up, and down, of Mixtral 8x7B (2 of 8), Qwen3 30B-A3B (8 of 128) and GPT-OSS 20B (4 of 32).
MODELS = {"mixtral": (16384, 8, 14336, 4096), "qwen3": (65536, 128, 768, 2048), "gpt-oss": (32768, 32, 2880, 2880)}
SIZES = {"full": {f"{name} {layer}": (p, e, *((2 * f, h) if layer == "up" else (h, f)))
                  for name, (p, e, f, h) in MODELS.items() for layer in ("up", "down")},
         "tiny": {"tiny": (45, 3, 24, 40)}}


def tokens_per_expert(p: int, e: int, device: torch.device) -> Tensor:
    """Sums to p; the first of every four experts has 1.0 shares, the last 2.5."""
    shares = [1.0 + 0.5 * (i % 4) for i in range(e)]
    counts = [int(p * share / sum(shares)) for share in shares]
    counts[-1] += p - sum(counts)
    return torch.tensor(counts, device=device)


def _stacked(new: Inputs, p: int, e: int, m: int, k: int) -> Sequence[Any]:
    return (new.normal(p, k, grad=True), new.normal(e, m, k, scale=k**-0.5, grad=True),
            tokens_per_expert(p, e, new.device))


def _listed(new: Inputs, p: int, e: int, m: int, k: int) -> Sequence[Any]:
    weights = [new.normal(m, k, scale=k**-0.5, grad=True) for _ in range(e)]
    return new.normal(p, k, grad=True), weights, tokens_per_expert(p, e, new.device)


def _biased(new: Inputs, p: int, e: int, m: int, k: int) -> Sequence[Any]:
    biases = [new.normal(m, grad=True) for _ in range(e)]
    return *_listed(new, p, e, m, k), biases, new.normal(p, dtype=torch.float32, grad=True)


def _to_sum(new: Inputs, p: int, e: int, m: int, k: int) -> Sequence[Any]:
    return (new.normal(p, m), new.normal(p, k), tokens_per_expert(p, e, new.device),
            [new.normal(m, k, dtype=torch.float32) for _ in range(e)])


def _sum(dy_pm: Tensor, x_pk: Tensor, tokens_e: Tensor, into: list[Tensor], impl: str) -> tuple[Tensor, ...]:
    return tuple(grouped_tn(dy_pm, x_pk, tokens_e, into=into, add=True, impl=impl))


def _torch_grouped() -> dict[str, Any]:
    """torch's own, where this torch has it: bf16, stacked weights, the experts' ends in int32."""
    function = optional("torch.nn.functional", "grouped_mm") or optional("torch", "_grouped_mm")
    if function is None:
        return {}
    return {"torch grouped_mm": lambda x_pk, w_emk, tokens_e: function(
        x_pk, w_emk.transpose(1, 2), offs=tokens_e.cumsum(0, dtype=torch.int32))}


def cases(scale: str) -> list[Case]:
    found = []
    for name, (p, e, m, k) in SIZES[scale].items():
        size, weights, flops = f"{name} {p} rows {e}x{m}x{k}", e * m * k, 2.0 * p * m * k
        size_of = {"p": p, "e": e, "m": m, "k": k}
        layer = {"ours": partial(grouped_linear, impl="triton"), "eager": grouped_linear_reference}
        listed = _listed if name.startswith(("mixtral", "qwen3")) else _biased
        for op, make, others in (("grouped_linear", _stacked, _torch_grouped()), ("grouped_linear_list", listed, {})):
            found.append(Case(op, size, partial(make, **size_of), {**layer, **others},
                              forward_bytes=2.0 * (p * k + p * m + weights), forward_flops=flops,
                              backward_bytes=4.0 * (p * m + p * k + weights), backward_flops=2 * flops))
        found.append(Case("grouped_wgrad_sum", size, partial(_to_sum, **size_of),
                          {"ours": partial(_sum, impl="triton"), "eager": partial(_sum, impl="torch")},
                          forward_bytes=2.0 * (p * k + p * m) + 8.0 * weights, forward_flops=flops))
    return found
