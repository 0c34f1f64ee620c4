"""AdamW with one ``step`` a parameter group.

Megatron falls back to torch's AdamW without Apex, and then its checkpoints resume silently wrong: torch keeps ``step``
with every parameter, and Megatron's loader gives all of them one shared tensor, which each increments. Apex's keeps it
in the group, and so does this one.
"""

from __future__ import annotations

from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, arXiv:1711.05101), one ``step`` a group.

    Uses torch's fused update, one call a parameter group. ``adam_w_mode`` is Apex's argument; only True is accepted.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        assert adam_w_mode, "weight decay is decoupled here"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameter's fp32 moments, zero before its first update. Checkpoints read and fill them."""
        return moments(self.state[param], param)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            update(self.state, group)


def moments(state: dict, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """``state`` with the two fp32 moments in it, zero if there were none."""
    if not state:
        state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
    return state


def update(state: Any, group: dict) -> None:
    """One step of a parameter group; ``state`` is the optimizer's, by parameter."""
    group["step"] += 1
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    states = [moments(state[p], p) for p in params]
    step = torch.tensor(float(group["step"]), device=params[0].device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        params, [p.grad for p in params], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
        [], [step] * len(params), lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False)
