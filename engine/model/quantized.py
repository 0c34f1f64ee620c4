"""QLoRA's frozen base: the decoder's linear layers and experts hold NF4 codes in place of weights (``lora.base nf4``).

m output features, k input features (this tensor rank's share), e this rank's experts.

A layer's ``weight`` is then a ``Weight``, no tensor and no parameter: whoever multiplies asks for ``dense(weight)``,
which is dequantised for that one product, forward and backward anew, and goes away behind it. Embedding, head, norms,
routers and biases stay as they are. A weight is quantised when it is loaded (``Weight.copy_``), layer by layer
(engine/checkpoint/quantized_base.py, engine/export), so full weights never all lie in memory.

Every layout holds the same codes: blocks of 64 run along the input features, which column-parallel layers have whole
and row-parallel ones split at a multiple of 64, or the layer refuses; groups of compressed scales run along the
dimension that the layer does not split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import copy_tensor_model_parallel_attributes

from engine.errors import UserError
from engine.parallel.wrap import unwrap
from engine_kernels import nf4
from engine_kernels.nf4 import BLOCK, GROUP, Nf4


class Weight:
    """A frozen weight [m, k] in NF4, with what the engine asks of a parameter.

    ``dtype``: what it is dequantised to. Blank until ``copy_``.
    """

    requires_grad = False

    tensor_model_parallel: bool
    partition_dim: int
    partition_stride: int

    def __init__(self, parameter: Any, impl: str, double_quant: bool):
        """``parameter``: gives shape, type, device and how tensor ranks split it; its numbers are not read."""
        copy_tensor_model_parallel_attributes(self, parameter)
        assert parameter.partition_dim in (0, 1), "set whatever the layout"
        self.shape, self.dtype, self.device = parameter.shape, parameter.dtype, parameter.device
        self.name = "a quantised weight"  # until the model is built, and knows its own
        self.impl, self.filled = "auto" if impl == "cpu" else impl, False
        self.stack: Nf4 | None = None
        # Row-parallel layers split columns (dimension 1): their scales' groups run along rows.
        self._along = 1 - parameter.partition_dim if double_quant else None
        group = {None: None, 0: (GROUP, 1), 1: (1, GROUP)}[self._along]
        self.packed = nf4.empty(*self.shape, device=self.device, group=group)

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        """Of the weight, whatever holds it."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @torch.no_grad()
    def copy_(self, dense_mk: torch.Tensor) -> Weight:
        """Quantises ``dense_mk``, rounded to ``dtype`` first, as a weight of a model that is not quantised would be.

        Raises ``UserError`` for numbers that are not finite.
        """
        assert dense_mk.shape == self.shape, (self.name, dense_mk.shape, self.shape)
        found = nf4.quantise_nf4(dense_mk.to(self.device, self.dtype), impl=self.impl)
        if not found.absmax.isfinite().all():
            raise UserError("holds NaN or infinity, which cannot be quantised", where=self.name,
                            fix="Start from a sound checkpoint, or use lora.base none")
        self.packed.copy_(found if self._along is None else nf4.compressed(found, along=self._along))
        self.filled = True
        return self

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [m, k] that the codes stand for, in ``dtype`` (None: its own)."""
        assert self.filled, f"{self.name} was never loaded"
        return nf4.dequantise_nf4(self.packed, dtype or self.dtype, impl=self.impl)

    def detach(self) -> torch.Tensor:
        """As a parameter's: numbers that may be copied and compared."""
        return self.dense()


def dense(weight: Any) -> torch.Tensor:
    """What a product multiplies with: the weight itself, or what its codes stand for."""
    return weight.dense() if isinstance(weight, Weight) else weight


class Experts(Sequence[torch.Tensor]):
    """The weights of a layer's experts for products one after the other: only one at a time is dequantised."""

    def __init__(self, weights: Sequence[Weight]):
        self._weights = weights
        self._last: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, i: Any) -> Any:
        if self._last is None or self._last[0] != i:
            self._last = None  # its memory first
            self._last = i, self._weights[i].dense()
        return self._last[1]


def dense_experts(weights: Sequence[Any], impl: str) -> Any:
    """For ``engine_kernels.grouped_gemm``: one [e, m, k] for a kernel that takes all experts in one launch (``impl``
    triton), else one expert at a time. Weights that are not quantised come back as they are."""
    if not isinstance(weights[0], Weight):
        return weights
    whole = weights[0].stack
    if impl != "triton" or whole is None:
        return Experts(weights)
    assert all(weight.filled for weight in weights), f"{weights[0].name} and its like were never all loaded"
    return nf4.dequantise_nf4(whole, weights[0].dtype, impl=weights[0].impl)


def stack(weights: Sequence[Any]) -> None:
    """Lays the experts' codes one behind the other, so that one launch dequantises them all."""
    if not isinstance(weights[0], Weight):
        return
    like: Nf4 = weights[0].packed
    whole = nf4.empty(len(weights), *like.shape, device=like.codes.device, group=like.group if like.low is not None
                      else None)
    for i, weight in enumerate(weights):
        weight.packed, weight.stack = whole[i], whole


def hold(linear: Any) -> None:
    """Gives a parallel linear layer a blank ``Weight`` in place of its parameter, if its settings ask for it.

    Raises ``UserError`` where a block of 64 would lie on two tensor ranks, or not fill.
    """
    settings, parameter = linear.config, linear.weight
    if not settings.nf4_base:
        return
    k = parameter.shape[1]
    if k % BLOCK:
        raise UserError(f"NF4 has blocks of {BLOCK} input features, but a layer here has {k}", where="lora.base",
                        fix="Use fewer tensor ranks (parallel.tensor, parallel.expert_tensor), or lora.base none")
    del linear.weight
    linear.weight = Weight(parameter, settings.kernel_impl, settings.nf4_double_quant)


def weights(chunk: Any) -> dict[str, Weight]:
    """The quantised weights of a chunk by their names in it, as ``named_parameters`` would give them."""
    return {f"{name}.weight": module.__dict__["weight"] for name, module in unwrap(chunk).named_modules()
            if isinstance(module.__dict__.get("weight"), Weight)}


def parameter_count(chunks: list[Any]) -> int:
    """Weights of this rank that codes stand for."""
    return sum(weight.numel() for chunk in chunks for weight in weights(chunk).values())


@contextlib.contextmanager
def as_parameters(chunks: list[Any]) -> Iterator[None]:
    """Within, layers show parameters without memory in place of quantised weights, so that Megatron can say which part
    of which tensor in a checkpoint each of them is."""
    held = []
    try:
        for chunk in chunks:
            for module in unwrap(chunk).modules():
                weight = module.__dict__.get("weight")
                if isinstance(weight, Weight):
                    held.append((module, weight))
                    del module.weight
                    shown = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), False)
                    copy_tensor_model_parallel_attributes(shown, weight)
                    module.weight = shown
        yield
    finally:
        for module, weight in held:
            if "weight" in module._parameters:
                del module.weight
            module.weight = weight
