"""rms_norm against float64, Transformers' module, and at the edges of the number range."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

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
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_fwd.default, (x, None, w, 1e-5, 1.0, "cpu"))
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_bwd.default,
                          (torch.randn(4, 24), None, x.detach(), w.detach(), torch.rand(4), 0.0, "cpu"))


def test_auto_is_the_reference_for_fp64_and_a_wrong_weight_is_named():
    x, w = torch.randn(4, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    assert torch.equal(rms_norm(x, w, eps=1e-5), rms_norm_reference(x, w, eps=1e-5))
    with pytest.raises(ValueError, match=r"weight has shape \(23,\), needs \(24,\)"):
        rms_norm(x, w[1:], eps=1e-5)


# --- the sum with the residual, and the Triton kernels ---------------------------------------------------------------

def both_of_add(impl, eps=1e-5, zero_centered=False):
    return (partial(add_rms_norm, eps=eps, zero_centered=zero_centered, impl=impl),
            partial(add_rms_norm_reference, eps=eps, zero_centered=zero_centered))


def on(device, *tensors):
    return [t.to(device) for t in tensors]


TRITON_SHAPES = [(3, 5, 64), (7, 33), (1, 1), (4, 1), (129,), (0, 16), (3, 0), (70, 64), (2, 4097), (9, 8200)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("shape", TRITON_SHAPES)
def test_triton_values_and_gradients(compare, device, shape, dtype, zero_centered):
    options = {"eps": 0.5 if shape[-1] == 1 else 1e-5, "zero_centered": zero_centered}
    x, weight = on(device, torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype))
    compare(partial(rms_norm, impl="triton", **options), partial(rms_norm_reference, **options), x, weight, summed=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (129,), (0, 16), (70, 64), (9, 8200)])
def test_add_values_and_gradients(compare, shape, impl, dtype):
    """In bf16 what is normalised is the rounded sum, so the numbers are such that sums are exact."""
    x, residual = ((torch.randint(-64, 64, shape) / 16).to(dtype) for _ in range(2))
    compare(*both_of_add(impl), x, residual, torch.randn(shape[-1], dtype=dtype), summed=4.0)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_add_where_only_one_output_is_used(compare, impl):
    ours, reference = both_of_add(impl)
    inputs = torch.randn(6, 32), torch.randn(6, 32), torch.randn(32)
    for i in range(2):
        # `+ 0 * weight` gives every input a gradient where the sum alone is used
        compare(lambda x, r, w, i=i: ours(x, r, w)[i] + 0 * w,
                lambda x, r, w, i=i: reference(x, r, w)[i] + 0 * w, *inputs)


def test_triton_rounds_as_the_cpu_kernel(device):
    x, residual, weight = (torch.randn(9, 80, dtype=torch.bfloat16) for _ in range(3))
    kept = [add_rms_norm(*on("cpu" if impl == "cpu" else device, x, residual, weight[0]), eps=1e-5, impl=impl)
            for impl in ("cpu", "triton")]
    assert torch.equal(kept[0][1], kept[1][1].cpu())
    torch.testing.assert_close(kept[0][0], kept[1][0].cpu(), rtol=2**-7, atol=1e-6)  # at most one rounding apart


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 40), d=st.integers(1, 200), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_triton_any_shape(n, d, seed, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from_seed = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, d, generator=from_seed) * scale, torch.randn(d, generator=from_seed)
    exact = rms_norm_reference(x.double(), w.double(), eps=1e-6)
    ours = rms_norm(*on(device, x, w), eps=1e-6, impl="triton").cpu()
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-6)


def test_triton_strided(compare, device):
    weight = torch.randn(20, device=device)
    norm, reference = partial(rms_norm, eps=1e-5, impl="triton"), partial(rms_norm_reference, eps=1e-5)
    for view in (lambda x: x[:, :20], lambda x: x[:, ::2], lambda x: x.t()[:6, :20], lambda x: x[::2, 20:]):
        compare(lambda x, w, v=view: norm(v(x), w).t(), lambda x, w, v=view: reference(v(x), w).t(),
                torch.randn(40, 40, device=device), weight)


@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_triton_extreme_values(device, scale):
    x, weight = torch.randn(3, 16, device=device) * scale, torch.ones(16, device=device)
    exact = rms_norm_reference(x.double(), weight.double(), eps=0.0)
    torch.testing.assert_close(rms_norm(x, weight, eps=0.0, impl="triton").double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_triton_nan_and_infinity_stay_in_their_row(device, bad):
    x, weight = torch.randn(3, 40, device=device), torch.ones(40, device=device)
    x[1, 7] = bad
    y = rms_norm(x, weight, eps=1e-5, impl="triton")
    assert y[1, 7].isnan()
    assert y[[0, 2]].isfinite().all()


def test_triton_gradients_by_differences(device):
    x, r, w = (torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
               for shape in ((3, 9), (3, 9), (9,)))
    assert torch.autograd.gradcheck(partial(rms_norm, eps=1e-5, impl="triton"), (x, w))
    assert torch.autograd.gradcheck(partial(add_rms_norm, eps=1e-5, zero_centered=True, impl="triton"), (x, r, w))


def test_triton_library_contract(device):
    x, r, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((4, 24), (4, 24), (24,)))
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_fwd.default, (x, None, w, 1e-5, 1.0, "triton"))
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_fwd.default, (x, r, w, 1e-5, 0.0, "triton"))
    torch.library.opcheck(torch.ops.engine_kernels.rms_norm_bwd.default,
                          (x.detach(), r.detach(), x.detach(), w.detach(), torch.rand(4, device=device), 0.0, "triton"))


def test_triton_refusals_name_the_argument(device):
    x, weight = torch.randn(4, 24, device=device), torch.randn(24, device=device)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual has shape \(4, 23\), needs \(4, 24\)"):
        add_rms_norm(x, x[:, 1:], weight, eps=1e-5, impl="triton")
    with pytest.raises(RuntimeError, match=r"residual is torch\.bfloat16, but x is torch\.float32"):
        add_rms_norm(x, x.bfloat16(), weight, eps=1e-5, impl="triton")
    with pytest.raises(RuntimeError, match="weight is on meta"):
        rms_norm(x, weight.to("meta"), eps=1e-5, impl="triton")
