"""Tiny models on a quantised base: widths of whole blocks, and the unsplit model that the codes of all ranks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_runs
import tiny
import torch

from engine.config import Config

# 64 input features on each of two tensor ranks.
WIDTHS: dict[str, Any] = {"model__hidden_size": 128, "model__ffn_hidden_size": 128, "model__num_attention_heads": 4,
                          "model__num_query_groups": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "biases": {"model__linear_bias": True, "model__qk_norm": True, "model__tie_embeddings": False},
    "mixtral": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 128, "aux_loss_coeff": 0.1}},
    "deepseek": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 128, "shared_ffn_hidden_size": 256,
                                "num_dense_layers": 1, "router": "sigmoid", "aux_loss_coeff": 0.1}},
    "gpt_oss": {"model__moe": {"num_experts": 4, "top_k": 3, "ffn_hidden_size": 128, "aux_loss_coeff": 0.1},
                "model__linear_bias": True, "model__activation": "clamped_swiglu"},
}


def qlora(cfg: Config, base: str = "nf4", **values: Any) -> Config:
    return lora_runs.with_lora(cfg, base=base, **values)


def chunks_of(cfg: Config) -> tuple[list[Any], Any]:
    """A bare model on fresh groups."""
    from engine.model import build
    from engine.parallel import topology

    groups = topology.build(cfg)
    return build.model(cfg, groups, tiny.VOCAB), groups


def loaded(cfg: Config, checkpoint: Path) -> list[Any]:
    """The chunks of ``cfg`` with the weights of an ordinary checkpoint; none are drawn before."""
    from engine.checkpoint import layout, sharded

    chunks, groups = chunks_of(cfg.model_copy(update={"init_from": str(checkpoint)}))
    sharded.load(layout.find(checkpoint) / "sharded", chunks, None, groups)
    return chunks


def dequantised(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """The unsplit weights that the ranks' codes stand for, on every rank."""
    import torch.distributed as dist

    from engine.model import whole
    from engine.parallel.wrap import unwrap

    own = {name: (whole.split_of(name, weight, unwrap(chunk).pg_collection), weight.dense())
           for chunk in chunks for name, weight in whole.quantised_names(chunk).items()}
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return whole.assemble(gathered, tiny.VOCAB)
