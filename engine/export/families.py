"""Hugging Face's ``config.json`` and the engine's ``model`` section: what each architecture can say, both ways.

A family lists what its models may have. Reading, every key of config.json must be understood: one that is not, or a
value that this engine does not compute, is refused by name, since it could change the logits in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.errors import UserError
from engine.export import rope, windows
from engine.export.settings import Settings

# config.json's name: the model section's
_SAME = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups", "head_dim": "head_dim", "max_position_embeddings": "seq_length",
    "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std",
}  # fmt: skip
_ANY_FAMILY = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0,
               "hidden_act": "silu", "num_key_value_heads": None, "head_dim": None, "rope_theta": 10000.0}
# What a plain model has of ``features``; a family names what it may have instead.
_PLAIN: dict[str, tuple] = {
    "qk_norm": (False,), "attention_bias": (False,), "linear_bias": (False,), "attention_sinks": (False,),
    "activation": ("swiglu",), "windows": ("none",), "rotary_percent": (1.0,), "moe": (False,),
    "moe.router": ("softmax_after_topk",), "moe.scaling_factor": (1.0,), "moe.expert_bias": (False,),
    "moe.shared_ffn_hidden_size": (None,), "moe.num_dense_layers": (0,), "uneven heads": (False, True),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """``defaults``: what Transformers takes where config.json is silent. ``can``: what its models may have beside a
    plain one. ``experts``: the forms of its experts on disk (engine/export/names.py), the one that is written first."""

    model_type: str
    architecture: str
    can: dict[str, tuple] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = ()


_LAYERED = ("none", "all", "some")
_ROUTED = {"moe": (True,)}
FAMILIES = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM", {"linear_bias": (False, True), "uneven heads": (False,)}),
    Family("mistral", "MistralForCausalLM", {"windows": ("none", "all")},
           {"num_key_value_heads": 8, "sliding_window": 4096}),
    Family("qwen2", "Qwen2ForCausalLM", {"attention_bias": (True,), "windows": _LAYERED}),
    Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": (True,), "windows": _LAYERED}, {"head_dim": 128}),
    Family("mixtral", "MixtralForCausalLM", _ROUTED | {"windows": ("none", "all")},
           {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8,
            "num_experts_per_tok": 2, "sliding_window": None}, ("w1_w2_w3", "stacked")),
    Family("qwen3_moe", "Qwen3MoeForCausalLM",
           _ROUTED | {"qk_norm": (True,), "windows": ("none", "all"), "moe.num_dense_layers": (0, "some"),
                      "moe.router": ("softmax_after_topk", "softmax_before_topk")},
           {"num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8}, ("gate_up_down", "stacked")),
    Family("gpt_oss", "GptOssForCausalLM",
           _ROUTED | {"linear_bias": (True,), "attention_sinks": (True,), "activation": ("clamped_swiglu",),
                      "windows": _LAYERED},
           {"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
            "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                             "truncate": False}}, ("gpt_oss", "gpt_oss_mxfp4")),
)}  # fmt: skip


def features(m: ModelConfig) -> dict[str, Any]:
    """What the model has, in the words of ``Family.can``."""
    moe = m.moe
    found = {
        "qk_norm": m.qk_norm, "attention_bias": m.attention_bias and not m.linear_bias, "linear_bias": m.linear_bias,
        "attention_sinks": m.attention_sinks, "activation": m.activation, "windows": windows.kind(m),
        "rotary_percent": m.rotary_percent, "moe": moe is not None,
        "uneven heads": m.hidden_size % m.num_attention_heads != 0,
    }  # fmt: skip
    if moe is None:
        return found
    return found | {
        "moe.router": moe.router, "moe.scaling_factor": moe.scaling_factor, "moe.expert_bias": moe.expert_bias,
        "moe.shared_ffn_hidden_size": moe.shared_ffn_hidden_size,
        "moe.num_dense_layers": "some" if moe.num_dense_layers else 0,
    }  # fmt: skip


def family_of(m: ModelConfig, wanted: str = "auto") -> Family:
    """The first architecture of Transformers that computes what this model does, or ``wanted``.

    Raises ``UserError`` that names what no architecture, or the wanted one, has.
    """
    has = features(m)
    lacks = {family.model_type: [name for name, value in has.items() if value not in (_PLAIN | family.can)[name]]
             for family in FAMILIES.values()}
    nearest = min(FAMILIES, key=lambda name: len(lacks[name])) if wanted == "auto" else wanted  # of equals the first
    if not lacks[nearest]:
        return FAMILIES[nearest]
    what = ", ".join(f"windows in {has[name]} layers" if name == "windows" else f"{name} {has[name]}"
                     for name in lacks[nearest])
    who = "no architecture of Transformers that we know computes this model; the nearest" if wanted == "auto" else (
        "Transformers'")
    raise UserError(f"{who} {nearest} has no {what}", where="model",
                    fix=f"Those that can be exported: {', '.join(FAMILIES)}")


def read_config(directory: Path) -> tuple[Family, dict]:
    """The family and the content of a directory's config.json. Raises ``UserError``."""
    file = directory / "config.json"
    if not file.is_file():
        problem = "no such folder" if not directory.exists() else "holds no config.json"
        raise UserError(problem, where=str(directory), fix="Give a Hugging Face model's directory")
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read ({error})", where=str(file), fix="Download the model again") from None
    if not isinstance(config, dict):
        raise UserError("is no JSON object", where=str(file), fix="Download the model again")
    known = ", ".join(FAMILIES)
    family = FAMILIES.get(config["model_type"]) if isinstance(config.get("model_type"), str) else None
    if family is None:
        raise UserError(f"the architecture {config.get('model_type')!r} is not known here", where=f"{file}: model_type",
                        fix=f"Those that are: {known}")
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(f"{architectures!r} is not the language model {family.architecture}",
                        where=f"{file}: architectures", fix=f"Architectures that are known: {known}")
    return family, config


def section_of(family: Family, config: dict, file: Path) -> dict:
    """The values of the ``model`` section. Raises ``UserError`` for a setting that is unknown, missing or not ours."""
    s = Settings(config, _ANY_FAMILY | family.defaults, str(file))
    found = {ours: s.get(theirs) for theirs, ours in _SAME.items()}
    for theirs, ours in _SAME.items():
        if found[ours] is None and theirs not in ("num_key_value_heads", "head_dim", "initializer_range"):
            raise s.error(theirs, "is null, expected a value", "Download the model again")
    found = {name: value for name, value in found.items() if value is not None}
    found["num_layers"] = _layers(found["num_layers"], file)
    s.expect("hidden_act", "silu")
    s.expect("attention_dropout", 0, 0.0)
    found |= rope.read(s) | windows.read(s, family.model_type, found["num_layers"])
    found |= _read_features(s, family)
    if family.experts:
        found["moe"] = _read_experts(s, family, found)
    _check_quantization(s, family)
    s.expect_nothing_else()
    try:
        ModelConfig(**found)
    except UserError as error:
        raise UserError(str(error), where=str(file), fix="") from None
    return found


def _layers(stated: Any, file: Path) -> int:
    """Checked before all else: lists of layers are as long. Raises ``UserError``."""
    try:
        return ModelConfig(num_layers=stated).num_layers
    except UserError as error:
        raise UserError(str(error), where=str(file), fix="") from None


def _check_quantization(s: Settings, family: Family) -> None:
    """GPT-OSS's own form is read; what others made of a model is not what it was."""
    found = s.get("quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method is not None and (method != "mxfp4" or "gpt_oss_mxfp4" not in family.experts):
        raise s.error("quantization_config", f"weights quantised by {method!r} cannot be read",
                      "Take the model that was not quantised")


def _read_features(s: Settings, family: Family) -> dict:
    match family.model_type:
        case "llama":
            attention, mlp = s.get("attention_bias", False), s.get("mlp_bias", False)
            if attention != mlp:
                raise s.error("attention_bias", f"is {attention}, but mlp_bias is {mlp}: here all layers have biases, "
                              "or none has")
            s.expect("pretraining_tp", 1, None)
            return {"linear_bias": attention}
        case "qwen2":
            return {"attention_bias": True}
        case "qwen3" | "qwen3_moe":
            s.expect("attention_bias", False, None)  # theirs would be on the output projection as well
            return {"qk_norm": True}
        case "gpt_oss":
            s.expect("attention_bias", True, None)
            s.expect("swiglu_alpha", 1.702, None)
            s.expect("swiglu_limit", 7.0, None)
            return {"linear_bias": True, "attention_sinks": True, "activation": "clamped_swiglu"}
        case _:
            return {}


def _read_experts(s: Settings, family: Family, found: dict) -> dict:
    experts = s.get("num_experts", None) or s.get("num_local_experts")
    top_k = s.get("num_experts_per_tok")
    s.expect("experts_per_token", top_k, None)  # OpenAI's own name for it
    moe: dict[str, Any] = {"num_experts": experts, "top_k": top_k, "ffn_hidden_size": found["ffn_hidden_size"]}
    coefficient = s.get("router_aux_loss_coef", None)
    if s.get("output_router_logits", False) and coefficient is not None:  # otherwise Transformers does not use it
        moe["aux_loss_coeff"] = coefficient
    s.expect("router_jitter_noise", 0, 0.0, None)
    if family.model_type == "qwen3_moe":
        moe["ffn_hidden_size"] = s.get("moe_intermediate_size", 768)
        moe["router"] = "softmax_after_topk" if s.get("norm_topk_prob", False) else "softmax_before_topk"
        s.expect("decoder_sparse_step", 1, None)
        dense = s.get("mlp_only_layers", None) or []
        if not isinstance(dense, list) or dense != list(range(len(dense))):
            raise s.error("mlp_only_layers", f"is {dense}: here only the first layers can be without experts")
        moe["num_dense_layers"] = len(dense)
    return moe


def config_of(family: Family, m: ModelConfig, vocab_size: int, *, dtype: str, tokens: dict[str, Any],
              seq_length: int | None = None) -> dict:
    """config.json of the model, in the words that Transformers 4 and 5 both read. ``tokens``: the special ids."""
    found: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    found |= {theirs: getattr(m, ours) for theirs, ours in _SAME.items()}
    found |= {"vocab_size": vocab_size, "max_position_embeddings": seq_length or m.seq_length, "hidden_act": "silu",
              "attention_dropout": 0.0, "torch_dtype": dtype, "use_cache": True}
    found |= rope.written(m) | windows.written(m, family.model_type)
    if family.model_type == "llama":
        found |= {"attention_bias": m.linear_bias, "mlp_bias": m.linear_bias}
    elif family.model_type in ("qwen3", "qwen3_moe"):
        found["attention_bias"] = False
    elif family.model_type == "gpt_oss":
        found |= {"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    if m.moe is not None:
        found |= _written_experts(family, m)
    return found | tokens


def _written_experts(family: Family, m: ModelConfig) -> dict:
    moe = m.moe
    assert moe is not None
    found = {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.aux_loss_coeff,
             "output_router_logits": False}
    if family.model_type != "qwen3_moe":
        return found | {"num_local_experts": moe.num_experts, "intermediate_size": moe.ffn_hidden_size}
    return found | {"num_experts": moe.num_experts, "moe_intermediate_size": moe.ffn_hidden_size,
                    "norm_topk_prob": moe.router == "softmax_after_topk", "decoder_sparse_step": 1,
                    "mlp_only_layers": list(range(moe.num_dense_layers))}


