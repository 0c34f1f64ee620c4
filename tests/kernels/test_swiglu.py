"""The gated activations against float64, Transformers' chains, and at the edges of the number range."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.swiglu import ACTIVATIONS, QUICK, clamped_swiglu, quick_geglu, swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16]
IMPLS = ["cpu", "triton"]
# Inputs are scaled so that both sides of the clamps come up; a small limit, so that many elements meet them.
FORMS = {"swiglu": (swiglu, {}), "quick_geglu": (quick_geglu, {"alpha": QUICK}),
         "clamped_swiglu": (partial(clamped_swiglu, limit=2.0), {"alpha": QUICK, "limit": 2.0})}
GPU = "cuda" if torch.cuda.is_available() else "cpu"


def place(impl):
    """Where this kernel runs: Triton's on the GPU, or in the interpreter."""
    return GPU if impl == "triton" else "cpu"


def pair(form, impl):
    kernel, options = FORMS[form]
    return (lambda x, w=None: kernel(x, weights_n=w, impl=impl),
            lambda x, w=None: swiglu_reference(x, weights_n=w, **options))


def off_the_clamps(x):
    """Moved away from +-2, where bf16 and float64 may differ on which side an element stands. In place."""
    return x.masked_fill_((x.abs() - 2).abs() < 1e-3, 1.5)


SHAPES = [(3, 5, 128), (7, 66), (1, 2), (34,), (0, 16), (5, 0), (2, 2 * 1411)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(compare, threads, shape, form, weighted, dtype):
    x = off_the_clamps(torch.randn(shape, dtype=dtype) * 3)
    compare(*pair(form, "cpu"), x, *([torch.randn(shape[:-1])] if weighted else []), summed=16.0 if weighted else 0.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_values_and_gradients(compare, device, shape, form, weighted, dtype):
    x = off_the_clamps(torch.randn(shape, dtype=dtype, device=device) * 3)
    weights = [torch.randn(shape[:-1], device=device)] if weighted else []
    compare(*pair(form, "triton"), x, *weights, summed=16.0 if weighted else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_instruction_set(compare, instruction_set, form, dtype):
    x = off_the_clamps(torch.randn(9, 154, dtype=dtype) * 5)
    compare(*pair(form, "cpu"), x)
    compare(*pair(form, "cpu"), x, torch.rand(9), summed=16.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_the_inputs_dtype_keep_it(compare, impl):
    x, weights = (torch.randn(shape, dtype=torch.bfloat16, device=place(impl)) for shape in ((6, 32), (6,)))
    compare(*pair("swiglu", impl), x, weights, summed=16.0)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 40), f=st.integers(1, 150), seed=st.integers(0, 2**31), form=st.sampled_from(sorted(FORMS)),
       scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_any_shape(impl, n, f, seed, form, scale):
    x = (torch.randn(n, 2 * f, generator=torch.Generator().manual_seed(seed)) * scale).to(place(impl))
    ours, reference = pair(form, impl)
    # Triton's 1 - sigmoid and exp are a few units in the last place where the C++ kernel's are one.
    torch.testing.assert_close(ours(x).double(), reference(x.double()), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_and_gradient(compare, impl, dtype):
    ours, reference = pair("swiglu", impl)
    for view in (lambda x: x[:, :20], lambda x: x[:, ::2], lambda x: x.t()[:6], lambda x: x[::2, 20:]):
        compare(lambda x, v=view: ours(v(x)).t(), lambda x, v=view: reference(v(x)).t(),
                torch.randn(40, 40, dtype=dtype, device=place(impl)))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_weights(compare, impl):
    ours, reference = pair("swiglu", impl)
    x, weights = torch.randn(6, 5, 32, device=place(impl)), torch.randn(5, 6, device=place(impl))
    compare(lambda x, w: ours(x, w.t()), lambda x, w: reference(x, w.t()), x, weights, summed=16.0)
    compare(lambda x, w: ours(x, w[:, :1].expand(5, 6).t()), lambda x, w: reference(x, w[:, :1].expand(5, 6).t()),
            x, weights, summed=64.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_transformers(impl):
    from transformers.activations import ACT2FN

    gate, up = torch.randn(2, 6, 48, device=place(impl)).unbind()
    x = torch.cat((gate, up), -1)
    torch.testing.assert_close(swiglu(x, impl=impl), ACT2FN["silu"](gate) * up, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(quick_geglu(x, impl=impl), ACT2FN["quick_gelu"](gate) * up, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_gates(impl, dtype):
    gate = torch.tensor([1e4, 300.0, 89.0, 20.0, -20.0, -89.0, -300.0, -1e4, 3e38, -3e38], dtype=dtype)
    x = torch.cat((gate, torch.full_like(gate, 0.5))).to(place(impl)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, y_exact = swiglu(x, impl=impl), swiglu_reference(exact)
    y.sum().backward()
    y_exact.sum().backward()
    torch.testing.assert_close(y.double(), y_exact, rtol=2.0**-8, atol=1e-30)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2.0**-8, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_at_its_element(impl, form, dtype):
    x = torch.randn(3, 80, dtype=dtype)
    x[1, 7] = x[2, 41] = float("nan")
    expected = torch.zeros(3, 40, dtype=torch.bool)
    expected[1, 7] = expected[2, 1] = True
    assert torch.equal(pair(form, impl)[0](x.to(place(impl))).isnan().cpu(), expected)


def test_triton_rounds_as_the_cpu_kernel(device):
    x, dy, weights = torch.randn(9, 80, dtype=torch.bfloat16), torch.randn(9, 40, dtype=torch.bfloat16), torch.rand(9)
    for form in FORMS:
        kept = []
        for impl in IMPLS:
            leaves = [t.to(place(impl)).requires_grad_() for t in (x, weights)]
            y = pair(form, impl)[0](*leaves)
            kept.append([t.cpu() for t in (y, *torch.autograd.grad(y, leaves, dy.to(place(impl))))])
        for c, t in zip(*kept, strict=True):
            torch.testing.assert_close(c, t, rtol=2**-7, atol=1e-4)  # at most one rounding apart


@pytest.mark.parametrize("impl", ["torch", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped_values_and_gradients_by_hand(impl, dtype):
    """Both sides of every clamp, where the gradient ends, and gates of 88 and more, whose exponentials overflow."""
    x = (torch.randn(64, 2 * 20, generator=torch.Generator().manual_seed(0)) * 6).to(dtype)
    x[0, :4] = torch.tensor([200.0, -200.0, 88.0, -60.0])
    x = x.to(place(impl)).requires_grad_()
    y = clamped_swiglu(x, impl=impl)
    y.sum().backward()
    raw_gate, raw_up = x.detach().double().chunk(2, -1)
    gate, up = raw_gate.minimum(raw_gate.new_tensor(7.0)), raw_up.sign() * raw_up.abs().minimum(raw_up.new_tensor(7.0))
    sigmoid = 1 / (1 + torch.exp(-1.702 * gate))
    slope = sigmoid * (1 + 1.702 * gate * (1 - sigmoid)) * (up + 1) * (raw_gate <= 7)
    expected_grad = torch.cat([slope, gate * sigmoid * (raw_up.abs() <= 7)], -1)
    assert y.dtype == dtype
    assert x.grad is not None
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(y.double(), (up + 1) * gate * sigmoid, rtol=rtol, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), expected_grad, rtol=rtol, atol=1e-5)
    assert (raw_gate > 7).any()
    assert (raw_up.abs() > 7).any()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_differences(device, form):
    generator = torch.Generator().manual_seed(1)
    x = off_the_clamps(torch.randn(3, 8, dtype=torch.float64, generator=generator) * 4).to(device).requires_grad_()
    weights = torch.rand(3, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    for impl in ("torch", "triton"):
        assert torch.autograd.gradcheck(pair(form, impl)[0], (x,))
        assert torch.autograd.gradcheck(pair(form, impl)[0], (x, weights))


def test_weight_gradients_are_deterministic(device):
    x, dy = torch.randn(5, 2 * 1411, device=device), torch.randn(5, 1411, device=device)
    weights = torch.rand(5, device=device, requires_grad=True)
    grads = [torch.autograd.grad(swiglu(x, weights_n=weights, impl="triton"), weights, dy)[0] for _ in range(3)]
    assert all(torch.equal(grads[0], g) for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_library_contract(impl):
    x, weights = (torch.randn(shape, device=place(impl), requires_grad=True) for shape in ((4, 48), (4,)))
    dy = torch.randn(4, 24, device=place(impl))
    for w, limit in ((None, None), (weights, 7.0)):
        torch.library.opcheck(torch.ops.engine_kernels.swiglu_fwd.default, (x, w, QUICK, limit, impl))
        kept = None if w is None else w.detach()
        torch.library.opcheck(torch.ops.engine_kernels.swiglu_bwd.default, (dy, x.detach(), kept, QUICK, limit, impl))


def test_torch_compile_sees_it():
    x = torch.randn(4, 48, requires_grad=True)
    compiled = torch.compile(lambda t: swiglu(t * 2, impl="cpu").sum(), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(swiglu_reference(x * 2).sum(), x)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_refusals_name_the_op_and_the_argument(device, name):
    op, x = ACTIVATIONS[name], torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match=f"{name}: the last dimension must be even, got 7"):
        op(x[:, 1:])
    with pytest.raises(ValueError, match=r"weights_n has shape \(3,\), needs \(2,\): one a row"):
        op(x, weights_n=torch.ones(3, device=device), impl="triton")
    with pytest.raises(RuntimeError, match=f'{name}: impl="triton" cannot run: weights_n is on meta'):
        op(x, weights_n=torch.ones(2, device="meta"), impl="triton")
    with pytest.raises(RuntimeError, match=r"x is torch\.int64, needs float32, bfloat16, float16 or float64"):
        op(x.long(), impl="triton")
    with pytest.raises(RuntimeError, match=r"x is on meta; Triton kernels need a CUDA tensor"):
        op(x.to("meta"), impl="triton")


def test_a_limit_that_clamps_nothing_right_is_refused():
    for limit in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="clamped_swiglu: limit must be positive and finite"):
            clamped_swiglu(torch.randn(2, 8), limit=limit)
