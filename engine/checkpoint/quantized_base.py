"""Weights of an ordinary checkpoint into a model that holds them in 4 bits, one layer at a time.

Megatron reads tensors into memory that it is given, so a quantised weight needs its full size for that moment; reading
layer by layer keeps it to one layer of it on each rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import UserError
from engine.model import quantized
from engine.model.quantized import Weight

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def take(state: dict[str, dict], chunks: list[Any]) -> list[dict[str, tuple[Weight, Any]]]:
    """Takes what quantised weights are in a checkpoint out of ``state`` (of ``sharded_state_dict`` within
    ``quantized.as_parameters``), where it has no memory. -> of each layer of this rank: the weight and its place."""
    found: dict[tuple[int, int], dict[str, tuple[Weight, Any]]] = {}
    for i, chunk in enumerate(chunks):
        for name, weight in quantized.weights(chunk).items():
            layer = _LAYER.match(name)
            assert layer is not None, f"{name} is outside the decoder"
            place = state[f"model{i}"].pop(name, None)
            if place is None:  # a checkpoint of adapters alone
                continue
            assert place.data.is_meta, name
            found.setdefault((i, int(layer.group(1))), {})[f"model{i}.{name}"] = weight, place
    return list(found.values())


def fill(layers: list[dict[str, tuple[Weight, Any]]], read: Callable[[dict], dict]) -> None:
    """Reads and quantises one layer after the other. Collective: every rank has as many layers.

    ``read``: fills the tensors of a state dict. Raises ``UserError``, on all ranks, for weights that are not finite.
    """
    problem = None
    for layer in layers:
        for _, place in layer.values():
            place.data = torch.empty(place.data.shape, dtype=place.data.dtype)
        loaded = read({name: place for name, (_, place) in layer.items()})
        for name, (weight, place) in layer.items():
            try:
                weight.copy_(loaded.pop(name))
            except UserError as error:  # raised below: the other ranks wait for this one's next layer
                problem = problem or str(error)
            place.data = None
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise UserError(first)
