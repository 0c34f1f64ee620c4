"""How many parameters a model has, from its configuration alone."""

from __future__ import annotations

from engine.config.model import ModelConfig
from engine.errors import UserError


def vocabulary(model: ModelConfig, tokenizer_vocab_size: int) -> int:
    """Tokens that the model can predict: its own ``vocab_size`` if that is set, else the tokenizer's.

    Raises ``UserError`` when the model's is the smaller: some of the data would have no embedding.
    """
    if model.vocab_size is None:
        return tokenizer_vocab_size
    if model.vocab_size < tokenizer_vocab_size:
        raise UserError(f"{model.vocab_size} is fewer than the {tokenizer_vocab_size} tokens of the data's tokenizer",
                        where="model.vocab_size", fix=f"Set it to {tokenizer_vocab_size} or more, or to null")
    return model.vocab_size


def padded_vocab_size(model: ModelConfig, vocab_size: int, tensor: int = 1) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to a multiple of ``vocab_multiple * tensor``."""
    step = model.vocab_multiple * tensor
    return -(-vocab_size // step) * step


def count(model: ModelConfig, *, vocab_size: int | None = None, tensor: int = 1, active: bool = False) -> int:
    """Parameters of the whole model, embeddings included.

    ``vocab_size`` is the tokenizer's, needed where the model's is null. ``active`` counts only the experts that one
    token passes through. Equal to the published counts of Llama 3 8B and 70B and of GPT-OSS 20B.
    """
    size = model.vocab_size or vocab_size
    if size is None:
        raise ValueError("the model's vocab_size is null: pass the tokenizer's")
    h = model.hidden_size
    embeddings = padded_vocab_size(model, size, tensor) * h * (1 if model.tie_embeddings else 2)
    dense_layers = model.num_layers if model.moe is None else model.moe.num_dense_layers
    layers = model.num_layers * (_attention(model) + 2 * h)
    layers += dense_layers * _feed_forward(model, model.ffn_hidden_size or 0)
    layers += (model.num_layers - dense_layers) * _experts(model, active)
    return embeddings + layers + h


def _attention(model: ModelConfig) -> int:
    h, d = model.hidden_size, model.head_dim or 0
    heads, groups = model.num_attention_heads, model.num_query_groups or 0
    total = 2 * h * heads * d + 2 * h * groups * d
    if model.attention_bias or model.linear_bias:
        total += (heads + 2 * groups) * d
    total += h if model.linear_bias else 0
    total += 2 * d if model.qk_norm else 0
    return total + (heads if model.attention_sinks else 0)


def _feed_forward(model: ModelConfig, inner: int) -> int:
    bias = 2 * inner + model.hidden_size if model.linear_bias else 0
    return 3 * model.hidden_size * inner + bias


def _experts(model: ModelConfig, active: bool) -> int:
    moe = model.moe
    if moe is None:
        return 0
    router = moe.num_experts * (model.hidden_size + (1 if model.linear_bias else 0))
    experts = (moe.top_k if active else moe.num_experts) * _feed_forward(model, moe.ffn_hidden_size or 0)
    return router + experts + (_feed_forward(model, moe.shared_ffn_hidden_size) if moe.shared_ffn_hidden_size else 0)
