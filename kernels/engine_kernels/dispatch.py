"""Which implementation of an op runs, and what every launcher of a C++ kernel needs."""

from __future__ import annotations

import logging
from types import ModuleType

import torch

try:  # torch first: its libgomp is then the one the extension shares
    from engine_kernels import _cpu as _extension
except ImportError as error:  # not built, or for another Python
    _extension, _missing = None, str(error)
else:
    _missing = ""

_log = logging.getLogger("engine_kernels")
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1}
_ELEMENTS_A_THREAD = 16384  # waking a thread costs about 5 us, the time one core needs for so many elements
_told: set[tuple[str, str]] = set()


def choose(impl: str, op: str, *tensors: torch.Tensor, others: tuple[torch.Tensor, ...] = ()) -> str:
    """Resolve `impl` ("auto", "torch" or "cpu") for `op` on `tensors` (of one dtype) and `others` (of any).

    "auto" takes the C++ kernel for fp32 and bf16 tensors on the CPU when the extension is there, and logs each distinct
    choice once. Raises ValueError for an unknown `impl`, RuntimeError for "cpu" where the kernel cannot run.
    """
    if impl == "torch":
        return impl
    if impl not in ("auto", "cpu"):
        raise ValueError(f'{op}: impl must be "auto", "torch" or "cpu", not {impl!r}')
    obstacle = _obstacle(tensors, others)
    if impl == "cpu" and obstacle:
        raise RuntimeError(f'{op}: impl="cpu" cannot run: {obstacle}; use impl="auto" or "torch"')
    chosen = "torch" if obstacle else "cpu"
    if (op, obstacle) not in _told:
        _told.add((op, obstacle))
        _log.info("%s: %s", op, f"plain torch ({obstacle})" if obstacle else "C++ kernel")
    return chosen


def _obstacle(tensors: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> str:
    """Why the C++ kernel cannot take these tensors; empty if it can."""
    if _extension is None:
        return f"the extension engine_kernels._cpu is not built ({_missing})"
    dtype = tensors[0].dtype
    if dtype not in _DTYPE_CODE:
        return f"dtype {dtype}, needs float32 or bfloat16"
    for tensor in tensors:
        if tensor.dtype != dtype:
            return f"dtypes {dtype} and {tensor.dtype} differ"
    for tensor in (*tensors, *others):
        if tensor.device.type != "cpu":
            return f"a tensor on {tensor.device}"
    return ""


def extension() -> ModuleType:
    """The C++ extension. Only called behind `choose`, or by an op of torch.library that was reached through it."""
    if _extension is None:
        raise RuntimeError(f"the extension engine_kernels._cpu is not built ({_missing})")
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
