"""A tiny configuration of the same kind: it splits as the given one does, and keeps what makes it what it is.

Kept: grouped queries and their ratio to heads, fewer groups than tensor ranks, tied or untied embeddings, norms of
heads, biases, sinks, windows and the layers that have none, dense layers before experts, shared experts, routers,
padding of the vocabulary, curricula of length and batch (all of whose stages come within three steps).
"""

from __future__ import annotations

import math
from typing import Any

from engine.config import Config, ModelConfig

HIDDEN, HEAD, VOCABULARY, LENGTH, MICRO_BATCH = 32, 8, 250, 32, 2
_LARGEST_RATIO = 8  # query heads to one group that are kept as they are
_LARGEST_TOP_K = 4


def shrunk(cfg: Config, ranks: int) -> Config:
    """``cfg`` shrunk for a layout of ``ranks`` processes. Raises ``UserError`` where it contradicts itself."""
    layers = _layers(cfg)
    return cfg.with_values({**layers, **_widths(cfg), **_experts(cfg), **_lengths(cfg), **_batches(cfg, ranks)})


def up_to(wanted: int, step: int) -> int:
    """The least multiple of ``step`` that is at least ``wanted``."""
    return -(-wanted // step) * step


def _layers(cfg: Config) -> dict[str, Any]:
    m, p = cfg.model, cfg.parallel
    dense = min(m.moe.num_dense_layers, 1) if m.moe else 0
    period = min(m.full_attention_every or 1, 3)
    layers = up_to(max(2, dense + 1, period), p.pipeline * p.virtual_pipeline)
    found: dict[str, Any] = {"model.num_layers": min(layers, m.num_layers)}
    if m.full_attention_every:
        found["model.full_attention_every"] = period
    if m.moe:
        found["model.moe.num_dense_layers"] = dense
    return found


def _heads(m: ModelConfig, tensor: int) -> tuple[int, int]:
    """(query heads, groups). Where every rank has several groups it still has two, to be told apart."""
    groups = m.num_query_groups or m.num_attention_heads
    ratio = m.num_attention_heads // groups
    if groups > tensor:
        groups = min(groups, 2 * tensor)
    if ratio > _LARGEST_RATIO:
        ratio = next(r for r in range(2, ratio + 1) if r * groups % tensor == 0)
    return ratio * groups, groups


def _widths(cfg: Config) -> dict[str, Any]:
    m, tensor = cfg.model, cfg.parallel.tensor
    heads, groups = _heads(m, tensor)
    head = HEAD
    while int(head * m.rotary_percent) < 2:
        head *= 2
    found: dict[str, Any] = {
        "model.hidden_size": HIDDEN,
        "model.num_attention_heads": heads,
        "model.num_query_groups": groups,
        "model.head_dim": head,
        "model.ffn_hidden_size": up_to(48, tensor),
        "model.vocab_size": min(VOCABULARY, m.vocab_size or VOCABULARY),
        "model.vocab_multiple": min(m.vocab_multiple, 16),
        # Activations and gradients as large as in the wide model: sums over fewer terms of larger weights.
        "model.init_std": min(10.0, m.init_std * math.sqrt(max(1.0, m.hidden_size / HIDDEN))),
    }
    if m.window_size is not None:
        found["model.window_size"] = min(m.window_size, 10)
    return found


def _experts(cfg: Config) -> dict[str, Any]:
    moe, p = cfg.model.moe, cfg.parallel
    if moe is None:
        return {}
    top_k = min(moe.top_k, _LARGEST_TOP_K)
    several = 2 if moe.num_experts > p.expert else 1  # of one rank
    experts = up_to(max(4, top_k + 1, several * p.expert), p.expert)
    found: dict[str, Any] = {
        "model.moe.top_k": top_k,
        "model.moe.num_experts": min(experts, moe.num_experts),
        "model.moe.ffn_hidden_size": up_to(24, p.expert_tensor or p.tensor),
    }
    if moe.shared_ffn_hidden_size:
        found["model.moe.shared_ffn_hidden_size"] = up_to(40, p.tensor)
    return found


def _lengths(cfg: Config) -> dict[str, Any]:
    p = cfg.parallel
    step = math.lcm(2 * p.context if p.context > 1 else 1, p.tensor * p.context if p.sequence_parallel else 1)
    length = min(up_to(LENGTH, step), up_to(cfg.model.seq_length, step))
    stages = cfg.train.seq_length_schedule[:3]
    lengths = [max(step, length * (i + 1) // len(stages) // step * step) for i in range(len(stages))]
    return {"model.seq_length": length, "train.seq_length_schedule": [
        {"step": i, "seq_length": max(2, stage)} for i, stage in enumerate(lengths)]}


def _batches(cfg: Config, ranks: int) -> dict[str, Any]:
    """At least two micro-batches on a rank, and two a pipeline stage: the schedule then has a steady part."""
    p, t = cfg.parallel, cfg.train
    micro = min(t.micro_batch_size, MICRO_BATCH)
    unit = micro * max(1, ranks // (p.tensor * p.pipeline * p.context)) * p.pipeline
    found: dict[str, Any] = {"train.micro_batch_size": micro, "train.global_batch_size": 2 * unit}
    plan = t.batch_size_schedule
    if plan is not None:
        ramp = plan.kind == "ramp"
        found["train.batch_size_schedule"] = {"kind": plan.kind, "start": unit, "every_steps": 1} | (
            {"increment": unit} if ramp else {})
        found["train.global_batch_size"] = 3 * unit if ramp else 4 * unit
    return found
