"""The engine's weights under the names of Transformers' models, and those models, tiny and random."""

from __future__ import annotations

from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def _attention(weights: Weights, ours: str, theirs: str, m: Any) -> Weights:
    """Megatron's fused projection, [group][queries, key, value], taken apart."""
    per_group, found = m.num_attention_heads // m.num_query_groups, {}
    for kind in ("weight", "bias"):
        if (fused := weights.get(f"{ours}linear_qkv.{kind}")) is not None:
            grouped = fused.unflatten(0, (m.num_query_groups, per_group + 2, m.head_dim))
            q, k, v = grouped[:, :per_group], grouped[:, per_group : per_group + 1], grouped[:, per_group + 1 :]
            for name, part in (("q", q), ("k", k), ("v", v)):
                found[f"{theirs}{name}_proj.{kind}"] = part.flatten(0, 2)
        if (out := weights.get(f"{ours}linear_proj.{kind}")) is not None:
            found[f"{theirs}o_proj.{kind}"] = out
    for name in ("q", "k"):
        if (norm := weights.get(f"{ours}{name}_layernorm.weight")) is not None:
            found[f"{theirs}{name}_norm.weight"] = norm
    if (sinks := weights.get(f"{ours}core_attention.softmax_offset")) is not None:
        found[f"{theirs}sinks"] = sinks
    return found


def _experts(weights: Weights, ours: str, theirs: str, m: Any) -> Weights:
    """All experts of a layer in one tensor; GPT-OSS's transposed, gate and up features in turns, the router's name."""
    def of_all(name: str) -> torch.Tensor:
        return torch.stack([weights[f"{ours}experts.local_experts.{i}.{name}"] for i in range(m.moe.num_experts)])

    def in_turns(x_e2f: torch.Tensor) -> torch.Tensor:
        return torch.stack(x_e2f.chunk(2, dim=1), dim=2).flatten(1, 2)

    up_e2fh, down_ehf = of_all("linear_fc1.weight"), of_all("linear_fc2.weight")
    if not m.linear_bias:
        return {f"{theirs}gate.weight": weights[f"{ours}router.weight"],
                f"{theirs}experts.gate_up_proj": up_e2fh, f"{theirs}experts.down_proj": down_ehf}
    return {f"{theirs}router.{kind}": weights[f"{ours}router.{kind}"] for kind in ("weight", "bias")} | {
        f"{theirs}experts.gate_up_proj": in_turns(up_e2fh).transpose(1, 2),
        f"{theirs}experts.gate_up_proj_bias": in_turns(of_all("linear_fc1.bias")),
        f"{theirs}experts.down_proj": down_ehf.transpose(1, 2),
        f"{theirs}experts.down_proj_bias": of_all("linear_fc2.bias")}


def state_dict(weights: Weights, m: Any) -> Weights:
    """The unsplit model's weights (``m``: its ModelConfig) for a Transformers model, padding rows left out."""
    found = {"model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
             "model.norm.weight": weights["decoder.final_layernorm.weight"]}
    found["lm_head.weight"] = weights.get("output_layer.weight", found["model.embed_tokens.weight"])
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        found |= {f"{theirs}input_layernorm.weight": weights[f"{ours}input_layernorm.weight"],
                  f"{theirs}post_attention_layernorm.weight": weights[f"{ours}pre_mlp_layernorm.weight"]}
        found |= _attention(weights, f"{ours}self_attention.", f"{theirs}self_attn.", m)
        if m.moe is not None and i >= m.moe.num_dense_layers:
            found |= _experts(weights, f"{ours}mlp.", f"{theirs}mlp.", m)
            continue
        gate, up = weights[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        found |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up,
                  f"{theirs}mlp.down_proj.weight": weights[f"{ours}mlp.linear_fc2.weight"]}
    return found


def model(family: str, weights: Weights, m: Any, *, vocab_size: int, **settings: Any) -> Any:
    """Transformers' ``family`` (Llama, Qwen3Moe, …) with these weights, in evaluation mode."""
    import transformers

    common = {
        "vocab_size": vocab_size, "hidden_size": m.hidden_size, "intermediate_size": m.ffn_hidden_size,
        "num_hidden_layers": m.num_layers, "num_attention_heads": m.num_attention_heads, "head_dim": m.head_dim,
        "num_key_value_heads": m.num_query_groups, "max_position_embeddings": m.seq_length,
        "rms_norm_eps": m.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": m.rotary_base},
        "tie_word_embeddings": m.tie_embeddings,
    }
    built = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**common | settings)).eval()
    built.load_state_dict(state_dict(weights, m), strict=True)
    return built
