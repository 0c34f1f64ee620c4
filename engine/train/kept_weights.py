"""Megatron's 16-bit optimizer without fp32 copies of the bf16 weights that AdamW updates in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from engine.train.adamw import gradient_of


class KeptWeights(Float16OptimizerWithFloat16Params):
    """``kept``: the bf16 parameters of groups that are not Muon's, which stay what the inner optimizer updates.

    Their gradients, fp32 in DDP's buffer, are ``decoupled_grad``: torch wants ``grad`` to be of the weight's type.
    With the distributed optimizer Megatron does all this itself, as for Transformer Engine's FusedAdam.
    """

    tp_group: Any  # set by Megatron

    def __init__(self, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Callable):
        groups = [] if optimizer is None else optimizer.param_groups
        kept = [[p for p in group["params"] if p.dtype == torch.bfloat16 and group.get("kind") != "muon"]
                for group in groups]
        for group, own in zip(groups, kept, strict=True):
            ids = {id(p) for p in own}
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        super().__init__(optimizer, config, grad_scaler, init_state_fn)  # pyright: ignore[reportArgumentType]
        for group, own in zip(groups, kept, strict=True):
            group["params"] = own + group["params"]
        self.kept = [p for own in kept for p in own]

    def _copy_model_grads_to_main_grads(self) -> None:
        super()._copy_model_grads_to_main_grads()
        for p in self.kept:
            p.decoupled_grad = p.main_grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p in self.kept:
            p.grad = p.decoupled_grad = None

    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        return list(self._counted())

    def _counted(self) -> Iterator[torch.Tensor]:
        """Megatron's choice: of a tied copy or of tensor ranks' equals, one."""
        for p in self.get_parameters():
            grad = gradient_of(p)
            if grad is not None and param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, self.tp_group):
                yield grad
