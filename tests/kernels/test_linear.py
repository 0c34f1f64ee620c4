"""The three products of a linear layer against float64, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import linear

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    """Both ways, on any processor: oneDNN is there in every x86 build of torch."""
    monkeypatch.setattr(linear, "onednn_is_faster_in_fp32", lambda: request.param == "onednn")


def close(found, expected, dtype):
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("m", "k"), [(13, 24), (24, 13), (48, 24), (1, 1)])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1,), (64, 2)])
def test_products_match_float64(library, dtype, shape, m, k):
    x, w, g, bias = (torch.randn(*s).to(dtype) for s in ((*shape, k), (m, k), (*shape, m), (m,)))
    wide = [t.double() for t in (x, w, g, bias)]
    close(linear.matmul_nt(x, w), wide[0] @ wide[1].t(), dtype)
    close(linear.matmul_nt(x, w, bias), wide[0] @ wide[1].t() + wide[3], dtype)
    close(linear.matmul_nn(g, w), wide[2] @ wide[1], dtype)
    close(linear.matmul_tn(g, x), wide[2].reshape(-1, m).t() @ wide[0].reshape(-1, k), dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_any_size_and_strides(n, k, m, strided):
    x = torch.randn(k, n).t() if strided else torch.randn(n, k)
    w = torch.randn(k, m).t() if strided else torch.randn(m, k)
    g = torch.randn(m, n).t() if strided else torch.randn(n, m)
    assert torch.allclose(linear.matmul_nt(x, w), (x.double() @ w.double().t()).float(), atol=1e-4)
    assert torch.allclose(linear.matmul_nn(g, w), (g.double() @ w.double()).float(), atol=1e-4)
    assert torch.allclose(linear.matmul_tn(g, x), (g.double().t() @ x.double()).float(), atol=1e-4)


def test_the_choice_depends_on_the_processor_alone():
    assert linear.onednn_is_faster_in_fp32() is linear.onednn_is_faster_in_fp32()
    assert not linear._use_onednn(torch.randn(2, 2).double())
    assert not linear._use_onednn(torch.randn(2, 2).bfloat16())
