"""The model's shape: ``ModelConfig`` and what only some models have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import ValidatorFunctionWrapHandler, model_validator

from engine.config.base import Problem, Section, option
from engine.config.presets import PRESETS

PresetName = Literal[
    "small", "medium", "large", "xl", "1b", "3b", "7b", "8b", "20b_moe", "70b", "mixtral_8x7b", "qwen3_30b_a3b"
]  # fmt: skip

AttentionBackend = Literal[
    "auto", "cudnn", "flash", "efficient", "math", "flex", "varlen", "flash_attn", "transformer_engine", "cpu"
]  # fmt: skip


class MoEConfig(Section):
    """Mixture of experts in place of the dense feed-forward layers."""

    num_experts: int = option(8, "experts in a layer", "experts", ge=2, le=65536)
    top_k: int = option(2, "experts that each token goes to", "experts", ge=1, le=65536)
    ffn_hidden_size: int | None = option(
        None, "inner size of one expert (null: model.ffn_hidden_size)", "features", ge=1, le=10**6
    )
    shared_ffn_hidden_size: int | None = option(
        None, "inner size of the expert that every token passes (null: no shared expert)", "features", ge=1, le=10**6
    )
    num_dense_layers: int = option(0, "first layers that keep a dense feed-forward network", "layers", ge=0, le=10000)
    router: Literal["softmax_after_topk", "softmax_before_topk", "sigmoid"] = option(
        "softmax_after_topk", "how router scores become weights: softmax over the chosen, softmax over all, or sigmoid"
    )
    scaling_factor: float = option(1.0, "what the experts' weights are multiplied by (DeepSeek-V3: 2.5)", "1", gt=0)
    expert_bias: bool = option(False, "balance by a bias on the router's choice, beside the loss (router: sigmoid)")
    expert_bias_update_rate: float = option(1e-3, "step of that bias after each batch", "score", ge=0)
    aux_loss_coeff: float = option(1e-2, "weight of the load-balancing loss (0: off)", "1", ge=0)
    z_loss_coeff: float = option(0.0, "weight of the router's z-loss (0: off)", "1", ge=0)
    dispatcher: Literal["alltoall", "allgather"] = option("alltoall", "how tokens travel to experts on other ranks")

    def problems(self) -> Iterator[Problem]:
        if self.top_k > self.num_experts:
            yield Problem(
                "top_k",
                f"{self.top_k} experts a token, but only {self.num_experts} experts",
                f"Use top_k of at most {self.num_experts}",
            )
        if self.top_k == 1 and self.router == "softmax_after_topk":
            yield Problem(
                "router",
                "softmax over a single chosen expert is always 1, so the router would not learn",
                "Use router softmax_before_topk or sigmoid, or top_k of 2",
            )
        if self.expert_bias and self.router != "sigmoid":
            yield Problem("expert_bias", f"needs sigmoid scores, but router is {self.router}", "Use router sigmoid")


class YarnConfig(Section):
    """YaRN: rotary embedding stretched to contexts longer than those the model was trained on."""

    factor: float = option(32.0, "how many times longer the context becomes", "1", ge=1)
    original_seq_length: int = option(4096, "context length before the stretch", "tokens", ge=1, le=2**31)
    beta_fast: float = option(32.0, "rotations above which a dimension keeps its frequency", "rotations", gt=0)
    beta_slow: float = option(1.0, "rotations below which a dimension is stretched in full", "rotations", gt=0)
    truncate: bool = option(False, "round both ends to whole dimensions (Qwen: true; GPT-OSS: false)")

    def problems(self) -> Iterator[Problem]:
        if self.beta_slow >= self.beta_fast:
            yield Problem("beta_slow", f"{self.beta_slow} is not below beta_fast ({self.beta_fast})", "Use 1 and 32")


class Llama3RopeConfig(Section):
    """Llama 3.1's stretch of the rotary embedding to contexts longer than those the model was first trained on."""

    factor: float = option(8.0, "how many times longer the slow dimensions' wavelengths become", "1", ge=1)
    original_seq_length: int = option(8192, "context length before the stretch", "tokens", ge=1, le=2**31)
    low_freq_factor: float = option(
        1.0, "rotations within the original context below which a dimension is stretched in full", "rotations", gt=0
    )
    high_freq_factor: float = option(
        4.0, "rotations within the original context above which a dimension keeps its frequency", "rotations", gt=0
    )

    def problems(self) -> Iterator[Problem]:
        if self.low_freq_factor >= self.high_freq_factor:
            yield Problem(
                "low_freq_factor",
                f"{self.low_freq_factor} is not below high_freq_factor ({self.high_freq_factor})",
                "Use 1 and 4",
            )


class ModelConfig(Section):
    """The model's shape."""

    preset: PresetName | None = option(None, "a known shape; fills the fields of this section that are not set")
    num_layers: int = option(6, "transformer layers", "layers", ge=1, le=10000)
    hidden_size: int = option(384, "size of a token's representation", "features", ge=2, le=10**6)
    num_attention_heads: int = option(6, "query heads", "heads", ge=1, le=100_000)
    num_query_groups: int | None = option(
        None, "key-value heads (null: one for each query head)", "heads", ge=1, le=100_000
    )
    head_dim: int | None = option(
        None, "size of a head (null: hidden_size / num_attention_heads)", "features", ge=2, le=65536
    )
    ffn_hidden_size: int | None = option(
        None,
        "inner size of the feed-forward network (null: 8/3 hidden_size, rounded up to 64)",
        "features",
        ge=1,
        le=10**7,
    )
    seq_length: int = option(1024, "context length", "tokens", ge=2, le=2**31)
    vocab_size: int | None = option(
        None,
        "entries of the embedding before padding (null: the tokenizer's; fewer are refused)",
        "tokens",
        ge=2,
        le=10**8,
    )
    vocab_multiple: int = option(
        128, "the embedding is padded to a multiple of this, times parallel.tensor", "tokens", ge=1, le=10**6
    )
    tie_embeddings: bool = option(True, "one matrix for the embedding and the output head")
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm", "1", gt=0, le=1)
    rotary_base: float = option(10000.0, "base of the rotary embedding's wavelengths", "1", gt=1)
    rotary_percent: float = option(1.0, "share of each head that rotates", "0 to 1", gt=0, le=1)
    yarn: YarnConfig | None = option(None, "YaRN for long contexts (null: plain rotary embedding)")
    llama3_rope: Llama3RopeConfig | None = option(
        None, "Llama 3.1's rotary embedding for long contexts (null: plain, or yarn)"
    )
    activation: Literal["swiglu", "quick_geglu", "clamped_swiglu"] = option(
        "swiglu", "the feed-forward network's gate: silu, quick GELU, or GPT-OSS's clamped one"
    )
    qk_norm: bool = option(False, "RMSNorm on each head of queries and keys")
    attention_bias: bool = option(False, "bias on the query, key and value projections")
    linear_bias: bool = option(False, "bias on every linear layer but the output head, router included (GPT-OSS)")
    attention_sinks: bool = option(
        False, "a learned logit a head that takes attention to no token (GPT-OSS)"
    )
    window_size: int | None = option(
        None, "keys that a query sees, its own included (null: all before it)", "tokens", ge=1, le=2**31
    )
    full_attention_every: int | None = option(
        None,
        "of the layers with window_size, each N-th sees everything (null: none does)",
        "layers",
        ge=2,
        le=10000,
    )
    init_std: float = option(0.02, "standard deviation of the initial weights", "1", gt=0, le=10)
    dropout: float = option(0.0, "share of activations dropped, in attention and residual", "0 to 1", ge=0, lt=1)
    backend: Literal["engine", "reference", "te"] = option(
        "engine",
        "whose layers: the engine's kernels, plain PyTorch (the oracle), or Transformer Engine where installed",
    )
    attention_backend: AttentionBackend = option(
        "auto", "the kernel of attention with the engine's layers (auto: the best that can; the log says which and why)"
    )
    kernels: Literal["auto", "torch", "triton"] = option(
        "auto",
        "what backend engine computes with: auto is Triton on a GPU and C++ on a CPU; torch is plain PyTorch",
    )
    moe: MoEConfig | None = option(None, "mixture of experts (null: a dense model)")

    @model_validator(mode="wrap")
    @classmethod
    def _fill_from_preset(cls, data: Any, build: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("preset"), str):
            return build(data)
        name = data["preset"].lower().replace("-", "_")
        values = _fill(data, PRESETS.get(name, {})) | ({"preset": name} if name in PRESETS else {})
        model = build(values)
        model.__pydantic_fields_set__.intersection_update(data)  # what a preset filled was not set by the user
        return model

    def _resolve(self) -> Iterable[tuple[str, Any]]:
        if self.num_query_groups is None:
            yield "num_query_groups", self.num_attention_heads
        if self.ffn_hidden_size is None:
            yield "ffn_hidden_size", -(-8 * self.hidden_size // 3 // 64) * 64 or 64
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            yield "head_dim", self.hidden_size // self.num_attention_heads
        if self.moe is not None and self.moe.ffn_hidden_size is None:
            yield "moe", self.moe.model_copy(update={"ffn_hidden_size": self.ffn_hidden_size})

    def problems(self) -> Iterator[Problem]:
        yield from self._head_problems()
        if self.attention_backend != "auto" and self.backend != "engine":
            yield Problem(
                "attention_backend",
                f"chooses the kernel of the engine's attention, but backend is {self.backend}",
                "Set it to auto, or model.backend to engine",
            )
        if self.full_attention_every is not None and self.window_size is None:
            yield Problem(
                "full_attention_every",
                "is for models with a window, but window_size is null",
                "Set model.window_size, or full_attention_every to null",
            )
        yield from self._stretch_problems()
        yield from self._expert_problems()

    def _stretch_problems(self) -> Iterator[Problem]:
        if self.yarn is not None and self.llama3_rope is not None:
            yield Problem("llama3_rope", "stretches the context, but so does yarn", "Set one of the two to null")
        for name, stretch in (("yarn", self.yarn), ("llama3_rope", self.llama3_rope)):
            if stretch is None:
                continue
            if self.backend == "te":
                yield Problem(name, "is built into the engine's attention, but backend is te", "Use backend engine")
            # Llama 3.1 itself is trained on 131,072 tokens with a factor of 8 and 8,192.
            if name == "yarn" and self.seq_length > stretch.factor * stretch.original_seq_length:
                longest = int(stretch.factor * stretch.original_seq_length)
                yield Problem(
                    f"{name}.factor",
                    f"stretches the context to {longest} tokens, but model.seq_length is {self.seq_length}",
                    "Raise factor, or lower model.seq_length",
                )

    def _expert_problems(self) -> Iterator[Problem]:
        if self.backend == "te":
            for name, used in (("moe", self.moe is not None), ("activation", self.activation != "swiglu")):
                if used:
                    yield Problem("backend", f"te does not have this engine's model.{name}", "Use backend engine")
        if self.moe is None:
            return
        if self.linear_bias and self.moe.shared_ffn_hidden_size is not None:
            yield Problem(
                "moe.shared_ffn_hidden_size",
                "a shared expert has no biases, but model.linear_bias is true",
                "Set it to null, or model.linear_bias to false",
            )
        if self.moe.num_dense_layers >= self.num_layers:
            yield Problem(
                "moe.num_dense_layers",
                f"{self.moe.num_dense_layers} leaves no expert layer of the {self.num_layers}",
                "Lower it, or set model.moe to null",
            )

    def _head_problems(self) -> Iterator[Problem]:
        heads, groups, head_dim = self.num_attention_heads, self.num_query_groups or 1, self.head_dim
        if head_dim is None:
            near = nearest(heads, divisors(self.hidden_size))
            yield Problem(
                "num_attention_heads",
                f"{heads} heads do not divide hidden_size {self.hidden_size}",
                f"Use {near} heads, or set model.head_dim",
            )
            return
        if heads % groups:
            yield Problem(
                "num_query_groups",
                f"{groups} groups do not divide {heads} heads",
                f"Use {nearest(groups, divisors(heads))} groups",
            )
        if head_dim % 2:
            yield Problem(
                "head_dim",
                f"{head_dim} is odd, and the rotary embedding turns pairs",
                "Use fewer or more heads, or set an even model.head_dim",
            )
        elif int(head_dim * self.rotary_percent) < 2:
            yield Problem(
                "rotary_percent", f"{self.rotary_percent} of a head of {head_dim} is less than one pair", "Use 1.0"
            )


def _fill(data: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """``data`` over ``preset``, mapping by mapping; an explicit null wins over the preset's mapping."""
    filled = {**preset, **data}
    for name, value in preset.items():
        if isinstance(value, dict) and isinstance(data.get(name), dict):
            filled[name] = {**value, **data[name]}
    return filled


def divisors(n: int) -> list[int]:
    """All divisors of ``n`` up to a million, ascending; trial division by at most sqrt(n) <= 50,000 numbers."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest(wanted: int, candidates: Iterable[int]) -> int:
    """The candidate closest to ``wanted``, the smaller of two as close."""
    return min(candidates, key=lambda value: (abs(value - wanted), value))
