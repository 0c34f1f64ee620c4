"""Model shapes by name, as plain numbers. A preset fills the fields that the user left unset; explicit fields win.

The parameter counts in the comments are ``parameters.count`` with the vocabulary padded to 50,304, or the preset's own.
"""

from __future__ import annotations

from typing import Any

# 16 times a tensor-parallel size of up to 8 divides each of these vocabularies, so that padding adds no row and the
# model's shape does not depend on the layout.
_FIXED_VOCABULARY = {"vocab_multiple": 16}

PRESETS: dict[str, dict[str, Any]] = {
    # 29.9M (10.6M without the embedding)
    "small": {
        "num_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "ffn_hidden_size": 1024,
        "seq_length": 1024, "tie_embeddings": True,
    },
    # 51.5M
    "medium": {
        "num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1408,
        "seq_length": 1024, "tie_embeddings": True,
    },
    # 123.6M, GPT-2 small's shape
    "large": {
        "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 2048,
        "seq_length": 1024, "tie_embeddings": True,
    },
    # 317.4M. 24 layers of 16 heads: 16 layers of 24 heads would give a head dimension of 42.7. Grouped queries
    # bring it from 355M (GPT-2 medium's shape) to the 300M of its name.
    "xl": {
        "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 4,
        "ffn_hidden_size": 2752, "seq_length": 2048, "tie_embeddings": True,
    },
    # 1.08B, Llama 3.2 1B's shape
    "1b": {
        "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 8,
        "ffn_hidden_size": 8192, "seq_length": 4096, "rotary_base": 500000.0, "tie_embeddings": True,
    },
    # 2.97B, Llama 3.2 3B's shape
    "3b": {
        "num_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "num_query_groups": 8,
        "ffn_hidden_size": 8192, "seq_length": 4096, "rotary_base": 500000.0, "tie_embeddings": True,
    },
    # 7.39B, Mistral 7B's layers
    "7b": {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
        "ffn_hidden_size": 14336, "seq_length": 4096, "vocab_size": 50304, "rotary_base": 500000.0,
        "tie_embeddings": False, **_FIXED_VOCABULARY,
    },
    # 8.03B, Llama 3 8B
    "8b": {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
        "ffn_hidden_size": 14336, "seq_length": 8192, "vocab_size": 128256, "rotary_base": 500000.0,
        "tie_embeddings": False, **_FIXED_VOCABULARY,
    },
    # 20.9B, of which a token passes through 3.6B beside its embedding: GPT-OSS 20B
    "20b_moe": {
        "num_layers": 24, "hidden_size": 2880, "num_attention_heads": 64, "num_query_groups": 8, "head_dim": 64,
        "ffn_hidden_size": 2880, "seq_length": 4096, "vocab_size": 201088, "rotary_base": 150000.0,
        "tie_embeddings": False, "linear_bias": True, "activation": "clamped_swiglu", "window_size": 128,
        "full_attention_every": 2, "attention_sinks": True,
        "yarn": {"factor": 32.0, "original_seq_length": 4096},
        "moe": {"num_experts": 32, "top_k": 4, "ffn_hidden_size": 2880, "aux_loss_coeff": 0.001},
        **_FIXED_VOCABULARY,
    },
    # 70.6B, Llama 3 70B
    "70b": {
        "num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_query_groups": 8,
        "ffn_hidden_size": 28672, "seq_length": 8192, "vocab_size": 128256, "rotary_base": 500000.0,
        "tie_embeddings": False, **_FIXED_VOCABULARY,
    },
    # 46.7B, of which 12.9B a token: Mixtral 8x7B (arXiv:2401.04088)
    "mixtral_8x7b": {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
        "ffn_hidden_size": 14336, "seq_length": 4096, "vocab_size": 32000, "rotary_base": 1000000.0,
        "tie_embeddings": False,
        "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 14336, "aux_loss_coeff": 0.02},
        **_FIXED_VOCABULARY,
    },
    # 30.5B, of which 3.3B a token: Qwen3-30B-A3B (arXiv:2505.09388)
    "qwen3_30b_a3b": {
        "num_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4, "head_dim": 128,
        "ffn_hidden_size": 6144, "seq_length": 4096, "vocab_size": 151936, "rotary_base": 1000000.0,
        "norm_eps": 1e-6, "qk_norm": True, "tie_embeddings": False,
        "moe": {"num_experts": 128, "top_k": 8, "ffn_hidden_size": 768, "aux_loss_coeff": 0.001},
        **_FIXED_VOCABULARY,
    },
}  # fmt: skip
