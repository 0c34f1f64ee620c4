"""Contradictions between sections, but for those of the layout alone (``layouts``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.config import fp8, layouts, nf4
from engine.config.base import Problem

if TYPE_CHECKING:
    from engine.config.schema import Config


def contradictions(cfg: Config) -> Iterator[Problem]:
    yield from _stage(cfg)
    if not cfg.awaits_model():  # else whoever finds out the model's shape checks again
        yield from layouts.problems(cfg)
        yield from _lengths(cfg)
        yield from nf4.widths(cfg)
    yield from _precision(cfg)
    yield from fp8.problems(cfg)
    yield from nf4.problems(cfg)
    yield from _recovery(cfg)


def _stage(cfg: Config) -> Iterator[Problem]:
    reads_examples = cfg.stage in ("sft", "dpo", "lora")
    if cfg.stage == "pretrain" and cfg.init_from is not None:
        yield Problem("init_from", "starts from trained weights, but stage is pretrain", "Use the stage midtrain")
    if cfg.lora is not None and not reads_examples:
        yield Problem("lora", f"adapters are not for the stage {cfg.stage}", "Set lora to null, or use the stage lora")
    if cfg.lora is not None and cfg.train.optimizer == "muon":
        yield Problem("train.optimizer", "muon is for whole weights, but lora trains adapters", "Use adamw")
    if cfg.lora is not None and cfg.model.backend == "te":
        yield Problem("model.backend", "te has no adapters (lora)", "Use backend engine")
    if not reads_examples:
        return
    if cfg.data.path is not None or cfg.data.blend:
        yield Problem("data.path" if cfg.data.path else "data.blend", f"the stage {cfg.stage} reads no prepared tokens",
                      "Name its examples in examples.train")
    if cfg.train.seq_length_schedule:
        yield Problem("train.seq_length_schedule", f"rows of the stage {cfg.stage} have one length, model.seq_length",
                      "Remove it")
    if cfg.model.backend == "te":  # unpacked, too: the padding behind an example is a document of its own
        yield Problem("model.backend", "te cannot keep the examples of a row apart", "Use backend engine")
    if cfg.stage == "dpo" and (cfg.train.label_smoothing or cfg.train.z_loss):
        name = "label_smoothing" if cfg.train.label_smoothing else "z_loss"
        yield Problem(f"train.{name}", "is of the next-token loss, which the stage dpo has not",
                      "Set it to 0" + (", or use dpo.label_smoothing" if name == "label_smoothing" else ""))


def _lengths(cfg: Config) -> Iterator[Problem]:
    for i, stage in enumerate(cfg.train.seq_length_schedule):
        if stage.seq_length > cfg.model.seq_length:
            yield Problem(
                f"train.seq_length_schedule.{i}.seq_length",
                f"{stage.seq_length} tokens are more than the context, model.seq_length ({cfg.model.seq_length})",
                f"Use at most {cfg.model.seq_length}, or raise model.seq_length",
            )


def _precision(cfg: Config) -> Iterator[Problem]:
    m, t = cfg.model, cfg.train
    if t.precision == "fp16" and cfg.device in ("cpu", "mps"):
        yield Problem("train.precision", f"fp16 needs a CUDA GPU, but device is {cfg.device}", "Use bf16 or fp32")
    if m.backend == "te" and cfg.device in ("cpu", "mps"):
        yield Problem(
            "model.backend", f"Transformer Engine needs a CUDA GPU, but device is {cfg.device}", "Use backend engine"
        )
    if t.precision == "fp16" and m.moe is not None:
        # Megatron gives experts an optimizer with a loss scale of its own, which can part from the one the loss has.
        yield Problem("train.precision", "fp16 does not go with model.moe: experts would scale by themselves",
                      "Use train.precision bf16")


def _recovery(cfg: Config) -> Iterator[Problem]:
    if not cfg.train.enable_oom_recovery:
        return
    if cfg.parallel.overlap_grad_reduce:
        yield Problem(
            "train.enable_oom_recovery",
            "ranks agree on a retry before they reduce gradients, but parallel.overlap_grad_reduce is true",
            "Use parallel.overlap_grad_reduce false, or train.enable_oom_recovery false",
        )
    split = [
        f"parallel.{name} {getattr(cfg.parallel, name)}"
        for name in ("tensor", "pipeline", "context", "expert")
        if getattr(cfg.parallel, name) > 1
    ]
    if split:
        yield Problem(
            "train.enable_oom_recovery",
            f"only data-parallel ranks can agree on a retry, but {' and '.join(split)} is set",
            "Set it to false (--no-enable-oom-recovery), or those sizes to 1",
        )
