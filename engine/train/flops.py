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


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocab: int, *, frozen: bool = False) -> float:
    """Training FLOPs (forward and backward) a token at ``seq_length``; of experts those that a token goes to.

    ``frozen`` weights have no gradients (4 in place of 6 a multiply-add); the adapters beside them are not counted.
    """
    h, d = model.hidden_size, model.head_dim or model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    projections = model.num_layers * (h * d * (heads + 2 * groups) + heads * d * h)
    attention = 2 * heads * d * _keys(model, seq_length)  # q·k and p·v
    return 6.0 * attention + (4.0 if frozen else 6.0) * (projections + _feed_forward(model) + h * padded_vocab)


def _keys(model: ModelConfig, seq_length: int) -> float:
    """Keys that a query sees on average, summed over layers: half the sequence, or nearly the window."""
    windowed = 0
    if model.window_size is not None:
        every = model.full_attention_every
        windowed = model.num_layers - (model.num_layers // every if every else 0)
    window = min(model.window_size or seq_length, seq_length)
    return (model.num_layers - windowed) * seq_length / 2 + windowed * window * (1 - window / (2 * seq_length))


def _feed_forward(model: ModelConfig) -> int:
    """Multiply-adds a token of all layers' feed-forward networks, routers included."""
    h, moe = model.hidden_size, model.moe
    assert model.ffn_hidden_size is not None  # the configuration resolves it
    dense = model.num_layers if moe is None else moe.num_dense_layers
    total = dense * 3 * h * model.ffn_hidden_size
    if moe is not None:
        assert moe.ffn_hidden_size is not None
        inner = moe.top_k * moe.ffn_hidden_size + (moe.shared_ffn_hidden_size or 0)
        total += (model.num_layers - dense) * h * (3 * inner + moe.num_experts)
    return total


def _measured_cpu_peak(dtype: torch.dtype) -> float:
    """The rate of a 1024³ product through the engine's own path: a CPU's data sheet says little of its clock."""
    from engine_kernels.linear import matmul_nt

    own = torch.Generator().manual_seed(0)  # a resumed run's dropout goes on from the state it was saved with
    a, b = (torch.randn(1024, 1024, dtype=dtype, generator=own) for _ in range(2))
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
