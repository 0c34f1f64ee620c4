"""Causal self-attention with grouped queries, for training and for generation with a key-value cache.

s query positions, t key positions, b batch, h this rank's query heads, g its key-value groups, d head dimension.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.module import MegatronModule

from engine_kernels.attention import causal_attention
from engine_kernels.rotary import rotary_reference, split_qkv_rotary


@functools.lru_cache(maxsize=64)
def rotary_table(start: int, length: int, dim: int, base: float, device: torch.device):
    """cos and sin of the angles at positions start … start+length-1: fp32 [length, dim/2] each.

    Angle of pair i at position p: p · base^(-2i/dim) (Su et al., 2021, arXiv:2104.09864).
    """
    inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.outer(torch.arange(start, start + length, dtype=torch.float64, device=device), inv_freq)
    return angles.cos().float(), angles.sin().float()


def _rng_tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()  # optional only before the process groups exist


class CoreAttention(MegatronModule):
    """softmax(q kᵀ / √d, causal) v: the engine's CPU kernel in training there, else torch's
    ``scaled_dot_product_attention``."""

    def __init__(self, config: Any, layer_number, attn_mask_type, attention_type, cp_comm_type=None,
                 softmax_scale=None, pg_collection=None, **_ignored):
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.dropout = config.attention_dropout
        self.impl = config.kernel_impl

    def forward(self, q_bhsd: torch.Tensor, k_bgtd: torch.Tensor, v_bgtd: torch.Tensor) -> torch.Tensor:
        """-> [b, h, s, d]. Queries are the last s of the t positions."""
        s, t = q_bhsd.shape[2], k_bgtd.shape[2]
        dropout = self.dropout if self.training else 0.0
        if s == t and dropout == 0.0:
            return causal_attention(q_bhsd, k_bgtd, v_bgtd, scale=self.scale, impl=self.impl)
        mask = None
        if 1 < s < t:
            mask = torch.ones(s, t, dtype=torch.bool, device=q_bhsd.device).tril(diagonal=t - s)
        attend = functools.partial(F.scaled_dot_product_attention, q_bhsd, k_bgtd, v_bgtd, attn_mask=mask,
                                   is_causal=s == t, scale=self.scale, dropout_p=dropout,
                                   enable_gqa=q_bhsd.shape[1] != k_bgtd.shape[1])
        if dropout == 0.0:
            return attend()
        with _rng_tracker().fork():  # tensor ranks hold other heads: other masks
            return attend()


class SelfAttention(MegatronSelfAttention):
    """Megatron's parameters and parallel layout; the path between the two projections is the engine's.

    The fused QKV projection is split, rotated and laid out for attention in one pass.
    """

    config: Any  # ModelSettings, but Megatron types as optional what its own checks have filled
    linear_qkv: Any
    core_attention: Any

    def _qkv(self, hidden_sbh: torch.Tensor, start: int):
        """-> q [b, h, s, d], k and v [b, g, s, d], rotated."""
        config, d = self.config, self.hidden_size_per_attention_head
        groups, heads = self.num_query_groups_per_partition, self.num_attention_heads_per_partition
        plain = self.q_layernorm is None and config.num_query_groups >= self.world_size
        if plain:
            mixed, _ = self.linear_qkv(hidden_sbh)
            length = mixed.shape[0]
        else:
            qkv: Any = self.get_query_key_value_tensors(hidden_sbh)
            q_sbhd, k_sbgd, v_sbgd = qkv
            length = q_sbhd.shape[0]
        cos, sin = rotary_table(start, length, config.rotary_dim, config.rotary_base, hidden_sbh.device)
        if plain:
            return split_qkv_rotary(mixed, cos, sin, num_groups=groups, queries_per_group=heads // groups,
                                    head_dim=d, impl=config.kernel_impl)
        q_bhsd, k_bgsd, v_bgsd = (x.permute(1, 2, 0, 3) for x in (q_sbhd, k_sbgd, v_sbgd))
        return rotary_reference(q_bhsd, cos, sin), rotary_reference(k_bgsd, cos, sin), v_bgsd

    def _append_to_cache(self, context, k_bgsd: torch.Tensor, v_bgsd: torch.Tensor):
        """Writes this step's keys and values behind those before; returns all of them so far, [b, g, t, d]."""
        if self.layer_number not in context.key_value_memory_dict:
            b, g, _, d = k_bgsd.shape
            shape = (context.max_batch_size, g, context.max_sequence_length, d)
            context.key_value_memory_dict[self.layer_number] = (k_bgsd.new_empty(shape), v_bgsd.new_empty(shape))
        k_memory, v_memory = context.key_value_memory_dict[self.layer_number]
        start, b = context.sequence_len_offset, k_bgsd.shape[0]
        end = start + k_bgsd.shape[2]
        if end > k_memory.shape[2]:
            raise ValueError(f"position {end} is past the cache's {k_memory.shape[2]} positions")
        k_memory[:b, :, start:end] = k_bgsd
        v_memory[:b, :, start:end] = v_bgsd
        return k_memory[:b, :, :end], v_memory[:b, :, :end]

    def forward(self, hidden_states, attention_mask=None, key_value_states=None, inference_context=None,
                rotary_pos_emb=None, rotary_pos_cos=None, rotary_pos_sin=None, rotary_pos_cos_sin=None,
                attention_bias=None, packed_seq_params=None, sequence_len_offset=None, *, inference_params=None):
        """[s, b, hidden] -> ([s, b, hidden], bias). The signature is Megatron's; masks and tables are made here."""
        context: Any = None if self.training else inference_context
        q_bhsd, k_bgtd, v_bgtd = self._qkv(hidden_states, 0 if context is None else context.sequence_len_offset)
        if context is not None:
            k_bgtd, v_bgtd = self._append_to_cache(context, k_bgtd, v_bgtd)
        if self.checkpoint_core_attention and self.training:
            out_bhsd = tensor_parallel.checkpoint(self.core_attention, False, q_bhsd, k_bgtd, v_bgtd)
        else:
            out_bhsd = self.core_attention(q_bhsd, k_bgtd, v_bgtd)
        return self.linear_proj(out_bhsd.permute(2, 0, 1, 3).flatten(2))
