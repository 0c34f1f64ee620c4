"""Triton where it is installed, how a kernel is launched, and compilation for GPUs that are not at hand.

    from engine_kernels.jit import launch, tl, triton

Without Triton (macOS) the names are there, so that kernel files import; ``obstacle`` says why nothing can be launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

__all__ = ["Compiled", "cdiv", "compiling", "interpreted", "launch", "multiprocessors", "next_power_of_2", "obstacle",
           "tl", "triton", "wide", "wide_dtype"]

if TYPE_CHECKING:  # inside kernels the language is not Python's: Triton's types would only mislead a checker
    triton: Any = None
    _missing = ""

    class _Language(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Language):
        class constexpr(Any):
            def __init__(self, value: Any): ...
else:
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        _missing = str(error)

        class _Absent:
            """Stands for ``triton`` and ``tl`` at import: decorators leave a function as it is, names are nothing."""

            def __getattr__(self, name: str) -> Any:
                return lambda function=None, **_options: function if callable(function) else lambda decorated: decorated

        triton = _Absent()
        tl = _Absent()
    else:
        _missing = ""
        if triton.knobs.runtime.interpret:
            from engine_kernels import interpreter

            interpreter.repair()
_interpreted = not _missing and bool(triton.knobs.runtime.interpret)  # torch.compile cannot trace the knob itself


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one target: what ``compiling`` collects."""

    name: str
    constants: dict[str, Any]
    num_warps: int
    kernel: Any  # triton's CompiledKernel


_compiled: list[Compiled] | None = None  # a list while kernels are compiled instead of launched


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported), on CPU tensors."""
    return _interpreted


def only_compiles() -> bool:
    """Whether kernels are compiled and nothing runs: then what lies between them need not be computed either."""
    return _compiled is not None


def obstacle(tensor: torch.Tensor) -> str:
    """Why a Triton kernel cannot take ``tensor``; empty if it can."""
    if _missing:
        return f"Triton is not installed ({_missing})"
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and (_compiled is not None or interpreted())):
        return ""
    return f"on {tensor.device}; Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 for the interpreter)"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs ``kernel`` on the device of its first tensor argument; an empty grid runs nothing.

    ``options``: the kernel's constexpr arguments by name, num_warps, num_stages.
    """
    if not all(grid):
        return
    if _compiled is not None:
        constants = {name: value for name, value in options.items() if name not in ("num_warps", "num_stages")}
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        _compiled.append(Compiled(kernel.fn.__name__, constants, compiled.metadata.num_warps, compiled))
        return
    first = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


class _Target:
    """Stands for Triton's driver of a GPU of some compute capability: enough to compile."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Within, ``launch`` compiles for a GPU of this compute capability (80, 90, 100) and runs nothing.

    Ops called with impl="triton" on CPU tensors then compile what they would launch, with the options they would use;
    their results are not written. Needs no GPU, and a process without TRITON_INTERPRET.
    """
    global _compiled
    if _missing or interpreted():
        raise RuntimeError("kernels cannot be compiled: " + (_missing or "TRITON_INTERPRET=1 is set; unset it"))
    triton.runtime.driver.set_active(_Target(capability))
    _compiled = []
    try:
        yield _compiled
    finally:
        _compiled = None
        triton.runtime.driver._active = None


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the tensor's GPU; in the interpreter few, and while compiling an H100's."""
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 4 if _compiled is None else 132


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What kernels compute in: fp64 for fp64 (so that gradients can be checked by differences), else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> Any:
    """The same as Triton's type, for a constexpr argument."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def cdiv(n: int, block: int) -> int:
    """Blocks that cover n elements."""
    return -(-n // block)
