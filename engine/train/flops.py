"""Model FLOPs and the hardware's peak, for MFU.

Counted as ../shared/ANCHORS does: multiply-adds of every matrix product, forward and backward (3x forward), the causal
half of attention, no recomputation; embedding look-ups are free, the output projection is not.
"""

from __future__ import annotations

import time

import torch

from engine.config import ModelConfig

# Dense bf16 peak without sparsity, FLOP/s, from the vendors' data sheets.
_BF16_PEAK = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40": 181e12,
              "RTX 4090": 165e12}


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocab: int) -> float:
    """Training FLOPs (forward and backward) a token at ``seq_length``."""
    h, d = model.hidden_size, model.head_dim or model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    assert model.ffn_hidden_size is not None  # the configuration resolves it
    projections = h * d * (heads + 2 * groups) + heads * d * h + 3 * h * model.ffn_hidden_size
    attention = heads * d * seq_length  # q·k and p·v, each 2·s·d a head and token, half of it masked
    per_token = model.num_layers * (2 * projections + 2 * attention) + 2 * h * padded_vocab
    return 3.0 * per_token


def _measured_cpu_peak(dtype: torch.dtype) -> float:
    """The rate of a 1024³ product through the engine's own path: a CPU's data sheet says little of its clock."""
    from engine_kernels.linear import matmul_nt

    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        matmul_nt(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that MFU is measured against: the data sheet's bf16 peak on known GPUs, a measured product on CPUs."""
    if device.type == "cpu":
        return _measured_cpu_peak(dtype)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in sorted(_BF16_PEAK.items(), key=lambda kv: -len(kv[0])) if key in name), None)
    return None
