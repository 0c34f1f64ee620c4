"""swiglu and its clamped form against float64, Transformers' chain, and at the edges of the number range."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.swiglu import clamped_swiglu, swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16]
kernel = partial(swiglu, impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 128), (7, 66), (1, 2), (34,), (0, 16), (5, 0), (2, 2 * 1411)])
def test_values_and_gradients(compare, threads, shape, dtype):
    compare(kernel, swiglu_reference, torch.randn(shape, dtype=dtype) * 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(compare, instruction_set, dtype):
    compare(kernel, swiglu_reference, torch.randn(9, 154, dtype=dtype) * 5)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 40), f=st.integers(1, 150), seed=st.integers(0, 2**31),
       scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_any_shape(n, f, seed, scale):
    x = torch.randn(n, 2 * f, generator=torch.Generator().manual_seed(seed)) * scale
    torch.testing.assert_close(kernel(x).double(), swiglu_reference(x.double()), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_and_gradient(compare, dtype):
    for view in (lambda x: x[:, :20], lambda x: x[:, ::2], lambda x: x.t()[:6], lambda x: x[::2, 20:]):
        compare(lambda x, v=view: kernel(v(x)).t(), lambda x, v=view: swiglu_reference(v(x)).t(),
                torch.randn(40, 40, dtype=dtype))


def test_equals_transformers():
    gate, up = torch.randn(6, 48), torch.randn(6, 48)
    expected = torch.nn.functional.silu(gate) * up  # LlamaMLP: act_fn(gate_proj(x)) * up_proj(x)
    torch.testing.assert_close(kernel(torch.cat((gate, up), -1)), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_gates(dtype):
    gate = torch.tensor([1e4, 300.0, 89.0, 20.0, -20.0, -89.0, -300.0, -1e4, 3e38, -3e38], dtype=dtype)
    x = torch.cat((gate, torch.full_like(gate, 0.5))).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, y_exact = kernel(x), swiglu_reference(exact)
    y.sum().backward()
    y_exact.sum().backward()
    torch.testing.assert_close(y.double(), y_exact, rtol=2.0**-8, atol=1e-30)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2.0**-8, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_at_its_element(dtype):
    x = torch.randn(3, 80, dtype=dtype)
    x[1, 7] = x[2, 41] = float("nan")
    expected = torch.zeros(3, 40, dtype=torch.bool)
    expected[1, 7] = expected[2, 1] = True
    assert torch.equal(kernel(x).isnan(), expected)


def test_torch_library_contract():
    x = torch.randn(4, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.engine_kernels.swiglu_fwd.default, (x,))
    torch.library.opcheck(torch.ops.engine_kernels.swiglu_bwd.default, (torch.randn(4, 24), x.detach()))


def test_torch_compile_sees_it():
    x = torch.randn(4, 48, requires_grad=True)
    compiled = torch.compile(lambda t: kernel(t * 2).sum(), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(swiglu_reference(x * 2).sum(), x)[0])


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even, got 7"):
        swiglu(torch.randn(2, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clamped_values_and_gradients_by_hand(dtype):
    """Both sides of every clamp, where the gradient ends, and gates of 88 and more, whose exponentials overflow."""
    x = (torch.randn(64, 2 * 20, generator=torch.Generator().manual_seed(0)) * 6).to(dtype)
    x[0, :4] = torch.tensor([200.0, -200.0, 88.0, -60.0])
    x.requires_grad_()
    y = clamped_swiglu(x)
    y.sum().backward()
    raw_gate, raw_up = x.detach().double().chunk(2, -1)
    gate, up = torch.minimum(raw_gate, torch.tensor(7.0)), torch.maximum(torch.minimum(raw_up, torch.tensor(7.0)),
                                                                          torch.tensor(-7.0))
    sigmoid = 1 / (1 + torch.exp(-1.702 * gate))
    slope = sigmoid * (1 + 1.702 * gate * (1 - sigmoid)) * (up + 1) * (raw_gate <= 7)
    expected_grad = torch.cat([slope, gate * sigmoid * (raw_up.abs() <= 7)], -1)
    assert y.dtype == dtype
    assert x.grad is not None
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(y.double(), (up + 1) * gate * sigmoid, rtol=rtol, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), expected_grad, rtol=rtol, atol=2e-6)
    assert (raw_gate > 7).any()
    assert (raw_up.abs() > 7).any()


def test_clamped_gradient_is_numerically_right():
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    assert torch.autograd.gradcheck(clamped_swiglu, x.requires_grad_())


def test_clamped_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even, got 7"):
        clamped_swiglu(torch.randn(2, 7))
