"""AdamW with one ``step`` a parameter group, and state of as many bytes as the configuration wants.

Megatron falls back to torch's AdamW without Apex, and then its checkpoints resume silently wrong: torch keeps ``step``
with every parameter, and Megatron's loader gives all of them one shared tensor, which each increments. Apex's keeps it
in the group, and so does this one.

A parameter is fp32 (Megatron's copy of 16-bit weights, or weights that are fp32), or it is the bf16 weights themselves:
then AdamW keeps the 16 bits that they lack, or rounds them stochastically. Its gradient is ``decoupled_grad`` where it
is of another type (Megatron's name for it), else ``grad``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from engine_kernels.adamw import Place, adamw_
from engine_kernels.stochastic import join_master, split_master


def gradient_of(param: Any) -> torch.Tensor | None:
    found = getattr(param, "decoupled_grad", None)
    return param.grad if found is None else found


@dataclass(frozen=True)
class Master:
    """The fp32 numbers behind bf16 weights and their remainders, of any shape: checkpoints hold these."""

    high: torch.Tensor
    low: torch.Tensor

    def numel(self) -> int:
        return self.high.numel()

    def read(self) -> torch.Tensor:
        return join_master(self.high.detach(), self.low)

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Sets weights and remainders to fp32 ``values`` of as many elements."""
        high, low = split_master(values.to(self.high.device, torch.float32).view(self.high.shape))
        self.high.copy_(high)
        self.low.copy_(low)


@dataclass
class Rule:
    """How AdamW keeps and updates parameters; Muon has one for those that are not its own.

    ``places``: where each parameter's random bits come from, so that they depend on no layout. ``grad_scale``: what the
    next update multiplies gradients by (clipping).
    """

    moments: torch.dtype = torch.float32
    remainders: bool = False
    impl: str = "auto"
    places: dict[torch.Tensor, Place] = field(default_factory=dict)
    grad_scale: float | None = None

    def state(self, state: dict, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """``state`` of a parameter with all that is kept in it, zero if there was none."""
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=self.moments)
            if self.remainders and param.dtype == torch.bfloat16:
                state["remainder"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def moments_of(self, state: dict, param: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.state(state, param).items() if name != "remainder"}

    def master_of(self, state: dict, param: torch.Tensor) -> Master | None:
        """The fp32 weights behind a bf16 parameter; None where there are none."""
        remainder = self.state(state, param).get("remainder")
        return None if remainder is None else Master(param, remainder)

    def update(self, states: Any, group: dict) -> None:
        """One step of a parameter group; ``states`` is the optimizer's state, by parameter."""
        group["step"] += 1
        for dtype in (torch.float32, torch.bfloat16):
            params = [p for p in group["params"] if p.dtype == dtype and gradient_of(p) is not None]
            if params:
                self._update(params, [self.state(states[p], p) for p in params], group)

    def _update(self, params: list[torch.Tensor], states: list[dict], group: dict) -> None:
        grads: Any = [gradient_of(p) for p in params]
        scale, on_cpu = None, params[0].device.type == "cpu"
        if self.grad_scale is not None and on_cpu:
            torch._foreach_mul_(grads, self.grad_scale)  # pyright: ignore[reportPrivateImportUsage]
        elif self.grad_scale is not None:
            scale = torch.full((), self.grad_scale, device=params[0].device)
        adamw_(params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
               [s["remainder"] for s in states] if "remainder" in states[0] else None,
               lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
               weight_decay=group["weight_decay"], step=group["step"], grad_scale=scale, impl=self.impl,
               places=[self.places.get(p) or Place(i) for i, p in enumerate(params)])


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, arXiv:1711.05101), one ``step`` a group.

    ``rule``: what it keeps; fp32 moments by default. ``adam_w_mode`` is Apex's argument; only True is accepted.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True,
                 rule: Rule | None = None):
        assert adam_w_mode, "weight decay is decoupled here"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.rule = rule or Rule()

    def state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameter's moments, zero before its first update. Checkpoints read and fill them."""
        return self.rule.moments_of(self.state[param], param)

    def master_of(self, param: torch.Tensor) -> Master | None:
        """The fp32 weights behind a bf16 parameter that is updated in place."""
        return self.rule.master_of(self.state[param], param)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            self.rule.update(self.state, group)
        self.rule.grad_scale = None


def place(seed: int, name: str, shape: torch.Size, split: Any, start: int = 0) -> Place:
    """Of the part ``split`` (``engine.model.whole.Split``) of parameter ``name``, from its element ``start`` on.

    ``shape``: the part's. The same random bits fall to the same numbers of the unsplit parameter under every layout.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little") >> 1
    if split.count == 1:
        return Place(key, start)
    run = shape[split.dim] // split.stride * math.prod(shape[split.dim + 1 :])
    return Place(key, start, run, split.count, split.index)
