"""The unsplit model: parameters by their names in it, which part of each a rank holds, and the parts put together.

Layers count from the first pipeline stage and experts over all expert-parallel ranks, so a name means the same tensor
under every layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from engine.model import quantized
from engine.parallel.wrap import unwrap

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def is_expert(name: str) -> bool:
    """Whether the parameter belongs to one routed expert (a shared expert is an ordinary layer)."""
    return _EXPERT.search(name) is not None


def global_names(chunk: Any) -> dict[str, Any]:
    """This chunk's parameters by their names in the unsplit model."""
    return _renamed(chunk, dict(unwrap(chunk).named_parameters()))


def quantised_names(chunk: Any) -> dict[str, quantized.Weight]:
    """This chunk's quantised weights, which are no parameters, by their names in the unsplit model."""
    return _renamed(chunk, quantized.weights(chunk))


def _renamed(chunk: Any, found: dict[str, Any]) -> dict[str, Any]:
    bare = unwrap(chunk)
    layers = {i: layer.layer_number - 1 for i, layer in enumerate(bare.decoder.layers)}
    ep = bare.pg_collection.ep
    experts = (bare.config.num_moe_experts or 0) // ep.size()

    def rename(name: str) -> str:
        name = _LAYER.sub(lambda m: f"decoder.layers.{layers[int(m.group(1))]}.", name)
        return _EXPERT.sub(lambda m: f".local_experts.{int(m.group(1)) + experts * ep.rank()}.", name)

    return {rename(name): p for name, p in found.items()}


@dataclass(frozen=True)
class Split:
    """Part ``index`` of ``count`` along ``dim``, in ``stride`` interleaved blocks (gate, up); all where count is 1."""

    dim: int = 0
    stride: int = 1
    index: int = 0
    count: int = 1

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of the unsplit tensor."""
        if self.count == 1:
            return whole
        blocks = whole.chunk(self.stride, dim=self.dim)
        return torch.cat([block.chunk(self.count, dim=self.dim)[self.index] for block in blocks], dim=self.dim)

    def whole_shape(self, part: Iterable[int]) -> list[int]:
        shape = list(part)
        shape[self.dim] *= self.count
        return shape


def split_of(name: str, param: Any, pg: Any) -> Split:
    """How tensor parallelism splits a parameter; experts have tensor ranks of their own."""
    group = pg.expt_tp if is_expert(name) else pg.tp
    if not getattr(param, "tensor_model_parallel", False) or group.size() == 1:
        return Split()
    return Split(param.partition_dim, max(1, param.partition_stride), group.rank(), group.size())


Part = tuple[Split, torch.Tensor]


def parts(chunks: list[Any], value: Callable[[Any], torch.Tensor] = lambda p: p) -> dict[str, Part]:
    """This rank's part of ``value(parameter)`` for every parameter it holds, copied, with where it belongs."""
    found = {}
    for chunk in chunks:
        pg = unwrap(chunk).pg_collection
        for name, p in global_names(chunk).items():
            found[name] = (split_of(name, p, pg), value(p).detach().clone())
    return found


def join(pieces: list[tuple[Split, torch.Tensor]]) -> torch.Tensor:
    """One part for each index, in any order -> the unsplit tensor."""
    ordered = [values for _, values in sorted(pieces, key=lambda piece: piece[0].index)]
    split = pieces[0][0]
    assert len(ordered) == split.count, (len(ordered), split)
    if split.count == 1:
        return ordered[0]
    blocks = [values.chunk(split.stride, dim=split.dim) for values in ordered]
    return torch.cat([block[i] for i in range(split.stride) for block in blocks], dim=split.dim)


def assemble(ranks: Iterable[dict[str, tuple[Split, torch.Tensor]]], vocab_size: int) -> dict[str, torch.Tensor]:
    """The unsplit tensors from ``parts`` of every rank; of copies the first. Padding rows are cut off."""
    pieces: dict[str, dict[int, tuple[Split, torch.Tensor]]] = {}
    for found in ranks:
        for name, (split, values) in found.items():
            pieces.setdefault(name, {}).setdefault(split.index, (split, values))
    whole = {name: join(list(by_index.values())) for name, by_index in pieces.items()}
    return {name: value[:vocab_size] if name in VOCABULARY else value for name, value in whole.items()}
