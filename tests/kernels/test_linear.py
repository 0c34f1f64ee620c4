"""The three products of a linear layer against float64, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import linear

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    """Both ways, on any processor: oneDNN is there in every x86 build of torch."""
    monkeypatch.setattr(linear, "onednn_is_faster_in_fp32", lambda: request.param == "onednn")


def close(found, expected, dtype, stored=None):
    assert found.dtype == (stored or dtype)
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1.0)  # a sum of few terms may cancel
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


# --- the gradient summed inside the product ---------------------------------------------------------------------------

PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "sums"), PAIRS)
@pytest.mark.parametrize(("shape", "m", "k"), [((7,), 5, 9), ((3, 5), 24, 13), ((1,), 1, 1), ((0,), 4, 6),
                                               ((70,), 130, 260), ((2100,), 24, 40), ((6,), 0, 4), ((6,), 4, 0)])
def test_sums_match_float64(shape, m, k, dtype, sums, impl):
    """In fp32 as if nothing had been rounded on the way (cuBLAS and Triton); (2100, 24, 40) is split over programs."""
    g, x = (torch.randn(*shape, columns).to(DEVICE, dtype) for columns in (m, k))
    before = torch.randn(m, k).to(DEVICE, sums)
    product = g.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
    rounded_before = dtype != sums and impl == "torch" and DEVICE == "cpu"
    for first in (True, False):
        found = torch.full_like(before, torch.nan) if first else before.clone()
        linear.add_matmul_tn_(found, g, x, first=first, impl=impl)
        if m * k:
            expected = product if first else before.double() + product
            close(found, expected, torch.bfloat16 if rounded_before else sums, sums)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 70), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
def test_triton_sums_of_any_size_and_strides(n, m, k, strided, first):
    g = (torch.randn(m, n).t() if strided else torch.randn(n, m)).to(DEVICE)
    x = (torch.randn(n, 2 * k)[:, ::2] if strided else torch.randn(n, k)).to(DEVICE)
    found = torch.randn(m, k + 3, device=DEVICE)[:, :k] if strided else torch.randn(m, k, device=DEVICE)
    expected = g.double().t() @ x.double() + (0 if first else found.double())
    linear.add_matmul_tn_(found, g, x, first=first, impl="triton")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_sums_repeat_their_bits(impl):
    g, x = torch.randn(2100, 24, device=DEVICE), torch.randn(2100, 40, device=DEVICE)
    found = [torch.ones(24, 40, device=DEVICE) for _ in range(2)]
    for total in found:
        linear.add_matmul_tn_(total, g, x, first=False, impl=impl)
    assert torch.equal(*found)


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_triton_sums_of_extreme_magnitudes(scale):
    g, x = (torch.randn(33, columns, device=DEVICE) * scale for columns in (17, 20))
    found = torch.zeros(17, 20, device=DEVICE)
    linear.add_matmul_tn_(found, g, x, first=False, impl="triton")
    exact = g.double().t() @ x.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


def test_sum_library_contract():
    g, x, total = (torch.randn(*shape, device=DEVICE) for shape in ((6, 4), (6, 5), (4, 5)))
    torch.library.opcheck(torch.ops.engine_kernels.add_matmul_tn_.default, (total, g, x, False))


def test_sum_refusals_name_the_argument():
    g, x, total = (torch.randn(*shape, device=DEVICE) for shape in ((6, 4), (6, 5), (4, 5)))
    with pytest.raises(ValueError, match="x has 5 rows, grad_y has 6"):
        linear.add_matmul_tn_(total, g, x[1:], first=True)
    with pytest.raises(ValueError, match=r"main_grad is \(5, 4\) .*, needs \(4, 5\) and unit stride"):
        linear.add_matmul_tn_(total.reshape(5, 4), g, x, first=True)
    with pytest.raises(ValueError, match=r"with strides \(1, 4\)"):
        linear.add_matmul_tn_(total.reshape(5, 4).t(), g, x, first=True)
    with pytest.raises(ValueError, match=r"main_grad is torch\.float64, needs torch\.float32 or torch\.float32"):
        linear.add_matmul_tn_(total.double(), g, x, first=True)
    with pytest.raises(ValueError, match=r"grad_y is torch\.float64, which"):
        linear.add_matmul_tn_(total.double(), g.double(), x.double(), first=True, impl="triton")
    with pytest.raises(RuntimeError, match=r"x is torch\.bfloat16, but grad_y is torch\.float32"):
        linear.add_matmul_tn_(total, g, x.bfloat16(), first=True, impl="triton")
    with pytest.raises(RuntimeError, match="main_grad is on meta"):
        linear.add_matmul_tn_(total.to("meta"), g, x, first=True, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        linear.add_matmul_tn_(total, g, x, first=True, impl="cublas")


def test_without_cublas_the_product_is_rounded_and_added():
    """Where torch cannot add into fp32 inside a 16-bit product (here: on a CPU), it says so once, and is not asked."""
    assert not linear._cublas_sums_in_fp32(torch.device("cpu"), torch.bfloat16)
