"""The engine's side of bench_train: the step that ``engine/pretrain.py`` runs, on the benchmark's tokens."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.workers.protocol import Step, serve


def build(config: dict) -> tuple[Step, dict]:
    """``config``: see bench_train.worker_config."""
    step, wrapped = start(config)
    note = {"note": json.dumps(config["engine"])} if config.get("engine") else {}
    return step, {"parameters": sum(p.numel() for chunk in wrapped for p in chunk.parameters()), **note}


def start(config: dict) -> tuple[Step, list]:
    """The step, and the wrapped model that it trains. The one place that knows the engine's API."""
    import torch

    torch.set_num_threads(config["threads"])
    from engine.config import Config
    from engine.model import build as model_build
    from engine.parallel import topology

    cfg = Config.model_validate(engine_config(config))
    groups = topology.build(cfg)
    if config["weights"] == "own":
        initialise_in_place()
    chunks = model_build.model(cfg, groups, config["shape"]["vocab_size"])
    if config["load_weights"]:
        load_llama_weights(chunks[0], config["load_weights"])
    return training(cfg, chunks, groups, ArrayLoader(config["tokens"]))


def training(cfg: Any, chunks: list, groups: Any, data: Any, objective: Any = None) -> tuple[Step, list]:
    """The step of a stage on the bare chunks, and the wrapped model. ``objective`` None: next tokens."""
    from engine.model.objective import NEXT_TOKEN
    from engine.parallel import wrap
    from engine.train import optimizer as optim
    from engine.train import step as train_step
    from engine.train.state import TrainState

    wrapped: list = [*wrap.apply(chunks, cfg, groups)]
    optimizer = optim.build(wrapped, cfg, groups)
    train_step.prepare(wrapped, cfg, groups)
    state = TrainState()

    def step(index: int) -> float:
        assert index == state.step
        return train_step.run(cfg, wrapped, optimizer, data, groups, state, objective or NEXT_TOKEN).sums.loss

    return step, wrapped


def initialise_in_place() -> None:
    """Lets the device draw the weights: the engine does on the CPU, alike for all layouts, 8 billion in a minute."""
    import torch

    from engine.model import init

    @torch.no_grad()
    def draw(chunks, settings, seed, **_options) -> None:
        for chunk in chunks:
            for parameter in chunk.parameters():
                _ = parameter.normal_(0.0, settings.init_method_std) if parameter.dim() > 1 else parameter.fill_(1.0)

    init.initialise = draw


def engine_config(config: dict) -> dict:
    """The benchmark's configuration in the engine's own fields."""
    shape = {name: value for name, value in config["shape"].items() if name != "seq_length"}
    fp8 = {"fp8": True} if config["precision"] == "fp8" else {}
    content = {
        "seed": config["seed"], "device": config["device"],
        "model": {**shape, "seq_length": config["seq_length"]},
        "train": {"max_steps": config["max_steps"], "global_batch_size": config["global_batch_size"],
                  "micro_batch_size": config["micro_batch_size"], "lr": config["lr"], "schedule": "constant",
                  "weight_decay": config["weight_decay"], "clip_grad": config["clip_grad"],
                  "precision": "bf16" if fp8 else config["precision"], **fp8},
    }
    for section, changes in config.get("engine", {}).items():  # what this model needs to fit
        content[section] |= changes
    return content


class ArrayLoader:
    """The tokens of the benchmark, global batch by global batch, behind the interface of engine.data.loader.Loader."""

    def __init__(self, path: str):
        import numpy as np

        self._tokens_nbs = np.load(path, mmap_mode="r")

    def micro_batches(self, position_tokens: int, *, global_batch_size: int, micro_batch_size: int, seq_length: int):
        import torch

        from engine.data.loader import Batch

        index = position_tokens // (global_batch_size * seq_length)
        batch_bs = torch.from_numpy(self._tokens_nbs[index].astype("int64"))
        position_ids_s = torch.arange(seq_length)
        for micro_bs in batch_bs.split(micro_batch_size):
            rows = micro_bs.shape[0]
            yield Batch(tokens_bs=micro_bs[:, :-1].contiguous(), labels_bs=micro_bs[:, 1:].contiguous(),
                        loss_mask_bs=torch.ones(rows, seq_length),
                        position_ids_bs=position_ids_s.expand(rows, seq_length).contiguous())


def load_llama_weights(model, path: str) -> None:
    """Copies the weights of a LlamaForCausalLM (its named parameters as safetensors) into the engine's model.

    Megatron fuses q, k and v into one matrix, group by group (the queries of a group, its key, its value), and gate and
    up into another. Raises KeyError for a parameter without a counterpart.
    """
    import torch
    from safetensors.torch import load_file

    llama = load_file(path)
    heads, groups = model.config.num_attention_heads, model.config.num_query_groups
    head_dim, hidden = model.config.kv_channels, model.config.hidden_size

    def fused_qkv(layer: str) -> torch.Tensor:
        parts = [llama[f"{layer}.self_attn.{name}_proj.weight"].view(groups, -1, hidden) for name in "qkv"]
        return torch.cat(parts, dim=1).reshape((heads + 2 * groups) * head_dim, hidden)

    def source(name: str) -> torch.Tensor:
        if not name.startswith("decoder.layers."):
            return llama[{"embedding.word_embeddings.weight": "model.embed_tokens.weight",
                          "decoder.final_layernorm.weight": "model.norm.weight",
                          "output_layer.weight": "lm_head.weight"}[name]]
        number, rest = name.removeprefix("decoder.layers.").split(".", 1)
        layer = f"model.layers.{number}"
        rest = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",  # Transformer Engine's names
                "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}.get(rest, rest)
        if rest == "self_attention.linear_qkv.weight":
            return fused_qkv(layer)
        if rest == "mlp.linear_fc1.weight":
            return torch.cat([llama[f"{layer}.mlp.gate_proj.weight"], llama[f"{layer}.mlp.up_proj.weight"]])
        return llama[layer + {"self_attention.linear_proj.weight": ".self_attn.o_proj.weight",
                              "mlp.linear_fc2.weight": ".mlp.down_proj.weight",
                              "input_layernorm.weight": ".input_layernorm.weight",
                              "pre_mlp_layernorm.weight": ".post_attention_layernorm.weight"}[rest]]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = source(name)
            if weight.shape[0] < parameter.shape[0]:  # rows that only pad the vocabulary
                parameter[weight.shape[0]:] = 0
            parameter[: weight.shape[0]] = weight.to(parameter)


if __name__ == "__main__":
    serve(build)
