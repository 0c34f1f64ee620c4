"""Keeps Megatron from compiling its small fused functions on CPUs.

Megatron decorates them with ``torch.compile`` when it is imported. That alone loads the compiler, 2 s of the 5 s of CPU
time at start-up, and the first call of such a function on a CPU would run a C++ compiler in the middle of training. The
engine has kernels of its own for the hot ones. On GPUs nothing changes.
"""

from __future__ import annotations

import sys
import types


def _leave(function):
    return function


def _lookup(name: str):
    """``jit_fuser``, decided when Megatron asks for it: until then torch need not be imported."""
    if name != "jit_fuser":
        raise AttributeError(f"module 'megatron.core.jit' has no attribute {name!r}")
    import torch

    return torch.compile if torch.cuda.is_available() else _leave


def install() -> None:
    """Puts a module of the same interface in the place of ``megatron.core.jit``, before anything imports that one."""
    name = "megatron.core.jit"
    if name in sys.modules:
        return
    module = types.ModuleType(name, __doc__)
    module.__dict__.update({"__getattr__": _lookup, "noop_decorator": _leave, "enable_jit_fuser": lambda: None,
                            "disable_jit_fuser": lambda: module.__dict__.update(jit_fuser=_leave)})
    sys.modules[name] = module
