"""Which implementation of an op runs, and what every launcher of a kernel needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType

import torch

from engine_kernels import jit

try:  # torch first: its libgomp is then the one the extension shares
    from engine_kernels import _cpu as _extension
except ImportError as error:  # not built, or for another Python
    _extension, _missing = None, str(error)
else:
    _missing = ""

_log = logging.getLogger("engine_kernels")
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1}
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ELEMENTS_A_THREAD = 16384  # waking a thread costs about 5 us, the time one core needs for so many elements
_told: set[tuple[str, str]] = set()
_NAMES = {"cpu": "C++ kernel", "triton": "Triton kernel", "torch": "plain torch"}


def choose(impl: str, op: str, same: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor] | None = None,
           kernels: tuple[str, ...] = ("cpu", "triton")) -> str:
    """Resolve `impl` ("auto", "torch", "cpu" or "triton") for `op`: which of `kernels` runs, or "torch".

    `same`: the tensor arguments of one dtype, by name; `others`: those of any. "auto" takes the C++ kernel for tensors
    on the CPU and the Triton kernel for tensors on a GPU where they can run, else torch, and logs each distinct choice
    once. Raises ValueError for an unknown `impl`, RuntimeError that names the argument for a kernel that cannot run.
    """
    if impl == "torch":
        return impl
    if impl not in ("auto", *kernels):
        known = ", ".join(f'"{name}"' for name in ("auto", "torch", *kernels))
        raise ValueError(f"{op}: impl must be one of {known}, not {impl!r}")
    wanted = impl
    if impl == "auto":
        wanted = "triton" if next(iter(same.values())).device.type == "cuda" else "cpu"
    obstacle = _obstacle(wanted, same, others or {}) if wanted in kernels else f"{op} has no {_NAMES[wanted]}"
    if impl != "auto" and obstacle:
        raise RuntimeError(f'{op}: impl="{impl}" cannot run: {obstacle}; use impl="auto" or "torch"')
    # torch.compile traces no logging.
    if not torch.compiler.is_compiling() and (op, wanted + obstacle) not in _told:
        _told.add((op, wanted + obstacle))
        _log.info("%s: %s", op, f"plain torch ({obstacle})" if obstacle else _NAMES[wanted])
    return "torch" if obstacle else wanted


def _obstacle(kernel: str, same: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> str:
    """Why the C++ or the Triton kernel cannot take these tensors; empty if it can."""
    if kernel == "cpu" and (found := extension_obstacle()):
        return found
    first, dtype = next((name, tensor.dtype) for name, tensor in same.items())
    dtypes = _TRITON_DTYPES if kernel == "triton" else tuple(_DTYPE_CODE)
    if dtype not in dtypes:
        names = [str(known).removeprefix("torch.") for known in dtypes]
        return f"{first} is {dtype}, needs {', '.join(names[:-1])} or {names[-1]}"
    for name, tensor in same.items():
        if tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, but {first} is {dtype}"
    for name, tensor in (*same.items(), *others.items()):
        if kernel == "triton":
            if found := jit.obstacle(tensor):
                return f"{name} is {found}" if found.startswith("on ") else found
        elif tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}"
    return ""


def extension_obstacle() -> str:
    """Why there is no C++ extension; empty if there is."""
    return f"the extension engine_kernels._cpu is not built ({_missing})" if _extension is None else ""


def extension() -> ModuleType:
    """The C++ extension. Only called behind `choose`, or by an op of torch.library that was reached through it."""
    if _extension is None:
        raise RuntimeError(extension_obstacle())
    return _extension


def dtype_code(tensor: torch.Tensor) -> int:
    return _DTYPE_CODE[tensor.dtype]


def num_threads(elements: int) -> int:
    """Threads worth waking for `elements`, at most torch.get_num_threads()."""
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_A_THREAD))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] as [n, d] with unit stride in the last dimension; a copy only where no such view exists."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
