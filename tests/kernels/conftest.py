"""What every kernel test needs: instruction sets and thread counts to run under, and comparison with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from engine_kernels import _cpu, dispatch

BEST = _cpu.instruction_set()
RUNNABLE = [name for name in ("avx512_bf16", "avx512", "avx2", "plain") if _cpu.use_instruction_set(name)]
_cpu.use_instruction_set(BEST)

Check = Callable[..., None]


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    """Other inputs in every run; the seed is in the output of a test that fails."""
    print(f"torch.manual_seed({torch.seed()})")


@pytest.fixture(params=RUNNABLE)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this processor runs, in turn."""
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(BEST)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Thread counts, used however small the tensor (5: more threads than cores, and than rows in small shapes)."""
    before = torch.get_num_threads()
    monkeypatch.setattr(dispatch, "_ELEMENTS_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _gradients(function: Callable[..., object], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None):
    """Outputs, gradients of the floating inputs, and the cotangents used (random, on the output's own grid)."""
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    if cotangents is None:
        cotangents = [torch.randn_like(o) for o in outputs]
    torch.autograd.backward(outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    grads = [leaf.grad for leaf in leaves if leaf.requires_grad]
    return [o.detach() for o in outputs], grads, cotangents


def _compare(function: Callable[..., object], reference: Callable[..., object], *inputs: Tensor,
             fp32: float = 2e-6, bf16: float = 2.0**-8, summed: float = 0.0) -> None:
    """`function(*inputs)` and its gradients against `reference` on the same numbers in float64.

    Each element may be off by the output's own rounding (relative, `bf16` or `fp32`) plus `fp32` of the largest
    element, or of `summed`: the size of terms that may cancel in a sum.
    """
    outputs, grads, cotangents = _gradients(function, inputs, None)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact_outputs, exact_grads, _ = _gradients(reference, wide, cotangents)
    assert len(grads) == len(exact_grads)
    for ours, exact in zip(outputs + grads, exact_outputs + exact_grads, strict=True):
        assert ours.shape == exact.shape
        if exact.numel():
            relative = {torch.bfloat16: bf16, torch.float16: bf16 / 4}.get(ours.dtype, fp32)
            atol = fp32 * max(summed, exact.abs().max().item()) + 1e-30
            torch.testing.assert_close(ours.double(), exact, rtol=relative, atol=atol)


@pytest.fixture
def device() -> str:
    """Where Triton kernels run: on the GPU, or in the interpreter (see tests/conftest.py)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def place(impl: str, device: str) -> str:
    """Where tensors are for the implementation that a test file's own fixture ``impl`` names."""
    return device if impl == "triton" else "cpu"


@pytest.fixture
def compare() -> Check:
    return _compare
