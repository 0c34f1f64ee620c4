"""AdamW on a flat buffer of n elements: gradients are read; weights, moments and remainders read and written.

Bytes an element: fp32 throughout 4 + 2 · (4 + 4 + 4) = 28; bf16 weights with remainders and bf16 moments
4 + 2 · (2 + 2 + 2 + 2) = 20 with fp32 gradients, 18 with bf16 ones; bf16 weights alone 16. About 20 operations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, optional
from engine_kernels.adamw import adamw_, adamw_reference
from engine_kernels.stochastic import join_master

SIZES = {"full": [10**9 // 8, 2**24], "tiny": [40, 1003]}
NUMBERS: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEP = 1000
# weights, gradients, moments, remainders
FORMS = {"fp32": (torch.float32, torch.float32, torch.float32, False),
         "bf16 moments": (torch.float32, torch.float32, torch.bfloat16, False),
         "bf16 moments, remainder": (torch.bfloat16, torch.float32, torch.bfloat16, True),
         "bf16 moments, remainder, bf16 gradients": (torch.bfloat16, torch.bfloat16, torch.bfloat16, True),
         "bf16 throughout": (torch.bfloat16, torch.float32, torch.bfloat16, False)}


def _ours(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, remainder: Tensor | None = None) -> tuple[Tensor, ...]:
    adamw_([param], [grad], [m], [v], None if remainder is None else [remainder], **NUMBERS, step=STEP, impl="triton")
    return param, m, v


def _eager(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, remainder: Tensor | None = None) -> tuple[Tensor, ...]:
    """The formula, stored as the tensors are; without a remainder bf16 is rounded to the nearest."""
    before = param
    if remainder is not None:
        before = join_master(param.bfloat16(), remainder).to(torch.promote_types(param.dtype, torch.float32))
    new = adamw_reference(before, grad, m, v, **NUMBERS, step=STEP)
    return tuple(value.to(t.dtype) for value, t in zip(new, (param, m, v), strict=True))


def _torch_fused(param: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [param], [grad], [m], [v], [], [_step(param.device)], **NUMBERS, amsgrad=False, maximize=False)
    return param, m, v


@functools.cache
def _step(device: torch.device) -> Tensor:
    return torch.tensor(float(STEP), device=device)


@functools.cache
def _no_overflow(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int, device=device)


def _multi_tensor(function: Any) -> Any:
    """Transformer Engine's and Apex's kernel, which share their arguments: lists of tensors, mode 1 for AdamW."""

    def run(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, remainder: Tensor | None = None) -> tuple[Tensor, ...]:
        lists = [[t] for t in (grad, param, m, v, remainder) if t is not None]
        function(2048 * 32, _no_overflow(param.device), lists, NUMBERS["lr"], NUMBERS["beta1"], NUMBERS["beta2"],
                 NUMBERS["eps"], STEP, 1, 1, NUMBERS["weight_decay"])
        return param, m, v

    return run


def _others(form: str) -> dict[str, Any]:
    if form == "fp32":
        found = {"transformer engine": optional("transformer_engine_torch", "multi_tensor_adam"),
                 "apex": optional("amp_C", "multi_tensor_adam")}
        return {"torch fused": _torch_fused} | {name: _multi_tensor(f) for name, f in found.items() if f is not None}
    return {}


def _make(new: Inputs, n: int, form: str) -> tuple[Tensor, ...]:
    param, grad, moments, remainder = FORMS[form]
    return (new.normal(n, dtype=param), new.normal(n, dtype=grad), new.normal(n, dtype=moments),
            new.integers(1, 9, n, dtype=moments),  # squares are positive
            *([new.integers(-(2**15), 2**15, n, dtype=torch.int16)] if remainder else []))


def cases(scale: str) -> list[Case]:
    found = []
    for n in SIZES[scale]:
        for form, (param, grad, moments, remainder) in FORMS.items():
            moved = grad.itemsize + 2 * (param.itemsize + 2 * moments.itemsize + 2 * remainder)
            found.append(Case(
                "adamw", f"{n} {form}", functools.partial(_make, n=n, form=form),
                {"ours": _ours, "eager": _eager, **_others(form)},
                forward_bytes=moved * n, forward_flops=20 * n))
    return found
