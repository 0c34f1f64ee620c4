"""Tiny random models of every architecture that we export, as Transformers writes them, with a trained tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

ENGINE = Path(__file__).resolve().parents[2] / "engine"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0,
        "rope_theta": 10000.0, "truncate": True}
_GPT_OSS = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
            "intermediate_size": 64, "rope_parameters": YARN}
_SLIDING, _FULL = "sliding_attention", "full_attention"
# model_type, and what differs from the base.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama 3.1 tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn exact": ("llama", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 3.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3 tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", _GPT_OSS),
    "gpt_oss tied, full": ("gpt_oss", _GPT_OSS | {"tie_word_embeddings": True, "layer_types": [_FULL] * 3}),
    "gpt_oss every third": ("gpt_oss", _GPT_OSS | {"layer_types": [_SLIDING, _SLIDING, _FULL]}),
}  # fmt: skip


@cache
def tokenizer() -> Any:
    """A byte-level BPE of 700 tokens, trained on our own source."""
    from engine.data.tokenizer import train_tokenizer

    texts = [path.read_text(encoding="utf-8") for path in sorted(ENGINE.glob("*.py"))]
    return train_tokenizer([*texts, "naïve café, 你好 世界: 3.14 isn't 1,000"], 700)


def save(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Writes a case as a Hugging Face directory. -> the model, whose weights have no two rows alike."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, more = CASES[name]
    base = {"vocab_size": tokenizer().vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 0,
            "initializer_range": 0.2, "bos_token_id": None}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(base | more | changes)), dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in key:  # they begin as all ones or all zeros
                parameter.copy_(0.3 * torch.randn(parameter.shape) + float("norm" in key))
    model.save_pretrained(directory)
    tokenizer().save(directory)
    return model
