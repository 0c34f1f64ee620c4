"""RMSNorm and gated activations with fp8 output: bit for bit what the op and then ``quantise`` give."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import fp8
from engine_kernels.fp8 import E4M3, quantise
from engine_kernels.fp8_outputs import rms_norm_fp8, swiglu_fp8
from engine_kernels.rms_norm import add_rms_norm, rms_norm
from engine_kernels.swiglu import QUICK, clamped_swiglu, quick_geglu, swiglu

ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "swiglu": (swiglu, {}), "quick_geglu": (quick_geglu, {"alpha": QUICK}),
    "clamped_swiglu": (clamped_swiglu, {"alpha": QUICK, "limit": 7.0})}
SHAPES = [(3, 5, 64), (7, 33), (1, 1), (0, 16), (70, 64), (2, 2050)]


def assert_same(ours: fp8.Quantised, y: torch.Tensor, **how) -> None:
    """``ours`` is ``y`` quantised."""
    exact = quantise(y.reshape(-1, y.shape[-1]), E4M3, impl="torch", **how)
    assert ours.q_nk.dtype == E4M3
    assert torch.equal(ours.q_nk.view(torch.uint8), exact.q_nk.view(torch.uint8))
    assert torch.equal(ours.scale, exact.scale)


def known(y: torch.Tensor) -> dict[str, Any]:
    """A scale under which a part of y saturates."""
    return {"scale": torch.full((1,), 2.0**-8, device=y.device),
            "measured": torch.zeros(1, dtype=torch.int32, device=y.device)}


def measured(how: dict[str, torch.Tensor]) -> float:
    return how["measured"].view(torch.float32).item()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(device, monkeypatch, shape, dtype, native):
    if not torch.cuda.is_available():
        monkeypatch.setattr(fp8, "native", lambda: native)
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    options: dict[str, Any] = {"eps": 1e-5, "impl": "triton"}
    y, (y_added, total) = rms_norm(x, weight, **options), add_rms_norm(x, residual, weight, **options)
    assert_same(rms_norm_fp8(x, weight, **options).q, y, rowwise=True)
    assert_same(rms_norm_fp8(x, weight, power_of_2=False, **options).q, y, rowwise=True, power_of_2=False)
    how = known(x)
    added = rms_norm_fp8(x, weight, residual=residual, **options, **how)
    assert_same(added.q, y_added, scale=how["scale"])
    assert torch.equal(added.total, total)
    assert measured(how) == (y_added.abs().max().item() if x.numel() else 0.0)
    rstd = torch.rsqrt(total.double().square().mean(-1) + 1e-5).flatten()
    torch.testing.assert_close(added.rstd_n.double(), rstd, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation(device, shape, dtype, name):
    x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device) * 4
    op, constants = ACTIVATIONS[name]
    y, how = op(x, impl="triton"), known(x)
    assert_same(swiglu_fp8(x, impl="triton", **constants), y, rowwise=True)
    assert_same(swiglu_fp8(x, impl="triton", **constants, **how), y, scale=how["scale"])
    assert measured(how) == (y.abs().max().item() if y.numel() else 0.0)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(0, 40), d=st.integers(1, 200), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_any_shape(n, d, seed, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(n, 2 * d, generator=torch.Generator().manual_seed(seed)) * scale).to(device, torch.bfloat16)
    weight = torch.ones(2 * d, device=device)
    assert_same(rms_norm_fp8(x, weight, eps=1e-6, impl="triton").q, rms_norm(x, weight, eps=1e-6, impl="triton"),
                rowwise=True)
    assert_same(swiglu_fp8(x, impl="triton"), swiglu(x, impl="triton"), rowwise=True)


def test_plain_torch(device):
    x, weight = torch.randn(9, 48, device=device), torch.randn(48, device=device)
    how = known(x)
    normed = rms_norm_fp8(x, weight, eps=1e-5, residual=x, zero_centered=True, impl="torch", **how)
    y, total = add_rms_norm(x, x, weight, eps=1e-5, zero_centered=True, impl="torch")
    assert_same(normed.q, y, scale=how["scale"])
    assert torch.equal(normed.total, total)
    assert measured(how) == y.abs().max().item()
    assert_same(swiglu_fp8(x, impl="torch"), swiglu(x, impl="torch"), rowwise=True)


def test_what_is_not_finite(device):
    x, weight = torch.randn(4, 40, device=device), torch.ones(40, device=device)
    x[1, 7] = torch.nan
    for rows in (rms_norm_fp8(x, weight, eps=1e-5, impl="triton").q, swiglu_fp8(x, impl="triton")):
        assert rows.scale.isnan().nonzero().tolist() == [[1]]
    how = known(x)
    q = rms_norm_fp8(x, weight, eps=1e-5, impl="triton", **how).q.q_nk.float()
    assert q[1].isnan().all()
    assert q[[0, 2, 3]].isfinite().all()
    assert how["measured"].item() > 0x7F800000  # NaN is above everything


def test_torch_library_contract(device):
    x, weight, one = torch.randn(4, 24, device=device), torch.randn(24, device=device), torch.ones(1, device=device)
    bits, ops = torch.zeros(1, dtype=torch.int32, device=device), torch.ops.engine_kernels
    for scale, found in ((None, None), (one, bits), (one, None)):
        torch.library.opcheck(ops.rms_norm_fp8.default, (x, None, weight, 1e-5, 0.0, scale, found, True))
        torch.library.opcheck(ops.rms_norm_fp8.default, (x, x.clone(), weight, 1e-5, 1.0, scale, found, False))
        torch.library.opcheck(ops.swiglu_fp8.default, (x, 1.0, 7.0, scale, found, True))


def test_refusals_name_the_argument(device):
    x, one = torch.randn(4, 24, device=device), torch.ones(1, device=device)
    norm, bits = partial(rms_norm_fp8, eps=1e-5), torch.zeros(1, dtype=torch.int32, device=device)
    for message, call in {
        r"weight has shape \(23,\), needs \(24,\)": lambda: norm(x, x[0, 1:]),
        r"residual has shape \(4, 23\), needs \(4, 24\)": lambda: norm(x, x[0], residual=x[:, 1:]),
        r"rms_norm_fp8: scale is torch.int32": lambda: norm(x, x[0], scale=bits),
        r"swiglu_fp8: measured is torch.float32": lambda: swiglu_fp8(x, scale=one, measured=one),
        r"swiglu_fp8: measured is of a whole tensor": lambda: swiglu_fp8(x, measured=bits),
        r"the last dimension must be even, got 23": lambda: swiglu_fp8(x[:, 1:]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"residual is torch.bfloat16, but x is torch.float32"):
        norm(x, x[0], residual=x.bfloat16(), impl="triton")
