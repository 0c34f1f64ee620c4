"""LoRA on routed experts: factors of its own for every expert and matrix, all experts' products in few launches.

Under expert tensor parallelism the dispatcher gathers an expert's inputs before it and sums its outputs after it, so
the ranks' parts must sum up to the whole, and so must the gradients that they send back. Both factors are split:

    gate and up   A by rows (its rank), A x gathered; B by rows, as the weight's [gate | up]
    down          A by columns, A x summed and scattered by rank; B by columns (its rank)

p rows in expert order, k inputs and m outputs of an expert, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)

from engine_kernels.grouped_linear import grouped_linear


def _shared(z_pr: torch.Tensor, adapter: Any) -> torch.Tensor:
    if adapter.tp_group.size() == 1:
        return z_pr
    exchange = (all_gather_last_dim_from_tensor_parallel_region if adapter.column
                else reduce_scatter_last_dim_to_tensor_parallel_region)
    return exchange(z_pr, group=adapter.tp_group)


def add(y_pm: torch.Tensor, x_pk: torch.Tensor, linears: list[Any], tokens_e: torch.Tensor, impl: str) -> torch.Tensor:
    """The experts' outputs with their adapters' added; as they are where the experts have none."""
    if linears[0].adapter is None:
        return y_pm
    adapters = [linear.adapter for linear in linears]
    for adapter in adapters:
        for wait in adapter._forward_pre_hooks.values():  # DDP's, which may still gather the factors
            wait(adapter, ())
    pairs = [adapter.factors(adapter.chosen[0]) for adapter in adapters]
    z_pr = _shared(grouped_linear(x_pk, [a for a, _ in pairs], tokens_e, impl=impl) * adapters[0].scale, adapters[0])
    return y_pm + grouped_linear(z_pr, [b for _, b in pairs], tokens_e, impl=impl)


def add_to_one(y_pm: torch.Tensor, x_pk: torch.Tensor, linear: Any) -> torch.Tensor:
    """``add`` of an expert that is called by itself."""
    tokens_e = torch.tensor([x_pk.shape[0]], device=x_pk.device)
    return add(y_pm, x_pk, [linear], tokens_e, "torch")
