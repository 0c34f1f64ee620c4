"""One layer of the decoder."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from engine.model import dispatchers


class Layer(TransformerLayer):
    """Norm, attention, residual, norm, feed-forward or experts, residual. Parameters, layout and checkpoints are
    Megatron's.

    Its own ``forward`` passes through cross-attention, offloading, fused inference and graph capture on its way, none
    of which a decoder of the engine has, and which cost 0.5% of the demo's step (``benchmarks/run.py layers``).
    """

    input_layernorm: Any
    self_attention: Any
    self_attn_bda: Any
    pre_mlp_layernorm: Any
    mlp: Any
    mlp_bda: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(self.mlp, MoELayer):
            dispatchers.install(self.mlp)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, inference_context: Any = None,
                packed_seq_params: Any = None, padding_mask: Any = None, **_unused: Any):
        """[s, b, h] -> ([s, b, h], None). The signature is Megatron's."""
        attended = self.self_attention(self.input_layernorm(hidden_states), attention_mask,
                                       inference_context=inference_context, packed_seq_params=packed_seq_params)
        attended_sbh, bias_h = attended
        if bias_h is None and not (self.training and self.hidden_dropout > 0.0):
            normed_sbh, hidden_sbh = self.pre_mlp_layernorm(attended_sbh, hidden_states)  # sum and norm in one pass
        else:
            hidden_sbh = self.self_attn_bda(self.training, False)(attended, hidden_states, self.hidden_dropout)
            normed_sbh = self.pre_mlp_layernorm(hidden_sbh)
        fed = self.mlp(normed_sbh, padding_mask=padding_mask)
        return self.mlp_bda(self.training, False)(fed, hidden_sbh, self.hidden_dropout), None
