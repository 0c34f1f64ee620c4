"""Adapters folded into the weights beside which they were trained: W + scale * B A, in fp32, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import copy_tensor_model_parallel_attributes

from engine.model import lora, quantized
from engine.model.lora import Adapter
from engine.model.whole import global_names
from engine.parallel.topology import Groups


@dataclass(frozen=True)
class Merged:
    """``changed`` of the ``total`` matrices with an adapter: an untrained one (B is zero), or one whose products are
    all below the weights' precision, changes nothing."""

    changed: int
    total: int


def _whole(factor: Any, adapter: Adapter) -> torch.Tensor:
    """An expert's factor, put together from the tensor ranks that share its rank r."""
    value, dim = factor.detach().float(), 0 if adapter.column else 1
    parts = [torch.empty_like(value) for _ in range(adapter.tp_group.size())]
    dist.all_gather(parts, value.contiguous(), group=adapter.tp_group)
    return torch.cat(parts, dim=dim)


@torch.no_grad()
def delta(adapter: Adapter) -> torch.Tensor:
    """scale * B A for this rank's part of the layer's weight [m, k], in fp32. Collective over an expert's tensor ranks.
    """
    if adapter.expert and adapter.tp_group.size() > 1:
        a, b = adapter.factors(adapter.chosen[0])
        a, b = (_whole(a, adapter), b.float()) if adapter.column else (a.float(), _whole(b, adapter))
        return adapter.scale * b @ a
    return adapter.scale * adapter.all_b().float() @ adapter.all_a().float()


def _rows(adapter: Adapter, part: str, changed_m: torch.Tensor) -> torch.Tensor:
    """Which of the part's rows are among those that changed."""
    if len(adapter.rows) == 1 or adapter.ragged:  # of a piece of a key-value group no row is one part's on every rank
        return changed_m
    sizes = list(adapter.rows.values())
    return changed_m.unflatten(0, (adapter.groups, sum(sizes))).split(sizes, dim=1)[list(adapter.rows).index(part)]


def _make_dense(linear: Any, dense_mk: torch.Tensor) -> None:
    """A parameter in place of a quantised weight."""
    weight, parameter = linear.weight, torch.nn.Parameter(dense_mk, requires_grad=False)
    copy_tensor_model_parallel_attributes(parameter, weight)
    del linear.weight
    linear.weight = parameter


@torch.no_grad()
def merge(chunks: list[Any], groups: Groups) -> Merged:
    """Folds every adapter of the bare chunks into its weight, and takes it away. Collective.

    Quantised weights, those without an adapter too, become ones of the compute type.
    """
    changed: dict[str, bool] = {}
    for chunk in chunks:
        names = {id(p): name for name, p in global_names(chunk).items()}
        for linear, _, _ in lora.linears(chunk):
            adapter, before = linear.adapter, quantized.dense(linear.weight)
            after = before
            if adapter is not None:
                after = (before.float() + delta(adapter)).to(before.dtype)
                moved_m = (after != before).any(1)
                for part in adapter.chosen:
                    changed[names[id(adapter.factors(part)[0])]] = bool(_rows(adapter, part, moved_m).any())
                linear.adapter = None
            if isinstance(linear.weight, quantized.Weight):
                _make_dense(linear, after)
            elif adapter is not None:
                linear.weight.copy_(after)
    gathered: list = [None] * groups.world_size
    dist.all_gather_object(gathered, changed)
    total: dict[str, bool] = {}
    for own in gathered:
        for name, moved in own.items():
            total[name] = total.get(name, False) or moved
    return Merged(sum(total.values()), len(total))
