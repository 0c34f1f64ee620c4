"""Tiny random models of Transformers, saved as it saves them: what imports read and exports are compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

VOCAB = 307  # more than the tokenizer's 300, and no multiple of anything
_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
           "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name: (architecture, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": ("Llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral nemo": ("Mistral", {"sliding_window": None, "hidden_size": 36, "num_attention_heads": 8, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen2 windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "layer_types": [
        "sliding_attention", "full_attention"] * 2}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mixtral": ("Mixtral", _EXPERTS),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3_moe dense first": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "moe_intermediate_size": 24,
                                           "norm_topk_prob": False, "mlp_only_layers": [0, 1]}),
    "gpt_oss": ("GptOss", {**_EXPERTS, "head_dim": 16, "sliding_window": 6, "num_experts_per_tok": 3,
                           "hidden_size": 64, "intermediate_size": 64,
                           "rope_parameters": _YARN | {"truncate": False}}),
    "gpt_oss plain": ("GptOss", {**_EXPERTS, "head_dim": 16, "sliding_window": 6, "num_hidden_layers": 3,
                                 "layer_types": ["sliding_attention"] * 3,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """In evaluation mode; norms, biases, sinks and the gate's clamp are seen in the logits."""
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(_COMMON | settings | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.1 if p.dim() > 1 else p + 0.3 * torch.randn(p.shape))
        for key, p in model.named_parameters():
            if kind == "GptOss" and key.endswith("gate_up_proj"):
                p.mul_(20)  # beyond both ends of the clamp
    return model


def save(name: str, folder: Path, tokenizer: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0,
         shard: str = "10GB", **changes: Any) -> Any:
    """Writes the directory, with the engine's tokenizer in it. -> the model."""
    model = build(name, seed, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a directory's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & found.keys()
        found |= part
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None takes one away."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    file.write_text(json.dumps(config))


def rewrite(folder: Path, change: Any) -> None:
    """Replaces the single weights file by ``change(tensors)``."""
    from safetensors.torch import save_file

    found = change(tensors(folder))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and no tensor more or less."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
