"""causal_attention against float64, and no further from it than twice torch's own kernel."""

from __future__ import annotations

import math
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


def seen_by(function, window, with_sinks):
    """`function` and the formula, each as a function of q, k, v and the sinks."""
    def ours(q, k, v, sinks):
        return function(q, k, v, window=window, sinks=sinks if with_sinks else None)

    def exact(q, k, v, sinks):
        return causal_attention_reference(q, k, v, q.shape[-1] ** -0.5, window, sinks if with_sinks else None)

    return ours, exact


def gradients(function, inputs, dout):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_sees_the_same(function, b, h, g, s, t, d, window, with_sinks, dtype):
    """Values and gradients, sinks' included, against the formula in float64; relative to the largest of them."""
    inputs = [torch.randn(shape).to(dtype) for shape in ((b, h, s, d), (b, g, t, d), (b, g, t, d), (h,))]
    dout = torch.randn(b, h, s, d).to(dtype)
    ours, exact = seen_by(function, window, with_sinks)
    expected = gradients(exact, [x.double() for x in inputs], dout.double())
    found = gradients(ours, inputs, dout)
    assert len(found) == len(expected) == (5 if with_sinks else 4)
    largest = max(e.norm() for e in expected)
    for x, e in zip(found, expected, strict=True):
        assert x.shape == e.shape
        assert (x.double() - e).norm() <= WORST[dtype] * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "h", "g", "s", "t", "d", "window", "with_sinks"), [
    (2, 4, 2, 65, 200, 33, None, False),  # a chunk of a sequence against what precedes it
    (1, 2, 1, 64, 128, 64, None, True),
    (2, 2, 1, 1, 77, 8, None, True),  # generation
    (1, 4, 2, 130, 130, 40, 5, False),  # windows within a tile, across tiles, of whole tiles
    (1, 2, 1, 130, 263, 16, 70, True),
    (1, 2, 2, 200, 200, 16, 64, True),
    (1, 2, 2, 10, 300, 16, 1, True),
    (1, 2, 1, 63, 64, 8, 1000, False),  # wider than the sequence
])
def test_queries_at_the_end_windows_and_sinks(instruction_set, dtype, b, h, g, s, t, d, window, with_sinks):
    assert_sees_the_same(kernel, b, h, g, s, t, d, window, with_sinks, dtype)


@settings(max_examples=30, deadline=None)
@given(g=st.integers(1, 2), m=st.integers(1, 3), s=st.integers(1, 150), before=st.integers(0, 150),
       d=st.integers(1, 70), window=st.none() | st.integers(1, 200), with_sinks=st.booleans())
def test_any_window_anywhere(g, m, s, before, d, window, with_sinks):
    assert_sees_the_same(kernel, 1, g * m, g, s, s + before, d, window, with_sinks, torch.float32)


@pytest.mark.parametrize(("s", "t"), [(300, 300), (300, 700), (513, 530), (20, 90), (1, 50)])
@pytest.mark.parametrize("window", [None, 1, 100, 130])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_torch_with_windows_and_sinks(s, t, window, with_sinks):
    """Long sequences go by blocks, short ones by a mask."""
    assert_sees_the_same(partial(causal_attention, impl="torch"), 2, 4, 2, s, t, 16, window, with_sinks, torch.float32)


def test_a_window_costs_no_quadratic_memory():
    q, k, v, _ = inputs(1, 1, 1, 1 << 15, 8, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        causal_attention(q, k, v, window=64, impl="torch")
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest > 1 << 20, "nothing was measured"
    assert largest < 200 << 20  # a mask of [s, s] alone would be 1 GiB


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_a_sink_takes_what_its_logit_says(impl):
    """Against a single key of score 0, a sink of logit ln 3 takes three quarters; a very low one takes nothing."""
    q, k, v = torch.zeros(1, 2, 1, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    sinks = torch.tensor([math.log(3.0), -60.0])
    out = causal_attention(q, k, v, sinks=sinks, impl=impl)
    torch.testing.assert_close(out[0, 0], v[0, 0] / 4)
    torch.testing.assert_close(out[0, 1], v[0, 0])


def test_dropout_keeps_the_mean():
    q, k, v, _ = inputs(1, 1, 1, 40, 8, torch.float32)
    exact = causal_attention(q, k, v, window=7)
    torch.manual_seed(0)
    many = torch.stack([causal_attention(q, k, v, window=7, dropout=0.3) for _ in range(400)])
    assert many.std(0).max() > 0.1
    assert (many.mean(0) - exact).abs().max() < 6 * many.std(0).max() / 20


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
    sinks = torch.randn(2, requires_grad=True)
    for options in ((None, None, 0.3, 10, 1), (sinks, None, 0.3, 4, 1)):
        torch.library.opcheck(torch.ops.engine_kernels.causal_attention_fwd.default, (*leaves, *options))
    out, lse = torch.ops.engine_kernels.causal_attention_fwd(q, k, v, None, None, 0.3, 10, 1)
    torch.library.opcheck(torch.ops.engine_kernels.causal_attention_bwd.default,
                          (dout, q, k, v, out, lse, None, 0.3, 10, 1))
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, q, k, v, dout), results(kernel, q, k, v, dout)))


def test_shapes_that_do_not_fit_are_named():
    q = torch.randn(1, 4, 6, 8)
    for k, v in ((q[:, :3], q[:, :3]), (q[:, :2], q[:, :1]), (q[:, :2, :5], q[:, :2, :5])):
        with pytest.raises(ValueError, match="g dividing h and s <= t"):
            causal_attention(q, k, v)
    for window, sinks in ((0, None), (None, torch.zeros(2))):
        with pytest.raises(ValueError, match="one for each of 4 heads"):
            causal_attention(q, q, q, window=window, sinks=sinks)
