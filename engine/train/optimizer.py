"""The optimizer over wrapped model chunks, AdamW or Muon, inside Megatron's mixed-precision and distributed optimizers.

``AdamW`` (engine/train/adamw.py) takes the place of Apex's, whose checkpoints resume rightly. Muon is in
engine/train/muon.py. Where AdamW updates bf16 weights in place (``train.adamw.master``), the distributed optimizer is
told what it is told of Transformer Engine's, and ``KeptWeights`` stands for Megatron's other one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from engine.config import Config
from engine.model import whole
from engine.parallel import cpu
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap
from engine.train import muon
from engine.train.adamw import AdamW, Rule, gradient_of, place
from engine.train.kept_weights import KeptWeights


@contextlib.contextmanager
def _in_apex_place(rule: Rule, in_place: bool):
    """Within, Megatron builds our AdamW where it would build Apex's; its state is handled as Apex's ever after."""
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.Adam = AdamW
    megatron: Any = megatron_optimizer
    names = ("Adam", "USING_PYTORCH_OPTIMIZER", "Float16OptimizerWithFloat16Params")
    saved = {name: getattr(megatron, name, None) for name in names}
    megatron.Adam, megatron.USING_PYTORCH_OPTIMIZER = functools.partial(AdamW, rule=rule), False
    if in_place:
        megatron.Float16OptimizerWithFloat16Params = KeptWeights
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(megatron, name, value)


def rule(cfg: Config, settings: Any) -> Rule:
    """How AdamW keeps its state under ``train.adamw``; ``settings``: the model's."""
    return Rule(moments=torch.bfloat16 if cfg.train.adamw.moments == "bf16" else torch.float32,
                remainders=cfg.train.adamw.master == "remainder",
                impl="auto" if settings.kernel_impl == "cpu" else settings.kernel_impl)


def _updates_in_place(cfg: Config, settings: Any) -> bool:
    return cfg.train.adamw.master != "fp32" and settings.params_dtype == torch.bfloat16


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
    keeps, in_place = rule(cfg, chunks[0].config), _updates_in_place(cfg, chunks[0].config)
    if cfg.train.optimizer == "muon":
        config = _settings(chunks, cfg, distributed=False)
        optimizer = muon.build(chunks, config, cfg, groups, keeps, KeptWeights if in_place else None)
    else:
        config = _settings(chunks, cfg, distributed=cfg.parallel.distributed_optimizer)
        # Set after its own checks, which want Transformer Engine's optimizer where this is true.
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = in_place and config.use_distributed_optimizer
        with _in_apex_place(keeps, in_place), cpu.cuda_type_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = get_megatron_optimizer(config, chunks, pg_collection=groups.pg, use_gloo_process_groups=False)
    _place(optimizer, chunks, cfg)
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss if chunk.config.fp16 else None
    return optimizer


def _place(optimizer: Any, chunks: list[Any], cfg: Config) -> None:
    """Tells AdamW where each of its parameters lies in the unsplit model, for random bits that depend on no layout."""
    names = {p: (name, whole.split_of(name, p, unwrap(chunk).pg_collection))
             for chunk in chunks for name, p in whole.global_names(chunk).items()}
    for inner in optimizer.chained_optimizers:
        if inner.is_stub_optimizer:
            continue
        for param, main, start in _mains(inner, names):
            name, split = names[param]
            if cfg.model.tie_embeddings and name == "output_layer.weight":  # the copy must stay one
                name = "embedding.word_embeddings.weight"
            inner.optimizer.rule.places[main] = place(cfg.seed, name, param.shape, split, start)


def _mains(inner: Any, params: Any) -> Iterator[tuple[Any, Any, int]]:
    """(model parameter, what the inner optimizer updates for it, the first of its elements that this is)."""
    if isinstance(inner, distrib_optimizer.DistributedOptimizer):
        for param, (group, order) in inner.model_param_group_index_map.items():
            start = inner._get_model_param_range_map(param)["param"].start
            yield param, inner.optimizer.param_groups[group]["params"][order], start
        return
    own = {id(p) for p in inner.get_parameters()}
    for param in params:
        main = getattr(param, "main_param", None)
        main = param if main is None else main
        if id(main) in own:
            yield param, main, 0


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
    coefficient = optimizer.config.clip_grad / (grad_norm + 1e-6)  # Megatron's
    if 0.0 < coefficient < 1.0:
        for inner in optimizer.chained_optimizers:
            if not inner.is_stub_optimizer:
                _clip(inner.optimizer, coefficient)
    return optimizer.step_with_ready_grads(), grad_norm


def _clip(optimizer: Any, coefficient: float) -> None:
    """AdamW scales gradients as it reads them; Muon's are scaled in place."""
    if isinstance(optimizer, AdamW):
        optimizer.rule.grad_scale = coefficient
        return
    grads = [grad for group in optimizer.param_groups for p in group["params"] if (grad := gradient_of(p)) is not None]
    if grads:
        torch._foreach_mul_(grads, coefficient)  # pyright: ignore[reportPrivateImportUsage]
