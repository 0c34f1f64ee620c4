"""Attention by packages that have to be compiled: flash-attn (FA3 and FA2) and Transformer Engine, where installed.

Only on a GPU. Neither is asked for sinks: flash-attn's functions give no gradient of the log-sum-exp, and Transformer
Engine's module has sinks as a parameter of its own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from engine_kernels.attention_flash import packed
from engine_kernels.attention_sdpa import Call


def _window(call: Call) -> tuple[int, int]:
    return (-1 if call.window is None else call.window - 1, 0)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, call: Call, package: str) -> Tensor:
    """`package`: "flash_attn_interface" (FA3) or "flash_attn" (FA2). [b, h, s, d] as everywhere."""
    module, b, s = importlib.import_module(package), q.shape[0], q.shape[2]
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": True, "window_size": _window(call),
                               "deterministic": torch.are_deterministic_algorithms_enabled()}
    if package == "flash_attn":
        options["dropout_p"] = call.dropout
    if call.documents is None:
        result = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    else:
        q_nhd, k_mgd, v_mgd, lengths = packed(q, k, v, call)
        result = module.flash_attn_varlen_func(
            q_nhd, k_mgd, v_mgd, cu_seqlens_q=lengths.cu_queries, cu_seqlens_k=lengths.cu_keys,
            max_seqlen_q=lengths.max_queries, max_seqlen_k=lengths.max_keys, **options)
    out = result[0] if isinstance(result, tuple) else result  # early FA3 returns its lse as well
    return out.transpose(1, 2) if call.documents is None else out.unflatten(0, (b, s)).transpose(1, 2)


@functools.lru_cache(maxsize=32)
def _te_module(h: int, g: int, d: int, scale: float, window: tuple[int, int], documents: bool) -> Any:
    te: Any = importlib.import_module("transformer_engine.pytorch")
    mask = "padding_causal_bottom_right" if documents else "causal_bottom_right"
    return te.DotProductAttention(h, d, num_gqa_groups=g, attention_dropout=0.0, softmax_scale=scale,
                                  qkv_format="thd" if documents else "bshd", attn_mask_type=mask, window_size=window)


def transformer_engine(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Transformer Engine's DotProductAttention, which picks cuDNN's or flash-attn's kernel itself."""
    (b, h, s, d), g = q.shape, k.shape[1]
    module = _te_module(h, g, d, call.scale, _window(call), call.documents is not None)
    if call.documents is None:
        out_bsn = module(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
        return out_bsn.unflatten(-1, (h, d)).transpose(1, 2)
    q_nhd, k_mgd, v_mgd, lengths = packed(q, k, v, call)
    out_nd = module(*(x.contiguous() for x in (q_nhd, k_mgd, v_mgd)), cu_seqlens_q=lengths.cu_queries,
                    cu_seqlens_kv=lengths.cu_keys, max_seqlen_q=lengths.max_queries, max_seqlen_kv=lengths.max_keys)
    return out_nd.reshape(b, s, h, d).transpose(1, 2)
