"""Whether our implementation of a case computes what its formula says: values and gradients against fp64.

Norm-wise, on random inputs of the case's own size, with memory that nobody wrote poisoned: an output element that a
kernel leaves out is NaN, and NaN is not within any tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.cases import Case, Inputs, Run


@dataclass(frozen=True)
class Check:
    """The largest relative error, of which tensor, and what is wrong (empty: nothing)."""

    error: float
    where: str
    problem: str


class Mismatch(Exception):
    """Our outputs are not shaped as the reference's."""


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def fresh(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Copies that share nothing, floating ones in ``dtype`` if there is one; gradients are wanted where they were."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copied = leaf.detach().clone()
        if dtype is not None and copied.is_floating_point():
            copied = copied.to(dtype)
        return copied.requires_grad_(leaf.requires_grad)

    return pytree.tree_map(one, list(arguments))


def gradients(run: Run, arguments: Sequence[Any], cotangents: Sequence[Tensor] | None = None
              ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """-> outputs, gradients of the arguments that want one, and the cotangents used: random ones if none are given."""
    outputs = tensors(run(*arguments))
    differentiable = [out for out in outputs if out.requires_grad]
    if cotangents is None:
        cotangents = [torch.randn_like(out, dtype=torch.float32).to(out.dtype) for out in differentiable]
    if [c.shape for c in cotangents] != [out.shape for out in differentiable]:
        raise Mismatch(f"outputs that have a gradient are {[tuple(c.shape) for c in cotangents]}, the reference's "
                       f"{[tuple(out.shape) for out in differentiable]}")
    found: Sequence[Tensor | None] = []
    leaves = [leaf for leaf in tensors(list(arguments)) if leaf.requires_grad]
    if differentiable and leaves:
        found = torch.autograd.grad(differentiable, leaves,
                                    [c.to(out.dtype) for c, out in zip(cotangents, differentiable, strict=True)],
                                    allow_unused=True)
    return [out.detach() for out in outputs], list(found), list(cotangents)


def check(case: Case, inputs: Inputs) -> Check:
    """Compares "ours" with the exact reference, in fp32 where fp64 does not fit. Raises what ours raises."""
    arguments = case.make(inputs)
    with poisoned_memory():
        outputs, grads, cotangents = gradients(case.runs["ours"], fresh(arguments))
    exact_run = case.exact or case.runs["eager"]
    try:
        exact_outputs, exact_grads, _ = _in_wide(
            lambda dtype: gradients(exact_run, fresh(arguments, dtype), cotangents))
    except Mismatch as error:
        return Check(float("nan"), "", str(error))
    if len(outputs) != len(exact_outputs) or len(grads) != len(exact_grads):
        return Check(float("nan"), "", f"{len(outputs)} outputs and {len(grads)} gradients, the reference has "
                                       f"{len(exact_outputs)} and {len(exact_grads)}")
    named = [(f"output {i}", *pair) for i, pair in enumerate(zip(outputs, exact_outputs, strict=True))]
    named += [(f"gradient {i}", *pair) for i, pair in enumerate(zip(grads, exact_grads, strict=True))]
    return _worst(named, case.tolerance)


def _in_wide(compute: Callable[[torch.dtype], Any]) -> Any:
    try:
        return compute(torch.float64)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return compute(torch.float32)


def _worst(named: Sequence[tuple[str, Tensor | None, Tensor | None]], tolerance: float) -> Check:
    worst, where = 0.0, ""
    for name, ours, exact in named:
        if (ours is None) != (exact is None):
            return Check(float("nan"), name, f"{name}: only one of ours and the reference has it")
        if ours is None or exact is None:
            continue
        if ours.shape != exact.shape:
            return Check(float("nan"), name, f"{name}: shape {tuple(ours.shape)}, the reference {tuple(exact.shape)}")
        error = relative_error(ours, exact)
        if not error <= worst:  # NaN too
            worst, where = error, name
        if error != error:
            break
    problem = "" if worst <= tolerance else f"{where} is off by {worst:.1e}, allowed are {tolerance:.1e}"
    return Check(worst, where, problem)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the exact one; of integers and booleans the share that differs."""
    if not exact.numel():
        return 0.0
    if not exact.is_floating_point():
        return (ours != exact).double().mean().item()
    wide = exact.double() if exact.numel() < 2**28 else exact.float()  # 2 GiB in fp64
    norm = torch.linalg.vector_norm(wide, dtype=torch.float64)
    return (torch.linalg.vector_norm(ours.to(wide.dtype) - wide, dtype=torch.float64) / norm.clamp_min(1e-300)).item()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, torch.empty and its like hold NaN (integers: their largest), on any device."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
