"""Rotary embedding of queries and keys against float64 and complex numbers, and what autograd makes of it in place."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.rotary import rotary, rotary_, rotary_reference

DTYPES = [torch.float32, torch.bfloat16]
GPU = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]  # two rows of packed documents


def angles(*rows_and_pairs, dtype=torch.float32):
    theta = torch.rand(rows_and_pairs, device=GPU, dtype=dtype) * 1000
    return theta.cos(), theta.sin()


def by_hand(x_bshd, theta_bsr, interleaved):
    """Each pair as a complex number times e^(i theta), in float64."""
    x, r = x_bshd.double(), theta_bsr.shape[-1]
    pairs = x[..., : 2 * r].unflatten(-1, (r, 2) if interleaved else (2, r))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * torch.exp(1j * theta_bsr.double())[:, :, None]
    parts = torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((parts, x[..., 2 * r :]), -1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", ["s", "sb", "positions"])
def test_equals_complex_numbers(impl, interleaved, rows):
    b, s, r = 2, 7, 6
    at = {"s": torch.arange(s).expand(b, s), "sb": torch.randint(0, 50, (b, s)), "positions": torch.tensor(POSITIONS)}
    theta = torch.outer(torch.arange(50.0), 10 ** -torch.linspace(0, 2, r)).double()
    at_bs, table = at[rows], (theta.cos().float().to(GPU), theta.sin().float().to(GPU))
    cos, sin = {"s": [t[:s] for t in table], "sb": [t[at_bs.t()] for t in table], "positions": table}[rows]
    q, k = torch.randn(b, s, 4, 16, device=GPU), torch.randn(b, s, 2, 16, device=GPU)
    options = {"positions": at_bs.to(GPU)} if rows == "positions" else {}
    for ours, x in zip(rotary(q, k, cos, sin, interleaved=interleaved, impl=impl, **options), (q, k), strict=True):
        torch.testing.assert_close(ours.cpu().double(), by_hand(x.cpu(), theta[at_bs], interleaved), rtol=0, atol=2e-6)


SHAPES = [(2, 16, 4, 2, 64, 32), (3, 5, 4, 1, 10, 5), (1, 7, 3, 3, 24, 4), (1, 1, 1, 1, 2, 1), (2, 3, 2, 2, 8, 0),
          (2, 0, 1, 1, 8, 4), (0, 4, 1, 1, 8, 4), (2, 33, 3, 1, 17, 8), (1, 2, 2, 1, 300, 100), (1, 3, 5, 2, 128, 64)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("b", "s", "h", "g", "d", "r"), SHAPES)
def test_values_and_gradients(compare, dtype, interleaved, b, s, h, g, d, r):
    cos, sin = angles(s, r)
    q, k = (torch.randn(b, s, heads, d, dtype=dtype, device=GPU) for heads in (h, g))

    def in_place(q, k):
        return rotary_(q * 1, k * 1, cos, sin, interleaved=interleaved, impl="triton")

    def plain(q, k):
        return tuple(rotary_reference(x, cos[:, None], sin[:, None], interleaved=interleaved) for x in (q, k))

    compare(lambda q, k: rotary(q, k, cos, sin, interleaved=interleaved, impl="triton"), plain, q, k)
    compare(in_place, plain, q, k)


@settings(max_examples=15, deadline=None)
@given(s=st.integers(1, 12), b=st.integers(1, 3), h=st.integers(1, 5), g=st.integers(1, 3), d=st.integers(1, 40),
       interleaved=st.booleans(), scale=st.sampled_from([1e-30, 1.0, 1e30]), data=st.data())
def test_any_shape(s, b, h, g, d, interleaved, scale, data):
    r = data.draw(st.integers(0, d // 2))
    places = torch.randint(0, 9, (b, s), device=GPU)
    cos, sin = angles(9, r)
    q, k = (torch.randn(b, s, heads, d, device=GPU) * scale for heads in (h, g))
    exact = rotary(q.double(), k.double(), cos, sin, positions=places, interleaved=interleaved, impl="torch")
    ours = rotary(q, k, cos, sin, positions=places, interleaved=interleaved, impl="triton")
    rotary_(q, k, cos, sin, positions=places, interleaved=interleaved, impl="triton")
    for new, turned, expected in zip(ours, (q, k), exact, strict=True):
        torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-6 * scale)
        assert torch.equal(new, turned)


VIEWS = {
    "[s, b, h, d] in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "[b, h, s, d] in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns of a wider tensor": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second head": lambda x: torch.repeat_interleave(x, 2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_in_any_strides_leaves_the_rest_alone(view, interleaved):
    cos, sin = angles(7, 5)
    x_q, x_k = torch.randn(2, 7, 4, 12, device=GPU), torch.randn(2, 7, 2, 12, device=GPU)
    q, k = VIEWS[view](x_q), VIEWS[view](x_k)
    around = [(x, x._base if x._base is not None else x) for x in (q, k)]
    before = [base.clone() for _, base in around]
    expected = rotary(x_q, x_k, cos, sin, interleaved=interleaved, impl="torch")
    turned = rotary_(q, k, cos, sin, interleaved=interleaved, impl="triton")
    assert turned[0] is q
    assert turned[1] is k
    for (x, base), old, y in zip(around, before, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        assert torch.equal(x[..., 10:], y[..., 10:])
        x.copy_(torch.as_strided(old, x.shape, x.stride(), x.storage_offset()))  # all else is as it was
        assert torch.equal(base, old)


@pytest.mark.parametrize("view", VIEWS)
def test_new_tensors_from_any_strides_and_gradients_in_any_order(compare, view):
    cos, sin = angles(5, 3, 4)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 1, 3)):
        def ours(q, k, order=order):
            return tuple(x.permute(order) for x in rotary(VIEWS[view](q), VIEWS[view](k), cos, sin, impl="triton"))

        def plain(q, k, order=order):
            turn = [t.transpose(0, 1)[:, :, None] for t in (cos, sin)]
            return tuple(rotary_reference(x, *turn).permute(order) for x in (q, k))

        compare(ours, plain, torch.randn(3, 5, 4, 10, device=GPU), torch.randn(3, 5, 2, 10, device=GPU))


def test_a_last_dimension_with_gaps(device):
    cos, sin = angles(5, 4)
    q, k = torch.randn(2, 5, 3, 16, device=device)[..., ::2], torch.randn(2, 5, 8, 1, device=device).transpose(2, 3)
    for ours, x in zip(rotary(q, k, cos, sin, impl="triton"), (q, k), strict=True):
        torch.testing.assert_close(ours, rotary_reference(x, cos[:, None], sin[:, None]), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="q_bshd's last dimension has stride 2, needs 1; use rotary"):
        rotary_(q, k, cos, sin, impl="triton")


def test_order_in_memory_is_kept(device):
    cos, sin = angles(5, 4)
    q, k = torch.randn(2, 5, 3, 8, device=device), torch.randn(5, 2, 1, 8, device=device).transpose(0, 1)
    new_q, new_k = rotary(q, k, cos, sin, impl="triton")
    assert new_q.is_contiguous()
    assert new_k.transpose(0, 1).is_contiguous()


def test_equals_transformers(device):
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    cohere = importlib.import_module("transformers.models.cohere.modeling_cohere")
    cos, sin = angles(12, 16)
    q, k = torch.randn(2, 12, 4, 32, device=device), torch.randn(2, 12, 2, 32, device=device)
    for module, interleaved in ((llama, False), (cohere, True)):
        table = [(t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1))[None] for t in (cos, sin)]
        expected = module.apply_rotary_pos_emb(q, k, *table, unsqueeze_dim=2)
        for ours, theirs in zip(rotary(q, k, cos, sin, interleaved=interleaved, impl="triton"), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_gradient_that_others_hold_is_left_alone(device, impl):
    """dq arrives as the caller's own tensor, and as the one that the sum hands to its other branch."""
    cos, sin = angles(5, 4)
    q, k = (torch.randn(2, 5, heads, 8, device=device, requires_grad=True) for heads in (3, 1))
    given, other = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 3, 8, device=device, requires_grad=True)
    kept = given.clone()
    for op in (rotary, rotary_):
        turned, _ = op(q * 1, k * 1, cos, sin, impl=impl)
        dq, dother = torch.autograd.grad(turned + other, (q, other), given)
        assert torch.equal(given, kept)
        assert torch.equal(dother, kept)
        torch.testing.assert_close(dq, rotary_reference(kept, cos[:, None], -sin[:, None]), rtol=1e-6, atol=1e-6)


def test_autograd_knows_the_new_value_in_place(device):
    """A use afterwards sees the turned queries, and a node that saved the old ones refuses."""
    cos, sin = angles(5, 4)
    q, k = (torch.randn(2, 5, heads, 8, device=device, requires_grad=True) for heads in (3, 1))
    mine = q * 2
    rotary_(mine, k * 1, cos, sin, impl="triton")
    (mine * 3).sum().backward()  # by the old name
    expected = rotary_reference(torch.full_like(q, 6.0), cos[:, None], -sin[:, None])
    torch.testing.assert_close(q.grad, expected, rtol=1e-6, atol=1e-6)
    saved = q.exp()  # its backward needs what it returned
    turned, _ = rotary_(saved, k * 1, cos, sin, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        turned.sum().backward()


def test_in_place_where_autograd_cannot_follow_is_refused(device):
    cos, sin = angles(5, 4)
    leaf = torch.randn(2, 5, 3, 8, device=device, requires_grad=True)
    result, k = leaf * 1, torch.randn(2, 5, 1, 8, device=device)
    with pytest.raises(ValueError, match=r"rotary_: q_bshd is a leaf that needs a gradient, .*; use rotary"):
        rotary_(leaf, k, cos, sin, impl="triton")
    with pytest.raises(ValueError, match=r"rotary_: q_bshd is a view of another tensor, .*; use rotary"):
        rotary_(result[:, :, :2], k, cos, sin, impl="triton")
    with pytest.raises(ValueError, match="rotary_: k_bsgd is a view"):
        rotary_(result, k[:, :, :1], cos, sin, impl="triton")
    with torch.no_grad():
        rotary_(leaf[:, :, :2], k, cos, sin, impl="triton")
    with torch.inference_mode():
        rotary_(torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 1, 8, device=device), cos, sin, impl="triton")


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_by_differences(device, interleaved):
    cos, sin = angles(2, 1, dtype=torch.float64)
    q, k = (torch.randn(1, 2, heads, 3, dtype=torch.float64, device=device, requires_grad=True) for heads in (2, 1))
    for op in (rotary, rotary_):
        assert torch.autograd.gradcheck(
            lambda q, k, op=op: op(q * 1, k * 1, cos, sin, interleaved=interleaved, impl="triton"), (q, k))


def test_nan_stays_in_its_pair(device):
    q, k = torch.randn(1, 2, 1, 8, device=device), torch.randn(1, 2, 1, 8, device=device)
    q[0, 1, 0, 1] = float("nan")
    for interleaved, other in ((False, 5), (True, 0)):
        turned, keys = rotary(q, k, *angles(2, 4), interleaved=interleaved, impl="triton")
        assert sorted(turned.isnan().nonzero()[:, 3].tolist()) == sorted([1, other])
        assert not keys.isnan().any()


def test_torch_library_contract(device):
    cos, sin = angles(9, 4)
    places = torch.randint(0, 9, (2, 5), device=device)
    q, k = (torch.randn(2, 5, heads, 8, device=device, requires_grad=True) for heads in (3, 1))
    torch.library.opcheck(torch.ops.engine_kernels.rotary.default, (q, k, cos, sin, places, True, False))
    torch.library.opcheck(torch.ops.engine_kernels.rotary.default, (q, k, cos[:5], sin[:5], None, False, True))
    torch.library.opcheck(torch.ops.engine_kernels.rotary_.default,
                          (q.detach(), k.detach(), cos[:5], sin[:5], None, False))


@pytest.mark.parametrize("op", [rotary, rotary_])
def test_torch_compile(device, op):
    cos, sin = angles(5, 4)
    q, k = (torch.randn(2, 5, heads, 8, device=device, requires_grad=True) for heads in (3, 1))

    def loss(q, k):
        mine, keys = q * 2, k * 2
        new_q, new_k = op(mine, keys, cos, sin, impl="triton")
        return (new_q * new_k + mine).square().sum()  # in place: `mine` is turned as well

    expected = torch.autograd.grad(loss(q, k), (q, k))
    ours = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k), (q, k))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_refusals_name_the_argument(device):
    cos, sin = angles(5, 4)
    q, k = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 1, 8, device=device)
    with pytest.raises(ValueError, match=r"rotary: k_bsgd has shape \(2, 4, 1, 8\), needs \[2, 5, groups, 8\]"):
        rotary(q, k[:, 1:], cos, sin)
    for bad in (angles(4, 4), angles(5, 5), (cos, sin[:, 1:]), angles(2, 5, 4)):
        with pytest.raises(ValueError, match=r"must be \[5, r\] or \[5, 2, r\] with 2 r <= 8"):
            rotary(q, k, *bad)
    for bad in (torch.zeros(5, 2, dtype=torch.int64), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"positions are torch.\w+ \(\d, \d\), need integers \[2, 5\]"):
            rotary_(q, k, cos, sin, positions=bad)
    with pytest.raises(RuntimeError, match=r"k is torch\.bfloat16, but q is torch\.float32"):
        rotary(q, k.bfloat16(), cos, sin, impl="triton")
    with pytest.raises(RuntimeError, match="rotary_: impl=\"triton\" cannot run: sin is on meta"):
        rotary_(q, k, cos, sin.to("meta"), impl="triton")
    with pytest.raises(ValueError, match='rotary: impl must be one of "auto", "torch", "triton", not \'cpu\''):
        rotary(q, k, cos, sin, impl="cpu")
