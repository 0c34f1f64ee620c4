"""Which parameters Muon updates, and into which matrices each is cut: the hidden layers' weights, by their names.

    n parameters of one shape, r this rank's rows, c its columns

The fused QKV weight is, for every key-value group, its query heads' rows, then its key's, then its value's: each of the
three is a matrix of its own. A feed-forward network's first weight is gate and up. Every other weight is one matrix,
and every expert has its own. Embedding, output head, routers and gates in front of experts choose or mix instead of
transforming hidden features, and go to AdamW with every vector.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from engine.model.whole import VOCABULARY, is_expert
from engine.train import newton_schulz
from engine.train.newton_schulz import Coefficients

_QKV = re.compile(r"\.linear_qkv\.weight$")
_GATE_UP = re.compile(r"\.linear_fc1\.weight$")
_ONE = re.compile(r"\.(linear_proj|linear_fc2)\.weight$")
_ADAMW = re.compile(r"\.(router\.weight|gate_weight)$")


@dataclass(frozen=True)
class Matrices:
    """How one parameter, or all of equal shape, is orthogonalised.

    ``form``: this rank holds whole matrices ("local"), or parts along ``dim`` (0 rows, 1 columns) over the ranks of
    ``group``, whose Gram matrices are summed ("gram") or which are gathered ("gather").
    ``parts``: equal runs of this rank's rows that belong together (2 for gate and up). Then, of each part or of what
    is gathered of it, ``groups`` equal runs of rows, each holding unsplit matrices of these ``shapes``.
    """

    form: Literal["local", "gram", "gather"]
    parts: int
    groups: int
    shapes: tuple[tuple[int, int], ...]
    dim: int = 0
    group: Any = None

    def flops(self, steps: int) -> int:
        """Floating-point operations of one update, over all ranks that share it."""
        return self.parts * self.groups * sum(newton_schulz.flops(*shape, steps) for shape in self.shapes)

    def update(self, x_nrc: torch.Tensor, coefficients: Coefficients, steps: int) -> torch.Tensor:
        """[n, r, c] directions of n parameters -> their updates at learning rate 1, fp32.

        Each matrix is orthogonalised and scaled by 0.2·√max(rows, columns), after which an update is about as large as
        AdamW's (Liu et al., 2025, arXiv:2502.16982). Collective over ``group`` unless the form is local.
        """
        part = x_nrc.reshape(-1, x_nrc.shape[1] // self.parts, x_nrc.shape[2])
        if self.form == "gram":
            found = newton_schulz.orthogonalise_split(part, self.dim, self.group, coefficients, steps)
            return _scaled(found, self.shapes[0]).reshape(x_nrc.shape)
        if self.form == "gather":
            return self._gathered(part, coefficients, steps).reshape(x_nrc.shape)
        runs = part.reshape(part.shape[0] * self.groups, -1, part.shape[2])
        return self._each(runs, coefficients, steps).reshape(x_nrc.shape)

    def _gathered(self, part: torch.Tensor, coefficients: Coefficients, steps: int) -> torch.Tensor:
        """This rank's share of the run of rows that it lies in; a run is split over ranks / groups of them."""
        rank, ranks = self.group.rank(), self.group.size()
        whole = newton_schulz.gather(part, self.dim, self.group)
        run = whole.chunk(self.groups, dim=1)[rank * self.groups // ranks]
        sharing = ranks // self.groups
        return self._each(run, coefficients, steps).chunk(sharing, dim=1 + self.dim)[rank % sharing]

    def _each(self, runs: torch.Tensor, coefficients: Coefficients, steps: int) -> torch.Tensor:
        matrices = runs.split([rows for rows, _ in self.shapes], dim=1)
        return torch.cat([_scaled(newton_schulz.orthogonalise(matrix, coefficients, steps), shape)
                          for matrix, shape in zip(matrices, self.shapes, strict=True)], dim=1)


def _scaled(x_nrc: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return x_nrc.float() * (0.2 * math.sqrt(max(shape)))


def of(name: str, param: torch.Tensor, settings: Any, pg: Any, *, steps: int, size: int) -> Matrices | None:
    """The matrices of the parameter ``name`` (its name in the unsplit model), or None where AdamW updates it.

    ``settings``: the model's ``TransformerConfig``. ``steps`` and ``size`` (bytes a number) of Newton–Schulz decide
    between Gram matrices and gathering.
    """
    if param.dim() != 2 or name in VOCABULARY or _ADAMW.search(name):
        return None
    rows, columns = param.shape
    group = pg.expt_tp if is_expert(name) else pg.tp
    ranks = group.size()
    if _QKV.search(name):
        d, groups = settings.kv_channels, settings.num_query_groups
        shapes = tuple((height, columns) for height in (settings.num_attention_heads // groups * d, d, d))
        if groups % ranks == 0:
            return Matrices("local", 1, groups // ranks, shapes)
        return Matrices("gather", 1, groups, shapes, 0, group)
    assert _GATE_UP.search(name) or _ONE.search(name), f"neither Muon nor AdamW is meant for {name}"
    parts, dim = (2, 0) if _GATE_UP.search(name) else (1, 1)
    whole = (rows // parts * ranks, columns) if dim == 0 else (rows, columns * ranks)
    if ranks == 1:
        return Matrices("local", parts, 1, (whole,))
    return Matrices(newton_schulz.cheaper_split(*whole, dim, ranks, steps, size), parts, 1, (whole,), dim, group)
