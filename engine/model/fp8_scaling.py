"""Scales of the 8-bit numbers that linear layers multiply: of the moment, or from the maxima of earlier steps.

A layer has three tensors with a scale each: its input, its weight, and its output's gradient. Current scaling takes the
maximum of the tensor itself. Delayed scaling takes that of the last steps (``history_length`` of them): nothing has to
be read before it is written as fp8. All micro-batches of a step share a step's scales; the first step of a run, which
has no history, scales by the moment.

So that a layout changes nothing, a maximum is that of the unsplit tensor: ranks that hold parts of it agree on it, with
current scaling at once (one number an operand), with delayed scaling once a step for all layers together. Rowwise
scales are of the rows and columns that a rank has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.config.fp8 import Fp8Config
from engine.parallel.topology import Groups
from engine_kernels.fp8 import E4M3, E5M2, Quantised, amax_bits, quantise, scale_of
from engine_kernels.fp8_linear import transpose

INPUT, WEIGHT, GRAD = range(3)


class Scaling:
    """The scales of all linear layers of a rank, and within a global batch their quantised weights.

    ``names``: the layers, by their names in the unsplit model. ``history``: int32 [layers, 3, steps], maxima as the
    bits of fp32 numbers (see ``engine_kernels.fp8``), the newest first; zeros where there is none. The same on all
    ranks that share the layers.
    """

    def __init__(self, recipe: Fp8Config, names: list[str], groups: Groups, impl: str):
        self.recipe, self.names, self.groups, self.impl = recipe, names, groups, impl
        self.delayed = recipe.scaling == "delayed"
        length = recipe.history_length if self.delayed else 0
        shape = (len(names), 3)
        self.history = torch.zeros(*shape, length, dtype=torch.int32, device=groups.device)
        self.measured = torch.zeros(shape, dtype=torch.int32, device=groups.device)
        self.scales = torch.ones(shape, device=groups.device)
        self.measuring = self.known = False  # known: the history says what the scales are
        self.holds: bool | None = None  # whether weights are held, and with their transposes
        self.weights: dict[int, Quantised] = {}

    def begin(self, *, training: bool) -> None:
        """Weights do not change until ``end``."""
        self.weights.clear()
        self.holds = training
        self.measuring = self.delayed and training
        self.measured.zero_()

    def end(self, *, finished: bool) -> None:
        """``finished``: the global batch went through, and its maxima count. Collective if training."""
        self.weights.clear()
        self.holds = None
        if self.measuring and finished:
            for group in (self.groups.pg.tp, self.groups.pg.dp_cp):
                if group.size() > 1:
                    dist.all_reduce(self.measured, dist.ReduceOp.MAX, group=group)
            self.history = torch.cat([self.measured[..., None], self.history[..., :-1]], dim=-1)
            self.rescale()
        self.measuring = False

    def rescale(self) -> None:
        """The scales that the history asks for, if there is one. Waits for the device the first time only."""
        self.known = self.known or bool(self.history.any())
        largest, margin = self.history.amax(-1), 2.0**self.recipe.margin
        for part, dtype in ((slice(INPUT, GRAD), E4M3), (slice(GRAD, None), E5M2)):
            found = scale_of(largest[:, part], dtype, power_of_2=self.recipe.power_of_2_scales)
            self.scales[:, part] = found * margin


class LayerScaling:
    """The three tensors of one linear layer. ``sharers``: by tensor, the ranks that hold parts of it (None: one)."""

    def __init__(self, whole: Scaling, index: int, sharers: tuple[Any, Any, Any]):
        self.whole, self.index, self.sharers = whole, index, sharers
        self.rowwise = whole.recipe.granularity == "rowwise"

    def known_scale(self, which: int) -> torch.Tensor | None:
        """The scale that delayed scaling has for this tensor, [1]."""
        return self.whole.scales[self.index, which : which + 1] if self.whole.known else None

    def to_measure(self, which: int) -> torch.Tensor | None:
        """Where this tensor's maximum goes, [1], if it counts."""
        return self.whole.measured[self.index, which : which + 1] if self.whole.measuring else None

    def quantise(self, which: int, x_nk: torch.Tensor, *, transposed: bool) -> Quantised:
        """Collective over the tensor's sharers with current scaling."""
        whole, dtype = self.whole, E5M2 if which == GRAD else E4M3
        common: dict[str, Any] = {"transpose": transposed, "power_of_2": whole.recipe.power_of_2_scales,
                                  "impl": whole.impl}
        if self.rowwise:
            return quantise(x_nk, dtype, rowwise=True, **common)
        scale, measured = self.known_scale(which), self.to_measure(which)
        if scale is not None:
            return quantise(x_nk, dtype, scale=scale, measured=measured, **common)
        amax = amax_bits(x_nk, impl=whole.impl)
        if self.sharers[which] is not None:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.sharers[which])
        if measured is not None:
            measured.copy_(torch.maximum(measured, amax))
        return quantise(x_nk, dtype, amax=amax, **common)

    def weight(self, weight_mk: torch.Tensor, *, transposed: bool) -> Quantised:
        """Quantised once a global batch, which begins after the last update: held for all its micro-batches."""
        whole = self.whole
        held = whole.weights.get(self.index)
        if held is None or (transposed and held.q_km is None):
            held = self.quantise(WEIGHT, weight_mk, transposed=transposed or bool(whole.holds))
            if whole.holds is not None:
                whole.weights[self.index] = held
        return held


def transposed(q: Quantised) -> Quantised:
    """A tensorwise one with its transpose, which a kernel that wrote whole rows had not."""
    return q if q.q_km is not None else Quantised(q.q_nk, q.scale, transpose(q.q_nk), q.scale)
