"""Which kernel serves a call of attention: a ranking for the machine, and of each kernel why it cannot.

    backend               what it is                                        deterministic
    cpu                   the engine's C++ kernel                           always
    cudnn                 torch's SDPA by cuDNN                             no: refused where torch is told to be
    flash                 torch's SDPA by FlashAttention                    where torch is told to be; on a CPU always
    varlen                the same kernel with windows, sinks, documents    where torch is told to be
    flash_attn            the package: FA3 on Hopper, else FA2              where torch is told to be (FA2 then)
    flex                  FlexAttention                                     always (no atomics)
    efficient             torch's SDPA, memory-efficient kernel             where torch is told to be
    math                  torch's SDPA, all scores in memory                always (dropout by torch's generator)
    transformer_engine    DotProductAttention; only when asked for          by its NVTE_ALLOW_NONDETERMINISTIC_ALGO

"torch is told to be": torch.use_deterministic_algorithms(True). What torch's kernels take is what
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp checks. The order of a ranking follows what is published of
the kernels, not measurements of ours: on Hopper and Blackwell cuDNN before FlashAttention-2, as torch itself has it.
Where documents, a window or a sink are not native to a kernel, it is refused if another does them in one call
(cudnn, flash), or does them the long way (efficient, math: documents one by one, a window by blocks, a sink as a key).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine_kernels import dispatch, jit

_log = logging.getLogger("engine_kernels")
_told: set[str] = set()
_HALF = (torch.bfloat16, torch.float16)
PACKAGES = {"flash_attn_interface": "flash_attn_interface", "flash_attn": "flash_attn",
            "transformer_engine": "transformer_engine.pytorch"}


@dataclass(frozen=True)
class Request:
    """What a call asks of a kernel. ``s`` queries, ``t`` keys (0: not known); ``window`` is below t, or None."""

    device: str
    dtype: torch.dtype
    d: int
    s: int = 0
    t: int = 0
    window: int | None = None
    sinks: bool = False
    documents: bool = False
    dropout: float = 0.0
    grad: bool = True
    deterministic: bool = False

    def __str__(self) -> str:
        extras = [f"window {self.window}"] * (self.window is not None) + ["sinks"] * self.sinks
        extras += ["documents"] * self.documents + ["dropout"] * (self.dropout > 0)
        extras += ["deterministic"] * self.deterministic + ["queries at the end of the keys"] * (self.s < self.t)
        return ", ".join([f"{self.device} {_name(self.dtype)}", f"head dimension {self.d}", *extras])


@dataclass(frozen=True)
class Machine:
    """``capability``: of the GPU. ``cudnn``: as torch.backends.cudnn.version(). ``packages``: those of PACKAGES that
    can be imported. ``extension``, ``triton``: why they are not there, or empty."""

    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0
    packages: frozenset[str] = frozenset()
    extension: str = ""
    triton: str = ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_gpu(r: Request, m: Machine, dtypes: tuple[torch.dtype, ...] = _HALF) -> str:
    if r.device != "cuda":
        return f"runs on a GPU, but the tensors are on {r.device}"
    if m.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {m.capability[0]}.{m.capability[1]}"
    return "" if r.dtype in dtypes else f"takes {' or '.join(map(_name, dtypes))}, not {_name(r.dtype)}"


def _cpu(r: Request, m: Machine) -> str:
    if r.device != "cpu":
        return f"runs on a CPU, but the tensors are on {r.device}"
    if r.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 or bfloat16, not {_name(r.dtype)}"
    return "has no dropout" if r.dropout else m.extension


def _cudnn(r: Request, m: Machine) -> str:
    if found := _on_gpu(r, m):
        return found
    widest = 256 if m.capability == (9, 0) and m.cudnn >= 91000 else 128
    checks = (
        (m.cudnn < 90000, f"needs cuDNN 9, found {m.cudnn}"),
        (r.documents, "has no documents"), (r.window is not None, "has no window"), (r.sinks, "has no sinks"),
        (r.s != r.t, "is causal only where queries and keys are as many"), (0 < r.s < 2, "takes no single query"),
        (r.d % 8 > 0 or r.d > widest, f"takes head dimensions up to {widest} in steps of 8"),
        (r.dropout > 0 and 91100 < m.cudnn < 91400, "cuDNN 9.11 to 9.13 have no dropout"),
        (r.dropout * 16 % 1 > 0, "drops multiples of 1/16"),
        (r.s % 128 > 0 and m.cudnn < 91501, "before cuDNN 9.15.1 takes lengths in steps of 128"),
        (r.deterministic, "is not deterministic"),
    )
    return next((why for cannot, why in checks if cannot), "")


def _flash_kernel(r: Request, m: Machine) -> str:
    if found := _on_gpu(r, m):
        return found
    if r.d > 256:
        return "takes head dimensions up to 256"
    small = m.capability in ((8, 6), (8, 9)) or m.capability[0] == 12
    return "has no backward pass for head dimensions above 192 on this GPU" if small and r.grad and r.d > 192 else ""


def _flash(r: Request, m: Machine) -> str:
    if r.device == "cpu":
        return "has no documents" if r.documents else "has no dropout on a CPU" if r.dropout else ""
    missing = [what for has, what in ((r.documents, "documents"), (r.window is not None, "window"), (r.sinks, "sinks"))
               if has]
    return _flash_kernel(r, m) or (f"has no {' or '.join(missing)}; varlen is the same kernel with them"
                                   if missing else "")


def flash_attn_package(r: Request, m: Machine) -> str:
    """"flash_attn_interface" (FA3: Hopper, no dropout), "flash_attn" (FA2), or nothing."""
    three = "flash_attn_interface" in m.packages and m.capability[0] == 9 and not r.dropout and not r.deterministic
    return "flash_attn_interface" if three else "flash_attn" if "flash_attn" in m.packages else ""


def _flash_attn(r: Request, m: Machine) -> str:
    if found := _flash_kernel(r, m):
        return found
    if not flash_attn_package(r, m):
        return "flash-attn is not installed" + (" as FA2" if "flash_attn_interface" in m.packages else "")
    if r.d % 8:
        return "takes head dimensions in steps of 8"
    return "gives no gradient of the log-sum-exp, which sinks need" if r.sinks else ""


def _flex(r: Request, m: Machine) -> str:
    if r.dropout:
        return "has no dropout"
    if r.device == "cpu":
        return "has no backward pass on a CPU" if r.grad else ""
    if r.d < 16:
        return "takes head dimensions from 16"
    return _on_gpu(r, m, (*_HALF, torch.float32)) or m.triton


def _efficient(r: Request, m: Machine) -> str:
    step = 4 if r.dtype == torch.float32 else 8
    return _on_gpu(r, m, (*_HALF, torch.float32)) or (f"takes head dimensions in steps of {step}" if r.d % step else "")


def _transformer_engine(r: Request, m: Machine) -> str:
    if found := _on_gpu(r, m):
        return found
    checks = (("transformer_engine" not in m.packages, "Transformer Engine is not installed"),
              (r.sinks, "has sinks only as a parameter of its own"),
              (r.dropout > 0, "drops by a random state of its own"))
    return next((why for cannot, why in checks if cannot), "")


_OBSTACLES: dict[str, Callable[[Request, Machine], str]] = {
    "cpu": _cpu, "cudnn": _cudnn, "flash": _flash, "varlen": _flash_kernel, "flash_attn": _flash_attn, "flex": _flex,
    "efficient": _efficient, "math": lambda r, m: "", "transformer_engine": _transformer_engine}
BACKENDS = tuple(_OBSTACLES)


def _order(r: Request, m: Machine) -> tuple[str, ...]:
    if r.device == "cpu":
        return ("cpu", "flash", "math", "flex")
    if flash_attn_package(r, m) == "flash_attn_interface":
        best = ("flash_attn", "cudnn", "flash", "varlen")
    elif m.capability[0] in (9, 10):
        best = ("cudnn", "flash", "flash_attn", "varlen")
    else:
        best = ("flash", "flash_attn", "cudnn", "varlen")
    return (*best, "flex", "efficient", "math")


def rank(request: Request, machine: Machine) -> list[tuple[str, str]]:
    """Every backend, the one that should serve the call first, with its obstacle (empty: it can)."""
    order = _order(request, machine)
    last = "is taken only when asked for"
    found = [(name, _OBSTACLES[name](request, machine)) for name in order]
    return found + [(name, _OBSTACLES[name](request, machine) or last) for name in BACKENDS if name not in order]


def obstacle(backend: str, request: Request, machine: Machine) -> str:
    """Why `backend` cannot serve the call when it is asked for; empty if it can."""
    return _OBSTACLES[backend](request, machine)


def best(request: Request, machine: Machine) -> str:
    return next(name for name, why in rank(request, machine) if not why)  # math can always


def choose(wanted: str, request: Request, machine: Machine) -> str:
    """`wanted` ("auto", "torch" or a backend) -> "torch" or the backend that serves the call; see causal_attention.

    "auto" logs each distinct choice once, with what was passed over and why. Raises ValueError, in one line, for a name
    that is none and for a backend that cannot serve the call.
    """
    if wanted == "torch":
        return wanted
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"causal_attention: impl must be one of {', '.join(('auto', 'torch', *BACKENDS))}, "
                         f"not {wanted!r}")
    if wanted != "auto":
        if found := obstacle(wanted, request, machine):
            raise ValueError(f'causal_attention: impl="{wanted}" cannot serve {request}: it {clause(found)}; '
                             f'use impl="{best(request, machine)}" or "auto"')
        return wanted
    return best(request, machine) if torch.compiler.is_compiling() else _best(request, machine)


@functools.lru_cache(maxsize=4096)
def _best(request: Request, machine: Machine) -> str:
    """`best`, which it says once."""
    chosen, found = best(request, machine), rank(request, machine)
    passed = [f"{name} ({why})" for name, why in found[: [name for name, _ in found].index(chosen)]]
    said = f"attention for {request}: {chosen}" + (f"; passed over: {', '.join(passed)}" if passed else "")
    if not torch.compiler.is_compiling() and said not in _told:
        _told.add(said)
        _log.info("%s", said)
    return chosen


def clause(found: str) -> str:
    """An obstacle as it stands behind "it": what is no verb of the kernel becomes a reason."""
    verbs = ("has", "takes", "runs", "needs", "is", "gives", "drops")
    return found if found.startswith(verbs) else f"cannot: {found}"


def this_machine(device: str, index: int | None = None) -> Machine:
    """What is here for tensors on a device."""
    return _gpu(index) if device == "cuda" else Machine(extension=dispatch.extension_obstacle())


@functools.lru_cache(maxsize=16)
def _gpu(index: int | None) -> Machine:
    found = frozenset(name for name, module in PACKAGES.items() if _imports(name, module))
    return Machine(torch.cuda.get_device_capability(index), torch.backends.cudnn.version() or 0, found,
                   triton=jit.obstacle(torch.empty(0, device="cuda")))


def _imports(name: str, module: str) -> bool:
    """Packages built for another torch are found, but do not import."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        _log.warning("%s is installed but cannot be imported: %s", name, error)
        return False
    return True
