"""The section ``data``: what the model reads in the stages on prepared tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from engine.config.base import Problem, Section, option

STEPS = 10**12  # a bound that no run reaches: it keeps arithmetic on absurd input fast


class BlendEntry(Section):
    """One source of a blend."""

    path: Path = option(..., "prepared directory")
    weight: float | None = option(
        1.0, "share of what is read, relative to the other entries: of tokens, or as data.blend_by says (null in all "
        "entries: in proportion to their sizes; 0: gives nothing)", "1", ge=0
    )
    max_epochs: float | None = option(
        None, "passes over this source, after which it leaves and the others share on (null: no limit)", "epochs",
        gt=0, le=10**9,
    )


class BlendChange(Section):
    """Other weights from a step on."""

    step: int = option(..., "step from which they hold, at its first whole sequence of model.seq_length", "steps",
                       ge=1, le=STEPS)
    weights: list[float] | None = option(
        ..., "a weight for each entry of data.blend, in its order (null: in proportion to their sizes)", "1"
    )

    def problems(self) -> Iterator[Problem]:
        for i, weight in enumerate(self.weights or ()):
            if not (math.isfinite(weight) and weight >= 0):
                yield Problem(f"weights.{i}", f"{weight} is no weight", "Give a number that is not negative")
        if self.weights is not None and not any(self.weights):
            yield Problem("weights", "no entry has a weight above 0", "Give at least one entry a positive weight")


class DataConfig(Section):
    """What the model reads: one prepared directory, or a blend of several."""

    path: Path | None = option(None, "prepared directory (see `mainspring prepare`)")
    blend: list[BlendEntry] = option(list, "several prepared directories with weights, instead of path")
    blend_by: Literal["tokens", "documents"] = option(
        "tokens", "what weights are shares of; documents: a source of long documents gives more tokens at the same one"
    )
    blend_changes: list[BlendChange] = option(list, "other weights of the blend, by step")
    num_workers: int = option(1, "background threads that read ahead (0: none)", "threads", ge=0, le=1024)
    cache_dir: Path | None = option(None, "where sample indices are kept (null: beside the data)")
    shuffle_seed: int | None = option(None, "seed of the sample order (null: seed)", ge=0, lt=2**63)

    def only(self, path: Path) -> DataConfig:
        """The same section, reading one directory."""
        return self.model_copy(update={"path": path, "blend": [], "blend_by": "tokens", "blend_changes": []})

    def problems(self) -> Iterator[Problem]:
        if self.path is not None and self.blend:
            yield Problem(
                "blend",
                "data.path and data.blend are both set",
                "Keep one; put the path into the blend with its weight",
            )
        seen: set[Path] = set()
        for i, entry in enumerate(self.blend):
            if entry.path in seen:
                yield Problem(
                    f"blend.{i}.path", f"{entry.path} is listed twice", "Merge the two entries into one weight"
                )
            seen.add(entry.path)
        yield from self._weight_problems()
        yield from self._change_problems()

    def _weight_problems(self) -> Iterator[Problem]:
        weights: Sequence[float | None] = [entry.weight for entry in self.blend]
        if None in weights and any(weight is not None for weight in weights):
            yield Problem(f"blend.{weights.index(None)}.weight", "is null, but other entries have a weight",
                          "Give every entry one, or set all to null")
        if weights and not any(weight is None or weight > 0 for weight in weights):
            yield Problem("blend", "no entry has a weight above 0", "Give at least one entry a positive weight")

    def _change_problems(self) -> Iterator[Problem]:
        if not self.blend:
            for name in ("blend_changes", "blend_by"):
                if getattr(self, name) not in ([], "tokens"):
                    yield Problem(name, "is set, but data.blend is empty", "Remove it, or name a blend")
            return
        for i, change in enumerate(self.blend_changes):
            if change.weights is not None and len(change.weights) != len(self.blend):
                yield Problem(f"blend_changes.{i}.weights",
                              f"{len(change.weights)} weights for {len(self.blend)} entries of data.blend",
                              "Give one for each entry, in their order")
            if i and change.step <= self.blend_changes[i - 1].step:
                yield Problem(f"blend_changes.{i}.step",
                              f"step {change.step} does not come after step {self.blend_changes[i - 1].step}",
                              "List the changes in ascending order of steps")
