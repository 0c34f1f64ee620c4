"""The optimizer over wrapped model chunks, AdamW or Muon, inside Megatron's mixed-precision and distributed optimizers.

``AdamW`` (engine/train/adamw.py) takes the place of Apex's, whose checkpoints resume rightly. Muon is in
engine/train/muon.py.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from engine.config import Config
from engine.parallel import cpu
from engine.parallel.topology import Groups
from engine.train import muon
from engine.train.adamw import AdamW


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


def _settings(chunks: list[Any], cfg: Config, *, distributed: bool) -> OptimizerConfig:
    settings, t = chunks[0].config, cfg.train
    # Losses are sums over a micro-batch's tokens (Megatron divides gradients by all tokens at the end), so the usual
    # first scale of 2^16 for means is that over the tokens.
    tokens = t.micro_batch_size * cfg.model.seq_length
    return OptimizerConfig(
        optimizer="adam",
        lr=t.lr, min_lr=t.min_lr, weight_decay=t.weight_decay,
        adam_beta1=t.beta1, adam_beta2=t.beta2, adam_eps=t.eps,
        bf16=settings.bf16, fp16=settings.fp16, params_dtype=settings.params_dtype,
        loss_scale=t.loss_scale, initial_loss_scale=2.0 ** (16 - math.ceil(math.log2(tokens))),
        min_loss_scale=2.0**-24,
        use_distributed_optimizer=distributed,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        clip_grad=t.clip_grad,
    )


def build(chunks: list[Any], cfg: Config, groups: Groups) -> MegatronOptimizer:
    """The optimizer over wrapped model chunks. Vectors (norm weights, biases) are not decayed."""
    if cfg.train.optimizer == "muon":
        optimizer = muon.build(chunks, _settings(chunks, cfg, distributed=False), cfg, groups)
    else:
        config = _settings(chunks, cfg, distributed=cfg.parallel.distributed_optimizer)
        with _in_apex_place(), cpu.cuda_type_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = get_megatron_optimizer(config, chunks, pg_collection=groups.pg, use_gloo_process_groups=False)
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss if chunk.config.fp16 else None
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
