"""AdamW inside Megatron's mixed-precision and distributed optimizers.

Megatron falls back to torch's AdamW without Apex, and then its checkpoints resume silently wrong: torch keeps ``step``
with every parameter, and Megatron's loader gives all of them one shared tensor, which each increments. This AdamW keeps
``step`` in the parameter group, as Apex's does, and takes Apex's place.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from engine.config import Config
from engine.parallel import cpu
from engine.parallel.topology import Groups


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, arXiv:1711.05101), one ``step`` a group.

    Uses torch's fused update, one call a parameter group. ``adam_w_mode`` is Apex's argument; only True is accepted.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        assert adam_w_mode, "weight decay is decoupled here"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def _state(self, param: torch.Tensor) -> dict:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._state(p) for p in params]
            step = torch.tensor(float(group["step"]), device=params[0].device)
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                params, [p.grad for p in params], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
                [], [step] * len(params), lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False)


@contextlib.contextmanager
def _in_apex_place():
    """Within, Megatron builds our AdamW where it would build Apex's; its state is handled as Apex's ever after."""
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.Adam = AdamW
    saved = getattr(megatron_optimizer, "Adam", None), megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = AdamW, False
    try:
        yield
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = saved


def build(chunks: list[Any], cfg: Config, groups: Groups) -> MegatronOptimizer:
    """The optimizer over wrapped model chunks. Vectors (norm weights, biases) are not decayed."""
    settings, t = chunks[0].config, cfg.train
    # Losses are sums over a micro-batch's tokens (Megatron divides gradients by all tokens at the end), so the usual
    # first scale of 2^16 for means is that over the tokens.
    tokens = t.micro_batch_size * cfg.model.seq_length
    config = OptimizerConfig(
        optimizer="adam",
        lr=t.lr, min_lr=t.min_lr, weight_decay=t.weight_decay,
        adam_beta1=t.beta1, adam_beta2=t.beta2, adam_eps=t.eps,
        bf16=settings.bf16, fp16=settings.fp16, params_dtype=settings.params_dtype,
        loss_scale=t.loss_scale, initial_loss_scale=2.0 ** (16 - math.ceil(math.log2(tokens))),
        min_loss_scale=2.0**-24,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        clip_grad=t.clip_grad,
    )
    with _in_apex_place(), cpu.cuda_type_names(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(config, chunks, pg_collection=groups.pg, use_gloo_process_groups=False)
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss if settings.fp16 else None
    return optimizer


class NonFiniteError(FloatingPointError):
    """The gradients hold NaN or infinity; every rank raises it, and no weight was changed."""


def step(optimizer: Any) -> tuple[bool, float]:
    """Clips and steps. -> (stepped, global gradient norm before clipping).

    With loss scaling, an overflow skips the step on all ranks and lowers the scale. Without, non-finite gradients
    raise ``NonFiniteError`` before any weight changes.
    """
    if optimizer.prepare_grads():
        return False, math.inf
    grad_norm = optimizer.get_grad_norm()  # all-reduced: the same on every rank
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"gradient norm is {grad_norm}")
    if optimizer.config.clip_grad > 0.0:
        from megatron.core.optimizer.optimizer import clip_grad_by_total_norm_fp32

        for inner in optimizer.chained_optimizers:
            if not inner.is_stub_optimizer and (params := inner.get_parameters()):
                clip_grad_by_total_norm_fp32(params, max_norm=optimizer.config.clip_grad, total_norm=grad_norm)
    return optimizer.step_with_ready_grads(), grad_norm
