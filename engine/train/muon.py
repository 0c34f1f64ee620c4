"""Muon for the hidden layers' matrices, AdamW for the rest, shared over data-parallel ranks.

One torch optimizer holds both kinds of parameters, so that mixed precision has one loss scale and one verdict on
overflows. It holds the parameters that this rank owns (engine/train/ownership.py) and no others. Its state, for
checkpoints: ``state_of(p)`` is ``{"momentum": fp32 like p}`` for a matrix and ``{"exp_avg", "exp_avg_sq"}`` for another
parameter, p being the fp32 weights (under fp16 and bf16 a copy, ``main_param`` of the model's parameter, or for AdamW
the bf16 weights themselves), and each AdamW group has its ``step``. ``owner(p)`` is the rank of p's data-parallel group
that has all this.

``parallel.distributed_optimizer`` changes nothing here: state is always on owners alone, gradients always on all ranks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from engine.config import Config, MuonConfig
from engine.model import whole
from engine.parallel import cpu
from engine.parallel.topology import Groups
from engine.train import muon_matrices
from engine.train.adamw import Master, Rule, gradient_of
from engine.train.muon_matrices import Matrices
from engine.train.ownership import Item, Ownership

# What AdamW takes for one number, in Newton–Schulz's operations: 28 bytes at an H200's 4.8 TB/s, its bf16 products at
# 700 TFLOP/s. Only the balance between owners depends on it.
ADAMW_COST = 4000.0
# Numbers in a batch of equal shapes: fills a GPU with small matrices and bounds what a batch holds beside the weights.
BATCH = 2**25


class Muon(torch.optim.Optimizer):
    """Groups of ``kind`` "muon" (``matrices`` says how the parameters of the first are cut) and "adamw".

    The update of a matrix W with gradient G, momentum m: M ← m M + (1-m) G; D = (1-m) G + m M (with Nesterov, else
    M); W ← W (1 - lr·decay) - lr · 0.2·√max(rows, columns) · NewtonSchulz(D). As torch.optim.Muon with
    ``adjust_lr_fn="match_rms_adamw"``.
    """

    def __init__(self, groups: list[dict], matrices: list[Matrices], settings: MuonConfig, dtype: torch.dtype,
                 rule: Rule | None = None):
        super().__init__(groups, {})
        self.rule = rule or Rule()
        self.matrices, self.settings, self.dtype = matrices, settings, dtype
        self.rank_of: dict[Any, int] = {}

    def owner(self, param: torch.Tensor) -> int:
        """The rank of its data-parallel group that updates a parameter of this optimizer: this one."""
        return self.rank_of[param]

    def state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter's state, zero before its first update. Checkpoints read and fill it."""
        new = _momentum if self._kinds[param] == "muon" else self.rule.moments_of
        return new(self.state[param], param)

    def master_of(self, param: torch.Tensor) -> Master | None:
        """The fp32 weights behind a bf16 parameter that AdamW updates in place."""
        return self.rule.master_of(self.state[param], param)

    @functools.cached_property
    def _kinds(self) -> dict[torch.Tensor, str]:
        """Read when Megatron has put its fp32 copies into the groups."""
        return {p: group["kind"] for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of the owned parameters. Collective over tensor groups, whose ranks own parts of the same."""
        assert closure is None
        for group in self.param_groups:
            if group["kind"] == "adamw":
                self.rule.update(self.state, group)
                continue
            for matrices, params in _batches(group["params"], self.matrices):
                self._update(matrices, params, group["lr"], group["weight_decay"])

    def _update(self, matrices: Matrices, params: list[Any], lr: float, weight_decay: float) -> None:
        """Of parameters of one shape."""
        momentum, t = self.settings.momentum, self.settings
        found = []
        for p in params:
            mean = _momentum(self.state[p], p)["momentum"]
            mean.lerp_(p.grad, 1 - momentum)
            found.append(p.grad.lerp(mean, momentum) if t.nesterov else mean)
        directions = torch.stack([direction.to(self.dtype) for direction in found])
        a, b, c = t.ns_coefficients
        for p, update in zip(params, matrices.update(directions, (a, b, c), t.ns_steps), strict=True):
            p.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)


def _momentum(state: dict, param: torch.Tensor) -> dict[str, torch.Tensor]:
    if not state:
        state["momentum"] = torch.zeros_like(param, dtype=torch.float32)
    return state


def _batches(params: list[Any], matrices: list[Matrices]) -> Iterator[tuple[Matrices, list[Any]]]:
    """Parameters that are cut alike and of equal shape, up to BATCH numbers at once; in the same order everywhere."""
    alike: dict[Any, list[Any]] = {}
    for p, cut in zip(params, matrices, strict=True):
        alike.setdefault((cut, p.shape), []).append(p)
    for (cut, shape), members in alike.items():
        at_once = max(1, BATCH // shape.numel())
        for i in range(0, len(members), at_once):
            yield cut, members[i : i + at_once]


class OwnersOptimizer(ChainedOptimizer):
    """Megatron's optimizer over the parameters that this rank owns; all ranks have the weights after its step."""

    def __init__(self, inner: Any, ownership: Ownership, counted: list[Any]):
        super().__init__([inner])
        self.ownership, self._counted = ownership, counted

    def owner(self, param: Any) -> int:
        """The rank that owns one of the model's parameters, in its data-parallel group."""
        return self.ownership.owner(param)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Of all gradients of the model, each counted by its owner. Collective over all ranks."""
        grads: Any = [gradient_of(getattr(p, "main_param", p)) for p in self._counted]
        return get_grad_norm_fp32(grads, grad_stats_parallel_group=dist.group.WORLD)

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        stepped = super().step_with_ready_grads()
        self.ownership.publish()
        return stepped


def build(chunks: list[Any], config: OptimizerConfig, cfg: Config, groups: Groups, rule: Rule,
          half: type | None = None) -> OwnersOptimizer:
    """Muon over wrapped model chunks. Vectors (norm weights, biases) are not decayed.

    ``rule``: how AdamW keeps its part. ``half``: the class that stands for Megatron's 16-bit optimizer, if one does.
    """
    settings, pg, t = chunks[0].config, groups.pg, cfg.train.muon
    dtype = _dtype(t.ns_precision, settings.params_dtype)
    named = [(name, p) for chunk in chunks for name, p in whole.global_names(chunk).items() if p.requires_grad]
    cuts = {p: muon_matrices.of(name, p, settings, pg, steps=t.ns_steps, size=dtype.itemsize) for name, p in named}
    ownership = Ownership([Item(p, _cost(p, cuts[p], t.ns_steps)) for _, p in named], pg)
    mine = [p for _, p in named if ownership.is_mine(p)]
    matrices = [p for p in mine if cuts[p] is not None]
    others = [p for p in mine if cuts[p] is None]
    inner = Muon([_group("muon", matrices, 1.0, config),
                  _group("adamw", [p for p in others if p.dim() > 1], 1.0, config),
                  _group("adamw", [p for p in others if p.dim() == 1], 0.0, config)],
                 [cut for p in matrices if (cut := cuts[p]) is not None], t, dtype, rule)
    wrapped = _wrapped(inner, config, half or Float16OptimizerWithFloat16Params)
    wrapped.grad_stats_parallel_group = dist.group.WORLD  # every gradient is some rank's, and only one's
    inner.rank_of = {getattr(p, "main_param", p): ownership.owner(p) for p in mine}
    counted = [p for p in mine if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, pg.tp)]
    return OwnersOptimizer(wrapped, ownership, counted)


def _dtype(precision: str, params_dtype: torch.dtype) -> torch.dtype:
    if precision == "auto":
        return torch.float32 if params_dtype == torch.float32 else torch.bfloat16
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _cost(param: torch.Tensor, cut: Matrices | None, steps: int) -> float:
    return param.numel() * ADAMW_COST if cut is None else cut.flops(steps)


def _group(kind: str, params: list[Any], wd_mult: float, config: OptimizerConfig) -> dict:
    """A parameter group as Megatron's and the training step read it. Empty on a rank that owns none of its kind."""
    group = {"params": params, "kind": kind, "lr": config.lr, "weight_decay": config.weight_decay * wd_mult,
             "wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    if kind == "adamw":
        group |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps, "step": 0}
    return group


def _scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """As ``get_megatron_optimizer`` chooses it."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale, min_scale=config.min_loss_scale, growth_factor=2.0,
        backoff_factor=0.5, growth_interval=int(config.loss_scale_window), hysteresis=config.hysteresis)


def _wrapped(inner: Muon, config: OptimizerConfig, half: type) -> Any:
    """In Megatron's optimizer of the precision. The fp32 weights behind 16-bit ones are those of owned parameters."""
    def no_state(optimizer, config=None) -> None: ...  # made at the first step

    with cpu.cuda_type_names(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.fp16 or config.bf16:
            scaler: Any = _scaler(config)  # none with bf16
            return half(inner, config, scaler, no_state)
        return FP32Optimizer(inner, config, no_state)
