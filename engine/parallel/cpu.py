"""Makes megatron-core run on machines without a GPU.

Megatron-core 0.16 names CUDA everywhere: ``device="cuda"`` literals, ``torch.cuda.current_device()``, streams, RNG
states, string comparisons with ``"torch.cuda.FloatTensor"``. Instead of patching torch for the whole process, every
``megatron.core`` module gets a *view* of torch in place of its global ``torch``: a module object with the same
attributes, whose factory functions read "cuda" as "cpu" and whose ``cuda`` namespace does nothing. User code, our code
and torch itself see the real torch, and no call pays for an interception.

Only ``Tensor.cuda`` and ``Module.cuda`` are methods of torch's own classes and are replaced for the process; without a
GPU they could only raise.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from typing import Any

import megatron.core
import torch

from engine.errors import UserError

TESTED = ("0.16.1",)
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "rand", "randn", "arange", "zeros_like", "ones_like",
              "empty_like", "full_like", "as_tensor", "linspace", "eye")
_view: types.ModuleType | None = None


class _Nothing:
    """A stream, event or device guard of a machine that has none: every method exists and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, event=None) -> _Nothing:
        return event or _Nothing()

    def elapsed_time(self, other) -> float:
        return 0.0


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _module_view(module: types.ModuleType, overrides: dict) -> types.ModuleType:
    """A module with ``module``'s attributes and ``overrides`` on top; lazily loaded attributes are looked up behind."""
    view = types.ModuleType(module.__name__)
    view.__dict__.update(module.__dict__)
    view.__dict__.update(overrides)
    view.__getattr__ = lambda name: getattr(module, name)
    return view


def _build_view() -> types.ModuleType:
    get_state = lambda device=None: torch.get_rng_state()  # noqa: E731
    set_state = lambda state, device=None: torch.set_rng_state(state)  # noqa: E731
    nvtx = types.SimpleNamespace(range_push=lambda *a: None, range_pop=lambda *a: None)
    cuda = _module_view(torch.cuda, {
        "current_device": lambda: "cpu",
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": _Nothing,
        "Event": _Nothing,
        "stream": _Nothing,
        "device": _Nothing,
        "current_stream": lambda device=None: _Nothing(),
        "default_stream": lambda device=None: _Nothing(),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "random": types.SimpleNamespace(get_rng_state=get_state, set_rng_state=set_state),
        "nvtx": nvtx,
    })
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _module_view(torch, {"cuda": cuda, **factories})


def _clip_grad_by_total_norm(parameters, max_norm, total_norm, use_decoupled_grad: bool = False) -> None:
    """Megatron's function without its assertion that a gradient is a ``torch.cuda.FloatTensor``."""
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)  # pyright: ignore[reportPrivateImportUsage]


def _l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args):
    """Megatron's fallback sums a million squares in fp32, which on CPUs is off in the fourth digit; this in fp64."""
    assert not per_tensor
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).to(torch.float32).reshape(1), None


def _gather_parts(even, input_, group, output_split_sizes=None, use_global_buffer=False):
    """Megatron's gather along the first dimension; gloo wants parts of equal size, so they are filled up."""
    if output_split_sizes is None or group.size() == 1:
        return even(input_, group, None, use_global_buffer)
    longest = max(output_split_sizes)
    if longest == 0:
        return input_
    filled = torch.nn.functional.pad(input_, [0, 0] * (input_.dim() - 1) + [0, longest - input_.shape[0]])
    gathered = even(filled, group)
    return torch.cat([part[:n] for part, n in zip(gathered.split(longest), output_split_sizes, strict=True)])


def _reduce_scatter_parts(even, input_, group, input_split_sizes=None, use_global_buffer=False):
    """Megatron's reduce-scatter along the first dimension, as above."""
    if input_split_sizes is None or group.size() == 1:
        return even(input_, group, None, use_global_buffer)
    longest, behind = max(input_split_sizes), [0, 0] * (input_.dim() - 1)
    if longest == 0:
        return input_
    parts = [torch.nn.functional.pad(part, [*behind, 0, longest - part.shape[0]])
             for part in input_.split(input_split_sizes)]
    return even(torch.cat(parts), group)[: input_split_sizes[group.rank()]]


def _patch_functions() -> None:
    """The places where a view of torch is not enough."""
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    mappings._gather_along_first_dim = functools.partial(_gather_parts, mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = functools.partial(
        _reduce_scatter_parts, mappings._reduce_scatter_along_first_dim)
    clip_grads.l2_norm_impl = _l2_norm
    clipping: tuple[Any, ...] = (clip_grads, optimizer)
    for module in clipping:
        module.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm
    if not hasattr(moe_utils, "te_general_gemm"):  # a NameError there when Transformer Engine is absent
        moe_utils.te_general_gemm = None

    def to_numpy(tensor, as_numpy: bool = False, record_stream: bool = False):
        # Megatron's version converts CUDA tensors only, and the all-to-all dispatcher then lacks its numpy splits.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatching: tuple[Any, ...] = (moe_utils, token_dispatcher)
    for module in dispatching:
        if hasattr(module, "maybe_move_tensor_to_cpu"):
            module.maybe_move_tensor_to_cpu = to_numpy


def install() -> None:
    """Installs the adaptor, or extends it to megatron modules imported since. Does nothing where there is a GPU.

    Raises ``UserError`` for a megatron-core version that was not tested.
    """
    global _view
    if torch.cuda.is_available():
        return
    if megatron.core.__version__ not in TESTED:
        raise UserError(
            f"megatron-core {megatron.core.__version__} was not tested on CPU", where="engine.parallel.cpu",
            fix=f"Install one of: {', '.join(f'megatron-core=={v}' for v in TESTED)}")
    if _view is None:
        _view = _build_view()
        _patch_functions()
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
        torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    imported: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in imported:
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _view


@contextlib.contextmanager
def cuda_type_names():
    """Within, ``tensor.type()`` says ``torch.cuda.FloatTensor`` of CPU tensors.

    The mixed-precision optimizers sort parameters by these strings when they are built and when they gather state.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def named(self, *args, **kwargs):
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.Tensor.type = original
