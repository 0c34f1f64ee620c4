"""Where the engine's modules plug into Megatron: a ``BackendSpecProvider`` and the layer specification.

Backends by name: ``engine`` (default: fused kernels), ``reference`` (the same modules on plain PyTorch, the oracle),
``te`` (Transformer Engine's modules, where it is installed).
"""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from engine.errors import UserError
from engine.model.attention import CoreAttention, SelfAttention
from engine.model.config import ModelSettings
from engine.model.experts import Experts
from engine.model.layer import Layer
from engine.model.layers import ColumnParallelLinear, RMSNorm, RowParallelLinear, SwiGLU, residual_add
from engine.model.moe import Router


class EngineSpecProvider(BackendSpecProvider):
    """The engine's modules by the roles that Megatron names."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        return None

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool):
        return Experts, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> type:
        return SwiGLU


def _feed_forward(backend: EngineSpecProvider, experts: int | None) -> ModuleSpec:
    spec = get_mlp_module_spec_for_backend(backend, num_experts=experts, use_te_activation_func=True)
    if experts is not None:
        submodules: Any = spec.submodules
        submodules.router = Router
    return spec


def _engine_layer(settings: ModelSettings, experts: int | None) -> ModuleSpec:
    backend = EngineSpecProvider()
    # Megatron annotates these slots as modules; a class, a function and None are what it takes as well.
    norm: Any = backend.layer_norm()
    qk_norm: Any = norm if settings.qk_layernorm else None
    add: Any = residual_add
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal},
                                      submodules=attention),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=_feed_forward(backend, experts),
            mlp_bda=add,
            # The names that Transformer Engine's fused modules give these weights: checkpoints fit either backend.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def build(settings: ModelSettings, backend: str, vp_stage: int | None = None) -> Any:
    """The specification of this pipeline stage's layers for ``backend``.

    Raises ``UserError`` for ``te`` where Transformer Engine is not installed.
    """
    if backend == "te":
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError("Transformer Engine is not installed", where="model.backend",
                            fix="Use backend engine, or pip install 'mainspring[te]' on a machine with a GPU")
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=settings.qk_layernorm)
    first = get_transformer_layer_offset(settings, vp_stage)
    dense, sparse = _engine_layer(settings, None), _engine_layer(settings, settings.num_moe_experts)
    layers = [dense if layer < settings.num_dense_layers else sparse
              for layer in range(first, first + get_num_layers_to_build(settings, vp_stage=vp_stage))]
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
