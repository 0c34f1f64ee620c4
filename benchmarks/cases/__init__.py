"""What is measured of each kernel, one file an op: sizes, inputs, implementations, and the work that none can avoid.

The same cases feed the GPU suite (``bench_kernels_gpu``), the ahead-of-time compilation (``bench_ahead``) and their
tests. ``benchmarks/cases/<op>.py`` has ``cases(scale) -> list[Case]``: "full" at the sizes of models people train,
"tiny" at sizes for Triton's interpreter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[..., Tensor | tuple[Tensor, ...]]


class Inputs(Protocol):
    """How a case makes its tensors; ahead of time they are never filled."""

    device: torch.device

    def normal(self, *shape: int, dtype: torch.dtype = ..., scale: float = 1.0, grad: bool = False) -> Tensor: ...

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor: ...


class Random:
    """Normal and uniform random tensors on a device."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, grad: bool = False
               ) -> Tensor:
        made = torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype)
        return made.requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)


class Unfilled:
    """CPU tensors whose memory is never touched, of any size; integers are ``low``, so that they can be offsets."""

    device = torch.device("cpu")

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, grad: bool = False
               ) -> Tensor:
        return torch.empty(shape, dtype=dtype).requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, low, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One op at one size.

    ``make(inputs)``: the arguments of every implementation. ``runs``: implementations by name; "ours" is the Triton
    kernel (impl="triton"), "eager" plain torch (the suite compiles it too), others (liger, quack, ...) are there where
    their package is. ``exact``: the reference in fp64 for fp64 arguments; None where "eager" is that. Bytes and FLOPs
    are the least any implementation moves and does; ``backward_*`` None means that the op has no backward pass.
    """

    op: str
    size: str
    make: Callable[[Inputs], Sequence[Any]]
    runs: Mapping[str, Run]
    forward_bytes: float
    forward_flops: float
    backward_bytes: float | None = None
    backward_flops: float | None = None
    exact: Run | None = None
    tolerance: float = 2e-2  # of the gradients and values, norm-wise, against fp64 at this case's dtype
    notes: Mapping[str, Any] = field(default_factory=dict)


def ops() -> list[str]:
    """Every op that has cases."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def cases(scale: str, wanted: Sequence[str] = ()) -> list[Case]:
    """The cases of all ops, or of those whose names begin with one of ``wanted``."""
    found = [op for op in ops() if not wanted or op.startswith(tuple(wanted))]
    return [case for op in found for case in cases_of(op, scale)]


def cases_of(op: str, scale: str) -> list[Case]:
    """Those of benchmarks/cases/<op>.py."""
    return importlib.import_module(f"benchmarks.cases.{op}").cases(scale)


def cases_that_import(scale: str, wanted: Sequence[str] = ()) -> tuple[dict[str, list[Case]], dict[str, str]]:
    """The same by file, and why the others could not be read: one broken file must not cost a GPU's time."""
    found: dict[str, list[Case]] = {}
    errors: dict[str, str] = {}
    for op in ops():
        if wanted and not op.startswith(tuple(wanted)):
            continue
        try:
            found[op] = cases_of(op, scale)
        except Exception as error:
            errors[op] = f"{type(error).__name__}: {error}"
    return found, errors


def optional(module: str, attribute: str) -> Any:
    """``module.attribute``, or None where the package is not installed."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return None
