"""Products of 8-bit floats against float64, torch._scaled_mm's own arithmetic, and the linear layer made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine_kernels import fp8_linear as module
from engine_kernels.fp8 import E4M3, E5M2, Quantised, quantise
from engine_kernels.fp8_linear import fp8_linear, product


def exact(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """The product in fp64 of what the 8-bit numbers stand for."""
    return (a.double() * scale_a.double()[:, None]) @ (b.double() * scale_b.double()[:, None]).t()


def operands(n: int, k: int, m: int, device: str, *, rowwise: bool, dtype: torch.dtype = E4M3
             ) -> tuple[Quantised, Quantised]:
    a, b = torch.randn(n, k, device=device) * 3, torch.randn(m, k, device=device) / 5
    return quantise(a, dtype, rowwise=rowwise), quantise(b, E4M3, rowwise=rowwise)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(("n", "k", "m"), [(48, 64, 32), (1, 16, 16), (33, 256, 80)])
def test_products_against_float64(device, n, k, m, rowwise, dtype, out_dtype):
    a, b = operands(n, k, m, device, rowwise=rowwise, dtype=dtype)
    y = product(a.q_nk, a.scale, b.q_nk, b.scale, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    # Before Blackwell tensor cores add up 8-bit products with 14 bits, and rowwise only bf16 comes out.
    short = torch.device(device).type == "cuda"
    rough = out_dtype == torch.bfloat16 or (short and rowwise)
    expected = exact(a.q_nk, a.scale, b.q_nk, b.scale)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8 if rough else 1e-5,
                               atol=expected.abs().max().item() * (2**-10 if short else 1e-6))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 40), k=st.integers(1, 5), m=st.integers(0, 5), seed=st.integers(0, 2**31),
       rowwise=st.booleans())
def test_any_shape(n, k, m, seed, rowwise):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = operands(n, 16 * k, 16 * m, device, rowwise=rowwise)
    y = product(a.q_nk, a.scale, b.q_nk, b.scale, out_dtype=torch.bfloat16)
    expected = exact(a.q_nk, a.scale, b.q_nk, b.scale)
    atol = expected.abs().max().item() * 2**-10 if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=atol)


def test_emulation_is_what_torch_computes(device):
    """torch._scaled_mm runs on CPUs too."""
    for dtype in (E4M3, E5M2):
        a, b = operands(32, 64, 48, device, rowwise=False, dtype=dtype)
        theirs = module.scaled_mm(a.q_nk, b.q_nk.t(), a.scale, b.scale, out_dtype=torch.float32)
        torch.testing.assert_close(product(a.q_nk, a.scale, b.q_nk, b.scale, out_dtype=torch.float32), theirs,
                                   rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rowwise", [False, True])
def test_gpus_are_handed_what_they_take(monkeypatch, rowwise):
    """Shapes, layouts and scales of all three products pass torch's checks for CUDA tensors, without a GPU."""
    monkeypatch.setattr(module, "obstacle", lambda device: "")
    called = []

    def checked(a, b, scale_a, scale_b, *, out_dtype, use_fast_accum):
        called.append((a.dtype, use_fast_accum))
        with FakeTensorMode():
            def on_gpu(t: Tensor) -> Tensor:
                return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            made = theirs(on_gpu(a), on_gpu(b), on_gpu(scale_a), on_gpu(scale_b), out_dtype=out_dtype)
        return torch.zeros(made.shape, dtype=made.dtype)

    theirs = module.scaled_mm
    monkeypatch.setattr(module, "scaled_mm", checked)
    x, w = torch.randn(3, 7, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    fp8_linear(x, w, rowwise=rowwise).sum().backward()
    assert called == [(E4M3, True), (E5M2, False), (E5M2, False)]
    for name, bad in (("x has 60 columns", (x[..., :60], w[:, :60])), ("weight has 31 rows", (x, w[:31]))):
        with pytest.raises(ValueError, match=name):
            fp8_linear(*bad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_forward_and_gradients(device, dtype, rowwise, impl):
    x, w, dy = (torch.randn(shape, device=device, dtype=dtype) for shape in ((3, 7, 64), (32, 64), (3, 7, 32)))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = fp8_linear(x, w, rowwise=rowwise, impl=impl)
    y.backward(dy)
    quantised: Any = (quantise(t.detach().flatten(0, -2), kind, rowwise=rowwise, transpose=True)
                      for t, kind in ((x, E4M3), (w, E4M3), (dy, E5M2)))
    x_q, w_q, dy_q = quantised
    found: list[Any] = [
        (y.detach().flatten(0, -2), exact(x_q.q_nk, x_q.scale, w_q.q_nk, w_q.scale)),
        (x.grad, exact(dy_q.q_nk, dy_q.scale, w_q.q_km[:, :32], w_q.scale_k)),
        (w.grad, exact(dy_q.q_km, dy_q.scale_k, x_q.q_km, x_q.scale_k))]
    for ours, expected in found:
        torch.testing.assert_close(ours.double().flatten(0, -2), expected, rtol=2**-8,
                                   atol=expected.abs().max().item() * 2**-9)
    plain = torch.nn.functional.linear(x, w)
    assert ((y - plain).norm() / plain.norm()).item() < 0.05  # e4m3 rounds by at most 2^-4, on average by 2.6%


def test_only_the_transpose_is_kept(device):
    x, w = (torch.randn(rows, 64, device=device, requires_grad=True) for rows in (32, 48))
    node: Any = fp8_linear(x, w).grad_fn
    kept = node.saved_tensors
    assert [(t.shape, t.dtype) for t in kept if t.dim() == 2] == [((64, 32), E4M3), ((64, 48), E4M3)]


def test_refusals_name_the_argument(device):
    a, b = operands(8, 32, 16, device, rowwise=True)
    one = torch.ones(1, device=device)
    for message, call in {
        r"b has 16 columns, a has 32": lambda: product(a.q_nk, one, b.q_nk[:, :16], one, out_dtype=torch.float32),
        r"scale_a has shape \(1,\), needs \(8,\), or \(1,\) as the other's": lambda: product(
            a.q_nk, one, b.q_nk, b.scale, out_dtype=torch.float32),
        r"scale_b has shape \(8,\), needs \(16,\)": lambda: product(
            a.q_nk, a.scale, b.q_nk, a.scale, out_dtype=torch.float32),
        r"weight has shape \(16, 31\), needs \(m, 32\)": lambda: fp8_linear(torch.ones(2, 32), torch.ones(16, 31)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
