"""The user's configuration as Megatron's ``TransformerConfig``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from engine.config import Config
from engine.config.fp8 import Fp8Config
from engine.errors import UserError
from engine.model.rotary import Rotary


@dataclass
class ModelSettings(TransformerConfig):
    """``TransformerConfig`` plus what the engine's own modules read.

    ``kernel_impl``: "auto" picks the fastest kernel, "torch" the plain reference, "triton" insists. ``vocab_size``:
    real tokens, without the padding rows. ``rotary``: how positions turn queries and keys. ``window_size`` is
    Megatron's (keys before the query, 0), ``softmax_type`` "learnable" means attention sinks. ``activation``,
    ``router`` and ``expert_bias``: see ``engine.config.model``. ``num_dense_layers``: first layers without experts.
    ``fp8_linears``: how linear layers multiply in 8 bits (None: they do not). ``nf4_base``: they hold frozen weights in
    4 bits, with ``nf4_double_quant`` the scales of these in 8.
    """

    kernel_impl: str = "auto"
    attention_impl: str = "auto"
    vocab_size: int = 0
    rotary: Rotary = field(default_factory=lambda: Rotary(0))
    activation: str = "swiglu"
    router: str = ""
    expert_bias: bool = False
    num_dense_layers: int = 0
    label_smoothing: float = 0.0  # of the training loss, as z_loss
    z_loss: float = 0.0
    fp8_linears: Fp8Config | None = None
    nf4_base: bool = False
    nf4_double_quant: bool = False


def cpu_multiplies_faster_in_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16 or AMX); without them bf16 is emulated and slower."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("amx_tile"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of parameters and activations: "auto" is bf16 wherever the processor multiplies faster in it."""
    if precision == "auto":
        faster = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_faster_in_bf16()
        return torch.bfloat16 if faster else torch.float32
    if precision == "fp16" and device.type != "cuda":
        raise UserError("fp16 needs a GPU", where="train.precision", fix="Use bf16 or fp32 on a CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _parallel_settings(cfg: Config, dtype: torch.dtype) -> dict:
    p = cfg.parallel
    interleaved = p.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": p.tensor,
        "pipeline_model_parallel_size": p.pipeline,
        "virtual_pipeline_model_parallel_size": p.virtual_pipeline if interleaved else None,
        "context_parallel_size": p.context,
        "expert_model_parallel_size": p.expert,
        "expert_tensor_parallel_size": p.expert_tensor or p.tensor,
        "sequence_parallel": p.sequence_parallel,
        "pipeline_dtype": dtype,
        # Batched point-to-point with two interleaved ranks swaps activations and gradients (see DESIGN).
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _attention_settings(cfg: Config) -> dict:
    """Megatron's words for windows and sinks, so that Transformer Engine's attention understands them as well."""
    m = cfg.model
    window = None if m.window_size is None else (m.window_size - 1, 0)  # Megatron leaves the query's own key out
    return {"window_size": window, "window_attn_skip_freq": m.full_attention_every,
            "softmax_type": "learnable" if m.attention_sinks else "vanilla"}


def _attention_impl(cfg: Config) -> str:
    """The kernel that ``engine_kernels.attention`` is told to take: the one asked for, else plain torch or the best."""
    m = cfg.model
    if m.attention_backend != "auto":
        return m.attention_backend
    return "torch" if m.backend == "reference" or m.kernels == "torch" else "auto"


def _recompute_settings(mode: str) -> dict:
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if mode == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _fp8_settings(cfg: Config) -> dict:
    """The engine's own linear layers, or Transformer Engine's: e4m3 forward, e5m2 gradients, delayed scaling."""
    if not cfg.train.fp8:
        return {}
    return {"fp8": "hybrid", "fp8_recipe": "delayed"} if cfg.model.backend == "te" else {
        "fp8_linears": cfg.train.fp8_recipe}


def _expert_settings(cfg: Config) -> dict:
    moe, layers = cfg.model.moe, cfg.model.num_layers
    if moe is None:
        return {}
    dense = moe.num_dense_layers
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_layer_freq": [0] * dense + [1] * (layers - dense) if dense else 1,
        "moe_token_dispatcher_type": moe.dispatcher,
        # What Megatron checks, and what it would do itself; the engine's router reads its own fields.
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_router_score_function": "sigmoid" if moe.router == "sigmoid" else "softmax",
        "moe_router_pre_softmax": moe.router == "softmax_before_topk",
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff,
        "router": moe.router,
        "expert_bias": moe.expert_bias,
        "num_dense_layers": dense,
    }


def build(cfg: Config, vocab_size: int, dtype: torch.dtype) -> ModelSettings:
    """Megatron's configuration for ``cfg``. ``vocab_size``: see ``vocabulary``; ``dtype`` that of the parameters."""
    m = cfg.model
    head_dim = m.head_dim or m.hidden_size // m.num_attention_heads
    return ModelSettings(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups or m.num_attention_heads,
        kv_channels=head_dim,
        ffn_hidden_size=m.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        add_bias_linear=m.linear_bias,
        add_qkv_bias=m.attention_bias,
        qk_layernorm=m.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=m.backend != "te",
        hidden_dropout=m.dropout,
        attention_dropout=m.dropout,
        init_method_std=m.init_std,
        # Weights are initialised by parameter name (engine/model/init.py), the same under every layout. Megatron's own
        # initialisation still runs, on these, because it also marks which dimension tensor parallelism splits.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # The loss is normalised by the supervised tokens of the whole global batch.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        kernel_impl="torch" if m.backend == "reference" else m.kernels,
        attention_impl=_attention_impl(cfg),
        vocab_size=vocab_size,
        label_smoothing=cfg.train.label_smoothing,
        z_loss=cfg.train.z_loss,
        rotary=Rotary.of(int(head_dim * m.rotary_percent) // 2 * 2, m.rotary_base, m.yarn, m.llama3_rope),
        **_attention_settings(cfg),
        activation=m.activation,
        **_expert_settings(cfg),
        **_parallel_settings(cfg, dtype),
        **_recompute_settings(cfg.train.recompute),
        **_fp8_settings(cfg),
        nf4_base=cfg.lora is not None and cfg.lora.base == "nf4",
        nf4_double_quant=cfg.lora is not None and cfg.lora.double_quant,
    )
