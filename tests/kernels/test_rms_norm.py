"""rms_norm against float64, Transformers' module, and at the edges of the number range."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16]


def pair(eps=1e-5, zero_centered=False):
    return (partial(rms_norm, eps=eps, zero_centered=zero_centered, impl="cpu"),
            partial(rms_norm_reference, eps=eps, zero_centered=zero_centered))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (1, 1), (4, 1), (129,), (0, 16), (2, 3, 16384)])
def test_values_and_gradients(compare, threads, shape, dtype, zero_centered):
    eps = 0.5 if shape[-1] == 1 else 1e-5  # with one element dx is all cancellation at a small eps
    compare(*pair(eps, zero_centered), torch.randn(shape, dtype=dtype),
            torch.randn(shape[-1], dtype=dtype), summed=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(compare, instruction_set, dtype):
    compare(*pair(), torch.randn(9, 77, dtype=dtype), torch.randn(77, dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 40), d=st.integers(1, 200), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_any_shape(n, d, seed, scale):
    from_seed = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, d, generator=from_seed) * scale, torch.randn(d, generator=from_seed)
    exact = rms_norm_reference(x.double(), w.double(), eps=1e-6)
    torch.testing.assert_close(rms_norm(x, w, eps=1e-6, impl="cpu").double(), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_and_gradient(compare, dtype):
    weight = torch.randn(20, dtype=dtype)
    norm, reference = pair()
    for view in (lambda x: x[:, :20], lambda x: x[:, ::2], lambda x: x.t()[:6, :20], lambda x: x[::2, 20:]):
        compare(lambda x, w, v=view: norm(v(x), w).t(), lambda x, w, v=view: reference(v(x), w).t(),
                torch.randn(40, 40, dtype=dtype), weight)


def test_fp32_weight_with_bf16_input_keeps_its_gradient_in_fp32(compare):
    compare(*pair(), torch.randn(6, 32, dtype=torch.bfloat16), torch.randn(32))


def test_equals_transformers():
    module = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm(96, eps=1e-6)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(4, 10, 96)
    torch.testing.assert_close(rms_norm(x, module.weight, eps=1e-6, impl="cpu"), module(x), rtol=1e-5, atol=1e-6)


def test_extreme_values():
    weight = torch.ones(16)
    for scale in (1e18, 1e-18):
        x = torch.randn(3, 16) * scale
        exact = rms_norm_reference(x.double(), weight.double(), eps=0.0)
        torch.testing.assert_close(rms_norm(x, weight, eps=0.0, impl="cpu").double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(rms_norm(torch.zeros(2, 16), weight, eps=1e-6, impl="cpu"), torch.zeros(2, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(dtype, bad):
    x, weight = torch.randn(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 7] = bad
    y = rms_norm(x, weight, eps=1e-5, impl="cpu")
    assert y[1, 7].isnan()
    assert y[[0, 2]].isfinite().all()


def test_weight_gradient_is_deterministic(threads):
    x, weight, dy = torch.randn(501, 96), torch.randn(96, requires_grad=True), torch.randn(501, 96)
    grads = [torch.autograd.grad(rms_norm(x, weight, eps=1e-5, impl="cpu"), weight, dy)[0] for _ in range(5)]
    assert all(torch.equal(grads[0], g) for g in grads)


def test_torch_library_contract():
    x, w = torch.randn(4, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_fwd.default, (x, w, 1e-5, 1.0))
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_bwd.default,
                          (torch.randn(4, 24), x.detach(), w.detach(), torch.rand(4), 0.0))


def test_auto_is_the_reference_for_fp64_and_a_wrong_weight_is_named():
    x, w = torch.randn(4, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    assert torch.equal(rms_norm(x, w, eps=1e-5), rms_norm_reference(x, w, eps=1e-5))
    with pytest.raises(ValueError, match=r"weight has shape \(23,\), needs \(24,\)"):
        rms_norm(x, w[1:], eps=1e-5)
