"""Matrix products of a linear layer: y = x wᵀ, grad_x = grad_y w, grad_w = grad_yᵀ x.

    n tokens (all leading dimensions), k input features, m output features

On AMD processors torch hands fp32 products to MKL, which takes about twice as long as oneDNN (the linear rows of
``benchmarks/run.py kernels_cpu``), so they go to oneDNN there. In bf16 torch uses oneDNN itself.
The choice depends on the processor alone, never on a timing, so that a resumed run repeats its bits.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def onednn_is_faster_in_fp32() -> bool:
    """Whether fp32 products go to oneDNN: on AMD processors, where torch was built with it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in f)
    except OSError:
        return False


def _use_onednn(a: torch.Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0 and onednn_is_faster_in_fp32()


def _onednn(a_nk: torch.Tensor, b_mk: torch.Tensor, bias_m: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_nk, b_mk, bias_m, "none", [], "")


def matmul_nt(x: torch.Tensor, weight_mk: torch.Tensor, bias_m: torch.Tensor | None = None) -> torch.Tensor:
    """[..., k] x [m, k] -> [..., m], plus bias: a linear layer's forward."""
    if _use_onednn(x):
        return _onednn(x, weight_mk, bias_m)
    return torch.nn.functional.linear(x, weight_mk, bias_m)


def matmul_nn(grad_y: torch.Tensor, weight_mk: torch.Tensor) -> torch.Tensor:
    """[..., m] x [m, k] -> [..., k]: the gradient of a linear layer's input."""
    if _use_onednn(grad_y):
        return _onednn(grad_y, weight_mk.t())
    return grad_y.matmul(weight_mk)


def matmul_tn(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[..., m], [..., k] -> [m, k]: the gradient of a linear layer's weight, summed over all leading dimensions."""
    grad_nm, x_nk = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
    if _use_onednn(grad_y):
        # OneDNN is faster with the wide matrix as its right-hand side: 170 against 125 GFLOP/s a core.
        if grad_nm.shape[1] >= 2 * x_nk.shape[1]:
            return _onednn(x_nk.t(), grad_nm.t()).t()
        return _onednn(grad_nm.t(), x_nk.t())
    return grad_nm.t().matmul(x_nk)
