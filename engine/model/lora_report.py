"""What adapters add to a model, by target: counted before training, so that a target that matched nothing is an error
and not a run that learned less than it was asked to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from engine.config import Config
from engine.config.stages import LORA_GROUPS, LORA_TARGETS
from engine.errors import UserError
from engine.model import lora
from engine.model.whole import VOCABULARY, global_names, quantised_names, split_of
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap


@dataclass(frozen=True)
class Report:
    """Of the unsplit model. ``targets``: Hugging Face's name -> (matrices with an adapter, its parameters)."""

    targets: dict[str, tuple[int, int]]
    base: int

    @property
    def trained(self) -> int:
        return sum(parameters for _, parameters in self.targets.values())

    def lines(self) -> list[str]:
        """For the console: a target a line, and the sum."""
        width = max(map(len, self.targets))
        rows = [f"  {name:<{width}}  {matrices:>6,} matrices  {parameters:>14,} parameters"
                for name, (matrices, parameters) in self.targets.items()]
        share = 100 * self.trained / max(1, self.base)
        return ["adapters:", *rows, f"  {self.trained:,} trained beside {self.base:,} frozen ({share:.2f}%)"]


def _named(target: str) -> tuple[str, ...]:
    return LORA_TARGETS if target == "all-linear" else LORA_GROUPS.get(target, (target,))


def _in_layers(chunks: list[Any]) -> set[str]:
    """The targets that this rank's layers have."""
    return {("experts." if linear.is_expert else "") + part
            for chunk in chunks for linear, parts, _ in lora.linears(chunk) for part in parts}


def check(chunks: list[Any], cfg: Config, groups: Groups) -> Report:
    """Counts what ``cfg.lora`` adds. Collective.

    Raises ``UserError`` on all ranks for a target that matched nothing, with the names there are, and for a pipeline
    stage without adapters, which would have nothing to train.
    """
    assert cfg.lora is not None
    own = {}
    for chunk in chunks:
        pg = unwrap(chunk).pg_collection
        for name, p in (global_names(chunk) | quantised_names(chunk)).items():
            if name == "output_layer.weight" and cfg.model.tie_embeddings:
                continue  # the last stage's copy
            shape = split_of(name, p, pg).whole_shape(p.shape)
            own[name] = math.prod([chunk.config.vocab_size, *shape[1:]] if name in VOCABULARY else shape)
    gathered: list = [None] * groups.world_size
    dist.all_gather_object(gathered, (own, _in_layers(chunks)))
    sizes = {name: size for part, _ in gathered for name, size in part.items()}
    there = set().union(*(names for _, names in gathered))
    for i, target in enumerate(cfg.lora.target_modules):
        if not there & set(_named(target)):
            raise UserError(f"{target!r} matched nothing in this model", where=f"lora.target_modules.{i}",
                            fix=f"It has {', '.join(name for name in LORA_TARGETS if name in there)}")
    for rank, (part, _) in enumerate(gathered):
        if not any(map(lora.is_adapter, part)):
            raise UserError(f"rank {rank} has no layer with a target, and so nothing to train",
                            where="lora.target_modules", fix="Use fewer parallel.pipeline stages, or more targets")
    found: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        if lora.is_adapter(name):
            _, target, which = lora.factor(name)
            matrices, parameters = found.get(target, (0, 0))
            found[target] = matrices + (which == "a"), parameters + size
    ordered = {name: found[name] for name in LORA_TARGETS if name in found}
    return Report(ordered, sum(size for name, size in sizes.items() if not lora.is_adapter(name)))
