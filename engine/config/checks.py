"""Contradictions between sections: layouts that cannot run, refused with the nearest one that can.

The list follows megatron's ``training/arguments.py`` and ``TransformerConfig.__post_init__`` (0.16), which refuse the
same combinations later and less clearly. The first of the two is not in the wheel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.config.base import Problem
from engine.config.model import divisors, nearest
from engine.config.sections import near_multiple

if TYPE_CHECKING:
    from engine.config.schema import Config


def contradictions(cfg: Config) -> Iterator[Problem]:
    yield from _tensor(cfg)
    yield from _pipeline(cfg)
    yield from _context(cfg)
    yield from _experts(cfg)
    yield from _lengths(cfg)
    yield from _precision(cfg)
    yield from _recovery(cfg)


def not_built(cfg: Config) -> Iterator[Problem]:
    """What the schema can say and the engine cannot run yet. A feature that lands takes its line out of here."""
    m = cfg.model
    for field, used, without in (
        ("model.moe", m.moe is not None, "null"),
        ("model.yarn", m.yarn is not None, "null"),
        ("model.activation", m.activation != "swiglu", "swiglu"),
        ("model.linear_bias", m.linear_bias, "false"),
        ("model.attention_sinks", m.attention_sinks, "false"),
        ("model.window_size", m.window_size is not None, "null"),
        ("parallel.context", cfg.parallel.context > 1, "1"),
    ):
        if used:
            yield Problem(field, "the engine cannot run this yet", f"Set it to {without}", not_built=True)


def _tensor(cfg: Config) -> Iterator[Problem]:
    m, p = cfg.model, cfg.parallel
    lengths = [m.seq_length, *(stage.seq_length for stage in cfg.train.seq_length_schedule)]

    def conflicts(tensor: int) -> Iterator[tuple[str, int]]:
        if m.num_attention_heads % tensor:
            yield "model.num_attention_heads", m.num_attention_heads
        groups = m.num_query_groups or m.num_attention_heads
        if groups % tensor and tensor % groups:
            yield "model.num_query_groups", groups
        if (m.ffn_hidden_size or 0) % tensor:
            yield "model.ffn_hidden_size", m.ffn_hidden_size or 0
        if p.sequence_parallel:
            for length in lengths:
                if length % (tensor * p.context):
                    yield "model.seq_length" if length == m.seq_length else "train.seq_length_schedule", length

    first = next(conflicts(p.tensor), None)
    if first is not None:
        fitting = [size for size in divisors(m.num_attention_heads) if next(conflicts(size), None) is None]
        best = nearest(p.tensor, fitting) if fitting else None
        name, size = first
        across = (
            f"{p.tensor}"
            if p.context == 1 or "seq_length" not in name
            else f"{p.tensor} x parallel.context {p.context}"
        )
        fix = f"The nearest tensor size that fits is {best}" if best else f"Use a {name} that {p.tensor} divides"
        if best == 1 and p.sequence_parallel:
            fix += ", with parallel.sequence_parallel false"
        yield Problem("parallel.tensor", f"{across} does not divide {name} ({size})", fix)
    if p.sequence_parallel and p.tensor == 1:
        yield Problem(
            "parallel.sequence_parallel",
            "shares the sequence over tensor ranks, but parallel.tensor is 1",
            "Set it to false, or parallel.tensor to 2 or more",
        )


def _pipeline(cfg: Config) -> Iterator[Problem]:
    layers, p, t = cfg.model.num_layers, cfg.parallel, cfg.train
    chunks = p.pipeline * p.virtual_pipeline
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline",
            f"{p.virtual_pipeline} chunks interleave pipeline stages, but parallel.pipeline is 1",
            "Set it to 1, or parallel.pipeline to 2 or more",
        )
    elif layers % chunks:
        name = "pipeline" if p.virtual_pipeline == 1 or layers % p.pipeline else "virtual_pipeline"
        given, other = (p.pipeline, p.virtual_pipeline) if name == "pipeline" else (p.virtual_pipeline, p.pipeline)
        others = [
            d // other
            for d in divisors(layers)
            if d % other == 0 and (name != "pipeline" or p.virtual_pipeline == 1 or d > other)
        ]
        split = f"{p.pipeline} stages" + (f" of {p.virtual_pipeline} chunks" if p.virtual_pipeline > 1 else "")
        fix = (
            f"The nearest {name} size that fits is {nearest(given, others)}"
            if others
            else f"Use {near_multiple(layers, chunks)} layers, or parallel.virtual_pipeline 1"
        )
        yield Problem(f"parallel.{name}", f"{split} do not divide model.num_layers ({layers})", fix)
    elif p.virtual_pipeline > 1:
        group = t.micro_batch_size * p.pipeline
        for field, size in t.unit_batches():
            if size % t.micro_batch_size == 0 and size % group:
                yield Problem(
                    field,
                    f"{size} gives {size // t.micro_batch_size} micro-batches, not a multiple of parallel.pipeline "
                    f"({p.pipeline}) as interleaving needs",
                    f"Use {near_multiple(size, group)}, or parallel.virtual_pipeline 1",
                )


def _context(cfg: Config) -> Iterator[Problem]:
    parts = 2 * cfg.parallel.context
    if cfg.parallel.context == 1:
        return
    stages = [
        (f"train.seq_length_schedule.{i}.seq_length", s.seq_length) for i, s in enumerate(cfg.train.seq_length_schedule)
    ]
    for field, length in [("model.seq_length", cfg.model.seq_length), *stages]:
        if length % parts:
            yield Problem(
                field,
                f"{length} tokens do not divide into 2 x parallel.context = {parts} equal parts",
                f"Use {near_multiple(length, parts)}, or another parallel.context",
            )


def _experts(cfg: Config) -> Iterator[Problem]:
    moe, p = cfg.model.moe, cfg.parallel
    if moe is None:
        for name in ("expert", "expert_tensor"):
            if (getattr(p, name) or 1) > 1:
                yield Problem(
                    f"parallel.{name}",
                    f"{getattr(p, name)} ranks share experts, but the model has none (model.moe is null)",
                    f"Set parallel.{name} to 1, or model.moe.num_experts",
                )
        return
    if moe.num_experts % p.expert:
        yield Problem(
            "parallel.expert",
            f"{p.expert} ranks do not divide model.moe.num_experts ({moe.num_experts})",
            f"The nearest expert size that fits is {nearest(p.expert, divisors(moe.num_experts))}",
        )
    if p.tensor > 1 and not p.sequence_parallel:
        yield Problem(
            "parallel.sequence_parallel",
            f"a mixture of experts with parallel.tensor {p.tensor} needs it",
            "Set it to true, or parallel.tensor to 1",
        )
    shared = p.expert_tensor or p.tensor
    for name, size in (
        ("ffn_hidden_size", moe.ffn_hidden_size),
        ("shared_ffn_hidden_size", moe.shared_ffn_hidden_size),
    ):
        ranks, field = (shared, "expert_tensor") if name == "ffn_hidden_size" else (p.tensor, "tensor")
        if size and size % ranks:
            yield Problem(
                f"parallel.{field}",
                f"{ranks} ranks do not divide model.moe.{name} ({size})",
                f"The nearest size that fits is {nearest(ranks, divisors(size))}",
            )
    if cfg.model.linear_bias and shared > 1:
        yield Problem(
            "parallel.expert_tensor",
            f"experts with biases (model.linear_bias) cannot be split over {shared} ranks",
            "Set parallel.expert_tensor to 1",
        )
    if p.expert > 1 and cfg.train.precision == "fp16":
        yield Problem("train.precision", "fp16 does not go with parallel.expert above 1", "Use bf16")


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
    if not t.fp8:
        return
    if cfg.device in ("cpu", "mps"):
        yield Problem("train.fp8", f"FP8 needs a CUDA GPU, but device is {cfg.device}", "Set it to false (--no-fp8)")
    elif importlib.util.find_spec("transformer_engine") is None:
        yield Problem(
            "train.fp8",
            "FP8 needs Transformer Engine, which is not installed",
            "Set it to false (--no-fp8), or pip install 'mainspring[te]' on a machine with a GPU",
        )
    elif m.backend != "te":
        yield Problem(
            "train.fp8",
            f"FP8 runs through Transformer Engine, but model.backend is {m.backend}",
            "Set model.backend to te, or --no-fp8",
        )
    local = (m.ffn_hidden_size or 0) // cfg.parallel.tensor
    for name, size in (("hidden_size", m.hidden_size), ("ffn_hidden_size", local)):
        if size % 16:
            yield Problem(
                f"model.{name}",
                f"{size} features on a rank are not a multiple of 16, as FP8 needs (train.fp8)",
                f"Use a multiple of {16 * (cfg.parallel.tensor if name == 'ffn_hidden_size' else 1)}, or --no-fp8",
            )


def _recovery(cfg: Config) -> Iterator[Problem]:
    if not cfg.train.enable_oom_recovery:
        return
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
