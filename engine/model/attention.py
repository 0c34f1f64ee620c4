"""Causal self-attention with grouped queries, for training and for generation with a key-value cache.

s query positions of this rank, t key positions, b batch, h this rank's query heads, g its key-value groups, d head
dimension.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from engine.config import Config
from engine.errors import UserError
from engine.model import rotary
from engine.model.sequence import Sequence
from engine.parallel import context
from engine_kernels import attention_backends
from engine_kernels.attention import causal_attention
from engine_kernels.documents import Documents
from engine_kernels.qkv_rotary import split_qkv_rotary
from engine_kernels.rotary import rotary as turn_queries_and_keys


def _rng_tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()  # optional only before the process groups exist


def check_backend(cfg: Config, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ``UserError`` where ``model.attention_backend`` cannot serve this model's training here."""
    m, wanted = cfg.model, cfg.model.attention_backend
    if wanted == "auto":
        return
    queries = m.seq_length // (2 * cfg.parallel.context) if cfg.parallel.context > 1 else m.seq_length
    windowed = m.window_size is not None and m.window_size < m.seq_length
    windows = {m.window_size if windowed else None, None if m.full_attention_every or not windowed else m.window_size}
    machine = attention_backends.this_machine(device.type, device.index)
    for window in sorted(windows, key=lambda size: size or 0):
        request = attention_backends.Request(
            device.type, dtype, m.head_dim or m.hidden_size // m.num_attention_heads, queries, m.seq_length, window,
            m.attention_sinks, False, m.dropout, True, torch.are_deterministic_algorithms_enabled())
        if found := attention_backends.obstacle(wanted, request, machine):
            raise UserError(f"{wanted} cannot serve {request}: it {attention_backends.clause(found)}",
                            where="model.attention_backend",
                            fix=f"Use {attention_backends.best(request, machine)} or auto")


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of a sequence [b, h, s, d] put together, in memory [s, b, h, d] as the output projection takes it."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts]).permute(1, 2, 0, 3)


class CoreAttention(MegatronModule):
    """softmax(q kᵀ / √d, causal, within the window, beside the sink) v; under context parallelism over all ranks' k, v.

    A sink is a learned logit of each query head that takes part in the softmax and brings no value (GPT-OSS). Its
    parameter has Megatron's name, ``softmax_offset`` [h]; it is drawn like a weight matrix and is not decayed.
    """

    softmax_offset: torch.nn.Parameter | None

    def __init__(self, config: Any, layer_number, attn_mask_type, attention_type, cp_comm_type=None,
                 softmax_scale=None, pg_collection=None, **_ignored):
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.dropout = config.attention_dropout
        self.impl = config.attention_impl
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.pg_collection: Any = pg_collection
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def _attend(self, q_bhsd: torch.Tensor, k_bgtd: torch.Tensor, v_bgtd: torch.Tensor,
                documents: Documents | None = None, cached: bool = False) -> torch.Tensor:
        """Queries are the last s of the t positions, or those at hand of rows of documents."""
        dropout = self.dropout if self.training else 0.0
        impl = "auto" if cached and self.impl != "torch" else self.impl  # few kernels take single queries
        options = {"scale": self.scale, "window": self.window, "sinks": self.softmax_offset, "documents": documents,
                   "impl": impl}
        if dropout == 0.0:
            return causal_attention(q_bhsd, k_bgtd, v_bgtd, **options)
        with _rng_tracker().fork():  # tensor ranks hold other heads: other masks
            return causal_attention(q_bhsd, k_bgtd, v_bgtd, dropout=dropout, **options)

    def forward(self, q_bhsd: torch.Tensor, k_bgsd: torch.Tensor, v_bgsd: torch.Tensor,
                rows: Sequence | None = None, cached: bool = False) -> torch.Tensor:
        """-> [b, h, s, d]. Without ``rows`` the queries are the last s of the t positions that the keys stand at.

        ``cached``: those are a generation's, where ``model.attention_backend`` is not insisted on.
        """
        if rows is None:
            return self._attend(q_bhsd, k_bgsd, v_bgsd, cached=cached)
        k_bgtd, v_bgtd = context.gather_keys_values(k_bgsd, v_bgsd, rows.group)
        if rows.documents is not None:
            return self._attend(q_bhsd, k_bgtd, v_bgtd, rows.documents)
        ranges = context.chunks(rows.length, rows.group)
        chunks = q_bhsd.split([end - first for first, end in ranges], dim=2)
        return _join([self._attend(q, k_bgtd[:, :, :end], v_bgtd[:, :, :end])
                      for (_, end), q in zip(ranges, chunks, strict=True)])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Megatron's, with the sinks split over tensor ranks."""
        if self.softmax_offset is None:
            return {}
        groups = {"tp_group": self.pg_collection.tp,
                  "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix,
                                                   {"softmax_offset": 0}, sharded_offsets, **groups)


class SelfAttention(MegatronSelfAttention):
    """Megatron's parameters and parallel layout; the path between the two projections is the engine's.

    The fused QKV projection is split, rotated and laid out for attention in one pass.
    """

    config: Any  # ModelSettings, but Megatron types as optional what its own checks have filled
    linear_qkv: Any
    core_attention: Any

    def _qkv(self, hidden_sbh: torch.Tensor, start: int, rows: Sequence | None):
        """-> q [b, h, s, d], k and v [b, g, s, d], rotated: from position ``start`` on, or as ``rows`` says."""
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
        device = hidden_sbh.device
        cos, sin = (rotary.table(config.rotary, start, length, device) if rows is None
                    else rotary.shared_table(config.rotary, rows, device))
        if plain:
            # In place, the backward pass would keep the unturned queries beside the turned ones: keys and values are
            # views of them all.
            return split_qkv_rotary(mixed, cos, sin, num_groups=groups, queries_per_group=heads // groups,
                                    head_dim=d, in_place=not self.training, impl=config.kernel_impl)
        q_bshd, k_bsgd = turn_queries_and_keys(
            q_sbhd.transpose(0, 1), k_sbgd.transpose(0, 1), cos, sin,
            impl="auto" if config.kernel_impl == "cpu" else config.kernel_impl)  # there is no C++ kernel
        return q_bshd.transpose(1, 2), k_bsgd.transpose(1, 2), v_sbgd.permute(1, 2, 0, 3)

    def _append_to_cache(self, cache, k_bgsd: torch.Tensor, v_bgsd: torch.Tensor):
        """Writes this step's keys and values behind those before; returns all of them so far, [b, g, t, d]."""
        if self.layer_number not in cache.key_value_memory_dict:
            b, g, _, d = k_bgsd.shape
            shape = (cache.max_batch_size, g, cache.max_sequence_length, d)
            cache.key_value_memory_dict[self.layer_number] = (k_bgsd.new_empty(shape), v_bgsd.new_empty(shape))
        k_memory, v_memory = cache.key_value_memory_dict[self.layer_number]
        start, b = cache.sequence_len_offset, k_bgsd.shape[0]
        end = start + k_bgsd.shape[2]
        if end > k_memory.shape[2]:
            raise ValueError(f"position {end} is past the cache's {k_memory.shape[2]} positions")
        k_memory[:b, :, start:end] = k_bgsd
        v_memory[:b, :, start:end] = v_bgsd
        return k_memory[:b, :, :end], v_memory[:b, :, :end]

    def forward(self, hidden_states, attention_mask=None, key_value_states=None, inference_context=None,
                rotary_pos_emb=None, rotary_pos_cos=None, rotary_pos_sin=None, rotary_pos_cos_sin=None,
                attention_bias=None, packed_seq_params: Sequence | None = None, sequence_len_offset=None, *,
                inference_params=None):
        """[s, b, hidden] -> ([s, b, hidden], bias). The signature is Megatron's; masks and tables are made here."""
        cache: Any = None if self.training else inference_context
        assert cache is None or packed_seq_params is None, "a key-value cache holds whole sequences"
        start = 0 if cache is None else cache.sequence_len_offset
        q_bhsd, k_bgtd, v_bgtd = self._qkv(hidden_states, start, packed_seq_params)
        if cache is not None:
            k_bgtd, v_bgtd = self._append_to_cache(cache, k_bgtd, v_bgtd)
        if self.checkpoint_core_attention and self.training:
            # Other ranks' keys and values are gathered again, not kept.
            attend = functools.partial(self.core_attention, rows=packed_seq_params)
            out_bhsd = tensor_parallel.checkpoint(attend, False, q_bhsd, k_bgtd, v_bgtd)
        else:
            out_bhsd = self.core_attention(q_bhsd, k_bgtd, v_bgtd, packed_seq_params, cached=cache is not None)
        return self.linear_proj(out_bhsd.permute(2, 0, 1, 3).flatten(2))
