"""causal_attention against float64, and no further from it than twice torch's own kernel."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.attention import causal_attention, causal_attention_reference

DTYPES = [torch.float32, torch.bfloat16]
WORST = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # relative, in the 2-norm; bf16 also rounds the probabilities


def inputs(b, h, g, s, d, dtype, scale=1.0):
    """q, k, v and the gradient of the result."""
    qkv = [torch.randn(b, heads, s, d).mul(scale).to(dtype) for heads in (h, g, g)]
    return [*qkv, torch.randn(b, h, s, d).to(dtype)]


def results(function, q, k, v, dout):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors(function, q, k, v, dout, floor_share=1.0):
    """Errors of the result and of dq, dk, dv, relative to each or to `floor_share` of the largest of the four.

    The floor is for small shapes, where dq and dk cancel to (almost) nothing: bf16 rounds the result that enters them.
    """
    exact = results(partial(causal_attention_reference, scale=q.shape[-1] ** -0.5),
                    *(t.double() for t in (q, k, v, dout)))
    floor = floor_share * torch.stack([e.norm() for e in exact]).max()
    ours = results(function, q, k, v, dout)
    return [((x.double() - e).norm() / e.norm().clamp(min=floor)).item() for x, e in zip(ours, exact, strict=True)]


kernel = partial(causal_attention, impl="cpu")


def assert_accurate(case):
    assert max(errors(kernel, *case)) < WORST[case[0].dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "h", "g", "s", "d"), [
    (2, 4, 2, 130, 64), (1, 3, 3, 65, 40), (1, 6, 1, 64, 128), (3, 2, 1, 1, 8), (1, 1, 1, 7, 1), (2, 2, 2, 63, 33),
])
def test_values_and_gradients(threads, dtype, b, h, g, s, d):
    assert_accurate(inputs(b, h, g, s, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(instruction_set, dtype):
    assert_accurate(inputs(2, 4, 2, 100, 72, dtype))


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 2), g=st.integers(1, 2), m=st.integers(1, 3), s=st.integers(1, 150), d=st.integers(1, 70),
       dtype=st.sampled_from(DTYPES))
def test_any_shape(b, g, m, s, d, dtype):
    assert_accurate(inputs(b, g * m, g, s, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_no_worse_than_twice_torch(dtype, scale):
    case = inputs(1, 4, 2, 300, 64, dtype, scale)
    torchs = errors(partial(causal_attention, impl="torch"), *case, floor_share=0)
    for ours, theirs in zip(errors(kernel, *case, floor_share=0), torchs, strict=True):
        assert ours <= 2 * theirs + 1e-7


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 8), (2, 2, 1, 0, 8)])
def test_empty(shape):
    case = inputs(*shape, torch.float32)
    for ours, t in zip(results(kernel, *case), (case[0], *case[:3]), strict=True):
        assert ours.shape == t.shape


def test_strided_inputs_and_gradient():
    fused = torch.randn(70, 2, 4, 3 * 32)  # [s, b, h, 3 d]: views, as of an unsplit projection
    q, k, v = (t.permute(1, 2, 0, 3) for t in fused.split(32, -1))
    dout = torch.randn(32, 70, 2, 4).permute(2, 3, 1, 0)
    for views, plain in zip(results(kernel, q, k[:, ::2], v[:, ::2], dout),
                            results(kernel, *(t.contiguous() for t in (q, k[:, ::2], v[:, ::2], dout))), strict=True):
        assert torch.equal(views, plain)
    x = q.contiguous().requires_grad_()
    kernel(x, k, v).sum().backward()  # an expanded gradient, all strides 0
    exact = q.double().requires_grad_()
    causal_attention_reference(exact, k.double(), v.double(), 32**-0.5).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_result_is_a_view_for_the_output_projection():
    q, k, v, _ = inputs(2, 4, 2, 70, 32, torch.float32)
    out = kernel(q, k, v)
    projected_sbn = out.permute(2, 0, 1, 3).reshape(70, 2, 128)
    assert projected_sbn.is_contiguous()
    assert projected_sbn.data_ptr() == out.data_ptr()


def test_scores_of_ten_thousand():
    q, k, v, _ = inputs(1, 1, 1, 90, 16, torch.float32, 100.0)
    exact = causal_attention_reference(q.double(), k.double(), v.double(), 1.0)
    ours = kernel(q, k, v, scale=1.0)
    assert ours.isfinite().all()
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-3  # scores of 1e4 carry an error of 1e-3 in fp32


def test_the_future_is_not_read():
    q, k, v, _ = inputs(1, 2, 1, 200, 32, torch.float32)
    before = kernel(q, k, v)
    k[:, :, 100:], v[:, :, 100:] = 1e6, -1e6
    assert torch.equal(kernel(q, k, v)[:, :, :100], before[:, :, :100])


def test_nan_in_a_query_stays_in_its_row():
    q, k, v, _ = inputs(1, 2, 1, 80, 32, torch.float32)
    q[0, 1, 66, 3] = float("nan")
    rows = kernel(q, k, v).isnan().any(-1)
    assert rows.nonzero().tolist() == [[0, 1, 66]]


def test_gradients_do_not_depend_on_the_number_of_threads():
    case = inputs(2, 4, 2, 130, 32, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = results(kernel, *case)
    torch.set_num_threads(2)
    two = results(kernel, *case)
    torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


def test_torch_library_contract_and_compile():
    q, k, v, dout = inputs(1, 2, 1, 10, 8, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.engine_kernels.causal_attention_fwd.default, (*leaves, 0.3))
    out, lse = torch.ops.engine_kernels.causal_attention_fwd(q, k, v, 0.3)
    torch.library.opcheck(torch.ops.engine_kernels.causal_attention_bwd.default, (dout, q, k, v, out, lse, 0.3))
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, q, k, v, dout), results(kernel, q, k, v, dout)))


def test_shapes_that_do_not_fit_are_named():
    q = torch.randn(1, 4, 6, 8)
    for k, v in ((q[:, :3], q[:, :3]), (q[:, :2], q[:, :1]), (q[:, :2, :5], q[:, :2, :5])):
        with pytest.raises(ValueError, match="g dividing h"):
            causal_attention(q, k, v)
