"""split_qkv_rotary against float64 and Megatron, and what autograd makes of keys that turn inside the projection."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from engine_kernels.qkv_rotary import split_qkv_rotary, split_qkv_rotary_reference

DTYPES = [torch.float32, torch.bfloat16]


def angles(*rows_and_pairs: int, at: str = "cpu"):
    theta = torch.rand(rows_and_pairs, device=at) * 1000
    return theta.cos(), theta.sin()


def pair(cos, sin, g, m, d, **options) -> tuple[Callable, Callable]:
    """The kernel and the reference as functions of the projection alone."""
    layout: dict[str, Any] = {"num_groups": g, "queries_per_group": m, "head_dim": d}
    return (lambda x: split_qkv_rotary(x, cos, sin, **layout, **{"impl": "cpu", **options}),
            lambda x: split_qkv_rotary_reference(x, cos, sin, **layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "b", "g", "m", "d", "r"), [
    (16, 2, 2, 2, 64, 32), (5, 3, 1, 4, 10, 5), (7, 1, 3, 1, 24, 4), (1, 1, 1, 1, 2, 1), (3, 2, 2, 1, 8, 0),
    (0, 2, 1, 1, 8, 4), (4, 0, 1, 1, 8, 4), (33, 2, 1, 3, 17, 8),
])
def test_values_and_gradients(compare, threads, dtype, s, b, g, m, d, r):
    compare(*pair(*angles(s, r), g, m, d), torch.randn(s, b, g * (m + 2) * d, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(compare, instruction_set, dtype):
    compare(*pair(*angles(9, 20), 2, 3, 50), torch.randn(9, 2, 500, dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(s=st.integers(1, 12), b=st.integers(1, 3), g=st.integers(1, 3), m=st.integers(1, 3), d=st.integers(1, 40),
       data=st.data())
def test_any_shape(s, b, g, m, d, data):
    cos, sin = angles(s, data.draw(st.integers(0, d // 2)))
    x = torch.randn(s, b, g * (m + 2) * d)
    kernel, reference = pair(cos, sin, g, m, d)
    for ours, exact in zip(kernel(x), reference(x.double()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        assert ours.is_contiguous()


def test_positions_of_their_own_for_each_sequence(compare):
    compare(*pair(*angles(6, 3, 8), 2, 2, 16), torch.randn(6, 3, 2 * 4 * 16))


def test_strided_projection_and_gradients(compare):
    kernel, reference = pair(*angles(6, 8), 2, 2, 16)
    for view in (lambda x: x.transpose(0, 1)[:, :, :128], lambda x: x.transpose(0, 1)[:, :, ::2]):
        def strided(function, x, v=view):  # contiguous outputs, but gradients that arrive transposed
            return tuple(t.permute(3, 2, 1, 0) for t in function(v(x)))
        compare(partial(strided, kernel), partial(strided, reference), torch.randn(4, 6, 256))


def test_angles_as_the_front_half_of_a_repeated_table(compare):
    cos, sin = angles(6, 8)
    table = torch.cat((cos, cos), -1)
    x = torch.randn(6, 2, 4 * 16)
    ours = pair(table[:, :8], sin, 1, 2, 16)[0](x)
    assert all(map(torch.equal, ours, pair(cos, sin, 1, 2, 16)[0](x)))


@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_kernel_equals_megatron(device, impl, rotary_dim):
    megatron = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    s, b, g, m, d = 12, 2, 2, 3, 32
    theta = torch.rand(s, rotary_dim // 2) * 100
    freqs = torch.cat((theta, theta), -1)[:, None, None]
    mixed = torch.randn(s, b, g * (m + 2) * d)
    heads = mixed.view(s, b, g, m + 2, d)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    rope = partial(megatron.apply_rotary_pos_emb, freqs=freqs, config=config, cp_group=object())
    q = rope(heads[:, :, :, :m].reshape(s, b, g * m, d)).permute(1, 2, 0, 3)
    k = rope(heads[:, :, :, m]).permute(1, 2, 0, 3)
    v = heads[:, :, :, m + 1].permute(1, 2, 0, 3)
    at = device if impl == "triton" else "cpu"
    ours = pair(theta.cos().to(at), theta.sin().to(at), g, m, d, impl=impl)[0](mixed.to(at))
    for mine, expected in zip(ours, (q, k, v), strict=True):
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_pair():
    x = torch.randn(2, 1, 3 * 8)
    x[1, 0, 1] = float("nan")
    q, k, v = pair(*angles(2, 4), 1, 1, 8)[0](x)
    assert q.isnan().nonzero().tolist() == [[0, 0, 1, 1], [0, 0, 1, 5]]
    assert not k.isnan().any()
    assert not v.isnan().any()


def test_torch_library_contract():
    cos, sin = angles(5, 4)
    mixed = torch.randn(5, 2, 2 * 4 * 8, requires_grad=True)
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_fwd.default, (mixed, cos, sin, 2, 2, 8, "cpu"))
    grads = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_bwd.default, (*grads, cos, sin, "cpu"))


def test_shapes_that_do_not_fit_are_named():
    mixed = torch.randn(5, 2, 64)
    layout: dict[str, Any] = {"num_groups": 2, "queries_per_group": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=r"65 columns, 2 groups of 2 \+ 2 heads of 8 need 64"):
        split_qkv_rotary(torch.randn(5, 2, 65), *angles(5, 4), **layout)
    for cos, sin in (angles(4, 4), angles(5, 5), (torch.ones(5, 4), torch.ones(5, 3)), angles(2, 5, 4)):
        with pytest.raises(ValueError, match=r"must be \[5, r\]"):
            split_qkv_rotary(mixed, cos, sin, **layout)


# --- Triton: new tensors, and in place -------------------------------------------------------------------------------

SHAPES = [(16, 2, 2, 2, 64, 32), (5, 3, 1, 4, 10, 5), (7, 1, 3, 1, 24, 4), (1, 1, 1, 1, 2, 1), (3, 2, 2, 1, 8, 0),
          (0, 2, 1, 1, 8, 4), (4, 0, 1, 1, 8, 4), (33, 2, 1, 3, 17, 8), (3, 1, 2, 3, 128, 64)]


def triton(cos, sin, g, m, d, in_place):
    """As `pair`; in place on a projection of its own."""
    kernel, reference = pair(cos, sin, g, m, d, impl="triton", in_place=in_place)
    return (lambda x: kernel(x * 1)) if in_place else kernel, reference


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("s", "b", "g", "m", "d", "r"), SHAPES)
def test_triton_values_and_gradients(compare, device, dtype, in_place, s, b, g, m, d, r):
    mixed = torch.randn(s, b, g * (m + 2) * d, dtype=dtype, device=device)
    compare(*triton(*angles(s, r, at=device), g, m, d, in_place), mixed)


@pytest.mark.parametrize("in_place", [False, True])
def test_triton_positions_of_their_own_for_each_sequence(compare, device, in_place):
    cos, sin = angles(6, 3, 8, at=device)
    compare(*triton(cos, sin, 2, 2, 16, in_place), torch.randn(6, 3, 2 * 4 * 16, device=device))


@pytest.mark.parametrize("in_place", [False, True])
def test_triton_strided_projection_and_gradients(compare, device, in_place):
    """In place, a view of another tensor that needs a gradient is left alone: the values are new ones."""
    kernel, reference = pair(*angles(6, 8, at=device), 2, 2, 16, impl="triton", in_place=in_place)
    for view in (lambda x: x.transpose(0, 1)[:, :, :128], lambda x: x.transpose(0, 1)[:, :, ::2]):
        def strided(function, x, v=view):
            return tuple(t.permute(3, 2, 1, 0) for t in function(v(x)))
        compare(partial(strided, kernel), partial(strided, reference), torch.randn(4, 6, 256, device=device))


@settings(max_examples=12, deadline=None)
@given(s=st.integers(1, 12), b=st.integers(1, 3), g=st.integers(1, 3), m=st.integers(1, 3), d=st.integers(1, 40),
       data=st.data())
def test_triton_any_shape(s, b, g, m, d, data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cos, sin = angles(s, data.draw(st.integers(0, d // 2)), at=device)
    mixed = torch.randn(s, b, g * (m + 2) * d, device=device)
    new, reference = triton(cos, sin, g, m, d, False)
    inside = pair(cos, sin, g, m, d, impl="triton", in_place=True)[0](mixed.clone())
    for ours, turned, exact in zip(new(mixed), inside, reference(mixed.double()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours, turned)


def test_in_place_writes_keys_and_nothing_else(device):
    """q is laid out for the output projection, k and v are the projection's own memory, and v has not moved."""
    g, m, d = 2, 3, 8
    mixed = torch.randn(5, 2, g * (m + 2) * d, device=device)
    before = mixed.clone()
    q, k, v = pair(*angles(5, 3, at=device), g, m, d, impl="triton", in_place=True)[0](mixed)
    heads, old = (x.view(5, 2, g, m + 2, d) for x in (mixed, before))
    assert q.permute(2, 0, 1, 3).is_contiguous()
    assert k.data_ptr() == heads[:, :, :, m].data_ptr()
    assert torch.equal(k.permute(2, 0, 1, 3), heads[:, :, :, m])
    assert torch.equal(v.permute(2, 0, 1, 3), old[:, :, :, m + 1])
    heads[:, :, :, m] = old[:, :, :, m]
    assert torch.equal(mixed, before)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_attention_around_it_in_place(device, bias):
    """The chain of the model: the projection's backward does not need its output, attention's needs k and v.

    With a bias the projection is a view of what it really computed.
    """
    seen = []
    g, m, d = 2, 2, 8
    weight, x = torch.randn(g * (m + 2) * d, 12, device=device), torch.randn(6, 2, 12, device=device)
    cos, sin = angles(6, 4, at=device)

    def through(op):
        leaves = [t.clone().requires_grad_() for t in (x, weight, weight[:, 0])[: 2 + bias]]
        mixed = torch.nn.functional.linear(*leaves)
        assert mixed._is_view() == bias
        q, k, v = op(mixed)
        seen.append(k.untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr())
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out.square().sum(), leaves)

    kernel, reference = pair(cos, sin, g, m, d, impl="triton", in_place=True)
    for ours, expected in zip(through(kernel), through(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert seen == [True, False]


def test_who_needs_the_old_projection_is_told(device):
    kernel, _ = pair(*angles(5, 4, at=device), 1, 2, 8, impl="triton", in_place=True)
    x = torch.randn(5, 2, 32, device=device, requires_grad=True)
    for mixed in (x.exp(), x.flatten().exp().view(5, 2, 32)):  # exp's backward needs what it returned
        q, _, _ = kernel(mixed)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            q.sum().backward()
    mixed = x * 2
    q, _, _ = kernel(mixed)
    with pytest.raises(RuntimeError, match="mixed_sbn was used again after its keys had been turned"):
        (q.sum() + mixed.sum()).backward()


def test_in_place_leaves_what_autograd_could_not_follow(device):
    kernel, reference = pair(*angles(5, 4, at=device), 1, 2, 8, impl="triton", in_place=True)
    leaf = torch.randn(5, 2, 32, device=device, requires_grad=True)
    wider = torch.randn(5, 2, 40, device=device, requires_grad=True) * 1
    for mixed in (leaf, leaf[:, :], wider[:, :, :32], leaf.detach()[:, :1].expand(5, 2, 32)):
        before = mixed.detach().clone()
        for ours, expected in zip(kernel(mixed), reference(mixed), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(mixed, before)
    with torch.inference_mode():
        kernel(torch.randn(5, 2, 32, device=device))
    with torch.no_grad():
        _, k, _ = kernel(leaf)
    assert k.data_ptr() == leaf.data_ptr() + 2 * 8 * 4


@pytest.mark.parametrize("used", range(3))
def test_in_place_where_only_one_output_is_used(device, used):
    kernel, reference = pair(*angles(5, 4, at=device), 1, 2, 8, impl="triton", in_place=True)
    x = torch.randn(5, 2, 32, device=device, requires_grad=True)
    ours, expected = (torch.autograd.grad(op(x * 1)[used].square().sum(), x)[0] for op in (kernel, reference))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_recomputed_in_place(device):
    """Activation checkpointing runs the forward pass twice, each time on a projection of its own."""
    kernel, reference = pair(*angles(5, 4, at=device), 1, 2, 8, impl="triton", in_place=True)
    x = torch.randn(5, 2, 32, device=device, requires_grad=True)

    def part(op, x):
        q, k, v = op(x * 2)
        return (q * k * v).sum()

    ours = checkpoint(partial(part, kernel), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(part(reference, x), x))


def test_triton_gradients_by_differences(device):
    cos, sin = angles(2, 1, at=device)
    mixed = torch.randn(2, 1, 3 * 3, dtype=torch.float64, device=device, requires_grad=True)
    for in_place in (False, True):
        assert torch.autograd.gradcheck(triton(cos, sin, 1, 1, 3, in_place)[0], (mixed,))


def test_triton_rounds_as_the_cpu_kernel(device):
    (cos, sin), mixed = angles(9, 8), torch.randn(9, 2, 2 * 4 * 20, dtype=torch.bfloat16)
    theirs = pair(cos, sin, 2, 2, 20)[0](mixed)
    ours = pair(cos.to(device), sin.to(device), 2, 2, 20, impl="triton")[0](mixed.to(device))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2**-7, atol=1e-6)  # at most one rounding apart


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_torch_compile_takes_the_form_without_aliases(device, in_place, dynamic):
    kernel, reference = pair(*angles(5, 4, at=device), 1, 2, 8, impl="triton", in_place=in_place)
    x = torch.randn(5, 2, 32, device=device, requires_grad=True)
    if dynamic:  # as after a compilation for other lengths
        torch._dynamo.maybe_mark_dynamic(x, (0, 1))

    def loss(op, x):
        mixed = x * 2
        q, k, v = op(mixed)
        return (q * k * v).square().sum()

    compiled = torch.compile(partial(loss, kernel), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(reference, x), x),
                               rtol=1e-4, atol=1e-4)


def test_triton_library_contract(device):
    cos, sin = angles(5, 4, at=device)
    mixed = torch.randn(5, 2, 2 * 4 * 8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_fwd.default, (mixed, cos, sin, 2, 2, 8, "triton"))
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_.default, (mixed.detach(), cos, sin, 2, 2, 8))
    grads = (torch.randn(2, heads, 5, 8, device=device) for heads in (4, 2, 2))
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_bwd.default, (*grads, cos, sin, "triton"))


def test_triton_refusals_name_the_argument(device):
    cos, sin = angles(5, 4, at=device)
    layout: dict[str, Any] = {"num_groups": 2, "queries_per_group": 2, "head_dim": 8}
    mixed = torch.randn(5, 2, 64, device=device)
    with pytest.raises(RuntimeError, match=r"mixed is torch\.int64, needs float32, bfloat16, float16 or float64"):
        split_qkv_rotary(mixed.long(), cos, sin, **layout, impl="triton")
    with pytest.raises(RuntimeError, match="cos is on meta"):
        split_qkv_rotary(mixed, cos.to("meta"), sin, **layout, impl="triton")
