"""Routing: t tokens, e experts, k chosen, one sequence; with the sums for the auxiliary losses.

Forward reads the logits (fp32) and writes weights (fp32) and mask [t, e]: 9 t e bytes. Backward reads the logits, the
mask and the weights' gradient and writes the logits' gradient: 13 t e. Each pick compares all e: about 2 k t e integer
operations, and some 10 floating ones an expert. "eager" does all of this, "megatron" leaves the losses' sums out.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, optional
from engine_kernels.moe_routing import route, route_reference

# Mixtral 8x7B, Qwen3 30B and 235B, GPT-OSS 20B, DeepSeek-V3 (whose groups of experts are left out).
MODELS = {"full": [(16384, 8, 2, "softmax_after_topk"), (16384, 128, 8, "softmax_before_topk"),
                   (16384, 32, 4, "softmax_after_topk"), (16384, 256, 8, "sigmoid")],
          "tiny": [(6, 8, 2, "softmax_after_topk"), (5, 12, 3, "sigmoid")]}


def _megatron(k: int, router: str):
    function = optional("megatron.core.transformer.moe.moe_utils", "topk_routing_with_score_function")
    if function is None:
        return {}
    score = "sigmoid" if router == "sigmoid" else "softmax"

    def run(logits_te, *bias_e):
        return function(logits_te, k, use_pre_softmax=router == "softmax_before_topk", score_function=score,
                        expert_bias=bias_e[0] if bias_e else None)

    return {"megatron": run}


def cases(scale: str) -> list[Case]:
    found = []
    for t, e, k, router in MODELS[scale]:
        def make(new, t=t, e=e, router=router):
            bias = [new.normal(e, dtype=torch.float32, scale=0.1)] if router == "sigmoid" else []
            return new.normal(t, e, dtype=torch.float32, grad=True), *bias

        def run(function, logits_te, *bias_e, k=k, router=router):
            return tuple(function(logits_te, top_k=k, router=router, expert_bias_e=bias_e[0] if bias_e else None,
                                  sequences=1, dense=True))

        found.append(Case(
            "route", f"{t} tokens {e}/{k} {router}", make,
            {"ours": partial(run, partial(route, impl="triton")), "eager": partial(run, route_reference),
             **_megatron(k, router)},
            forward_bytes=9 * t * e, forward_flops=10 * t * e, backward_bytes=13 * t * e, backward_flops=15 * t * e))
    return found
