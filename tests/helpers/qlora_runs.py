"""Tiny models on a quantised base: widths of whole blocks, and the unsplit model that all ranks' codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_runs
import tiny
import torch

from engine.config import Config
from engine_kernels import nf4

# 64 input features on each of two tensor ranks.
WIDTHS: dict[str, Any] = {"model__hidden_size": 128, "model__ffn_hidden_size": 128, "model__num_attention_heads": 4,
                          "model__num_query_groups": 2}
COMMON = WIDTHS | {"train__global_batch_size": 8, "train__eps": 1e-5, "train__clip_grad": 0.5}
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


def trained(corpus: Path, folder: Path, shape: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """An ordinary checkpoint of ``shape`` after a step on one rank, and its unsplit weights."""
    run = tiny.start(tiny.config(corpus, folder, **COMMON | SHAPES[shape]))
    run.step()
    return run.save(), tiny.whole_weights(run)


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


def quantised(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and "decoder.layers" in name and "router" not in name


def through_nf4(name: str, weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """What an unsplit weight is after quantisation; groups of scales run along what its layer never splits."""
    q = nf4.quantise_nf4_reference(weight)
    if double_quant:
        q = nf4.compressed(q, along=0 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1)
    return nf4.dequantise_nf4_reference(q, weight.dtype)


def assert_quantised(found: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], double_quant: bool) -> None:
    assert found.keys() == {name for name, weight in weights.items() if quantised(name, weight)}
    for name, value in found.items():
        assert torch.equal(value, through_nf4(name, weights[name], double_quant)), name
