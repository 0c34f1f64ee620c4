"""Carrying tokens to their experts' rows and back, against float64 index arithmetic."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.moe_permute import permute, permute_reference, unpermute, unpermute_reference
from engine_kernels.moe_sort import sort_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HERE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(9, 5, 3, 40), (1, 1, 1, 1), (4, 8, 2, 1030), (0, 4, 2, 8), (6, 12, 9, 33), (5, 4, 2, 16)]


def places(t: int, e: int, k: int, *, full: bool):
    """Where k (``full``), or 0 to k, choices of each token go; how many there are; and the experts chosen."""
    rank_te = torch.rand(t, e).argsort(1).argsort(1)
    mask_te = (rank_te < (k if full else torch.randint(0, k + 1, (t, 1)))).to(HERE)
    counts_e, place_tk, expert_tk = sort_mask(mask_te, k, impl="torch")
    return place_tk, int(counts_e.sum()), expert_tk



def permutes(place_tk, rows, expert_tk=None, impl="triton"):
    def run(function, **options):
        def call(x_th, weights=None):
            y_ph, carried_p = function(x_th, place_tk, rows, weights, expert_tk, **options)
            return y_ph if carried_p is None else (y_ph, carried_p)
        return call
    return run(permute, impl=impl), run(permute_reference)


def unpermutes(place_tk, impl="triton"):
    return (lambda y_ph, w=None: unpermute(y_ph, place_tk, w, impl=impl),
            lambda y_ph, w=None: unpermute_reference(y_ph, place_tk, w))


def normal(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=HERE, dtype=dtype)


def scatter(x_th, place_tk, rows):
    """By hand."""
    y_ph = torch.zeros(rows, x_th.shape[1], dtype=x_th.dtype, device=x_th.device)
    for token, row in enumerate(place_tk.tolist()):
        for place in row:
            if place >= 0:
                y_ph[place] = x_th[token]
    return y_ph


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("full", [True, False])
def test_by_hand(impl, full):
    place_tk, rows, expert_tk = places(7, 5, 3, full=full)
    x_th, weights_te = normal(7, 12), normal(7, 5)
    y_ph, carried_p = permute(x_th, place_tk, rows, weights_te, expert_tk, impl=impl)
    assert torch.equal(y_ph, scatter(x_th, place_tk, rows))
    assert carried_p is not None
    back_th = unpermute(y_ph, place_tk, impl=impl)
    for token in range(7):
        row, experts = place_tk[token].tolist(), expert_tk[token].tolist()
        for place, expert in zip(row, experts, strict=True):
            assert place < 0 or carried_p[place] == weights_te[token, expert]
        torch.testing.assert_close(back_th[token], x_th[token] * sum(place >= 0 for place in row))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("t", "e", "k", "h"), SIZES)
def test_triton_values_and_gradients(compare, t, e, k, h, full, dtype):
    place_tk, rows, expert_tk = places(t, e, k, full=full)
    width = place_tk.shape[1]
    compare(*permutes(place_tk, rows), normal(t, h, dtype=dtype), summed=3.0)
    compare(*permutes(place_tk, rows), normal(t, h, dtype=dtype), normal(t, width), summed=3.0)
    compare(*permutes(place_tk, rows, expert_tk), normal(t, h, dtype=dtype), normal(t, e), summed=3.0)
    compare(*unpermutes(place_tk), normal(rows, h, dtype=dtype), summed=3.0)
    compare(*unpermutes(place_tk), normal(rows, h, dtype=dtype), normal(t, width), summed=h**0.5 * 4)


@settings(max_examples=20, deadline=None)
@given(t=st.integers(0, 12), e=st.integers(1, 12), share=st.floats(0, 1), h=st.integers(1, 70), full=st.booleans(),
       scale=st.sampled_from([1e-30, 1.0, 1e30]), seed=st.integers(0, 2**31))
def test_triton_any_shape(t, e, share, h, full, scale, seed):
    torch.manual_seed(seed)
    place_tk, rows, expert_tk = places(t, e, 1 + int(share * (e - 1)), full=full)
    x_th, weights_te = scale * normal(t, h), normal(t, e)
    ours = permute(x_th, place_tk, rows, weights_te, expert_tk, impl="triton")
    exact = permute_reference(x_th, place_tk, rows, weights_te, expert_tk)
    assert torch.equal(ours[0], exact[0])
    assert ours[1] is not None
    assert exact[1] is not None
    assert torch.equal(ours[1], exact[1])
    y_ph, weights_tk = scale * normal(rows, h), normal(*place_tk.shape)
    for weights in (None, weights_tk):
        exact = unpermute_reference(y_ph.double(), place_tk, weights)
        torch.testing.assert_close(unpermute(y_ph, place_tk, weights, impl="triton").double(), exact,
                                   rtol=1e-5, atol=3e-6 * scale)


def test_triton_strided(compare):
    place_tk, rows, _ = places(6, 5, 3, full=False)
    ours, reference = permutes(place_tk, rows)
    back, reference_back = unpermutes(place_tk)
    for view in (lambda x: x[:6, :20], lambda x: x[:6, ::2], lambda x: x.t()[:6, :20]):
        compare(lambda x, w, v=view: ours(v(x), v(w)[:, :3]), lambda x, w, v=view: reference(v(x), v(w)[:, :3]),
                normal(40, 40), normal(40, 40), summed=3.0)
    for view in (lambda x: x[:rows, :20], lambda x: x[:rows, ::2], lambda x: x.t()[:rows, :20]):
        compare(lambda y, w, v=view: back(v(y), v(w)[:6, :3]).t(),
                lambda y, w, v=view: reference_back(v(y), v(w)[:6, :3]).t(),
                normal(40, 40), normal(40, 40), summed=20.0)


def test_triton_sums_in_fp32_and_rounds_once():
    """256 + eight times 1 in bf16: adding one by one in bf16 stays at 256."""
    place_tk = torch.arange(9, device=HERE)[None]
    y_ph = torch.ones(9, 4, device=HERE, dtype=torch.bfloat16)
    y_ph[0] = 256
    assert unpermute(y_ph, place_tk, impl="triton").tolist() == [[264.0] * 4]


def test_a_row_without_a_place_in_y_is_no_ones():
    """Not-a-numbers in rows that no token has, and in weights behind a token's last place, reach nothing."""
    place_tk = torch.tensor([[2, -1], [0, 3]], device=HERE)
    y_ph = normal(5, 6)
    y_ph[[1, 4]] = float("nan")
    for impl in ("torch", "triton"):
        assert unpermute(y_ph, place_tk, impl=impl).isfinite().all()
        assert unpermute(y_ph, place_tk, normal(2, 2), impl=impl).isfinite().all()


def test_triton_is_deterministic():
    place_tk, rows, _ = places(64, 8, 3, full=True)
    y_ph, weights_tk = normal(rows, 40).requires_grad_(), normal(64, 3).requires_grad_()
    dx_th, kept = normal(64, 40), []
    for _ in range(3):
        x_th = unpermute(y_ph, place_tk, weights_tk, impl="triton")
        kept.append([x_th, *torch.autograd.grad(x_th, (y_ph, weights_tk), dx_th)])
    assert all(torch.equal(a, b) for other in kept[1:] for a, b in zip(kept[0], other, strict=True))


@pytest.mark.parametrize("full", [True, False])
def test_triton_gradients_by_differences(full):
    place_tk, rows, expert_tk = places(3, 4, 2, full=full)
    x_th, y_ph, weights_te, weights_tk = (normal(*shape, dtype=torch.float64).requires_grad_()
                                          for shape in ((3, 3), (rows, 3), (3, 4), (3, 2)))
    assert torch.autograd.gradcheck(permutes(place_tk, rows, expert_tk)[0], (x_th, weights_te))
    assert torch.autograd.gradcheck(permutes(place_tk, rows)[0], (x_th, weights_tk))
    if rows:
        assert torch.autograd.gradcheck(unpermutes(place_tk)[0], (y_ph, weights_tk))
        assert torch.autograd.gradcheck(unpermutes(place_tk)[0], (y_ph,))


def test_triton_library_contract():
    place_tk, rows, expert_tk = places(4, 5, 2, full=True)
    x_th, y_ph, weights_te, weights_tk = (normal(*shape).requires_grad_()
                                          for shape in ((4, 6), (rows, 6), (4, 5), (4, 2)))
    ops = torch.ops.engine_kernels
    torch.library.opcheck(ops.moe_permute_fwd.default, (x_th, place_tk, rows, None, None))
    torch.library.opcheck(ops.moe_permute_fwd.default, (x_th, place_tk, rows, weights_tk, None))
    torch.library.opcheck(ops.moe_permute_fwd.default, (x_th, place_tk, rows, weights_te, expert_tk))
    torch.library.opcheck(ops.moe_unpermute_fwd.default, (y_ph, place_tk, None))
    torch.library.opcheck(ops.moe_unpermute_fwd.default, (y_ph, place_tk, weights_tk))
    torch.library.opcheck(ops.moe_permute_bwd.default, (y_ph.detach(), normal(rows), place_tk, expert_tk, 5))
    torch.library.opcheck(ops.moe_unpermute_bwd.default, (x_th.detach(), y_ph.detach(), place_tk, weights_tk.detach()))


def test_refusals_name_the_argument():
    place_tk, rows, expert_tk = places(4, 5, 2, full=True)
    x_th = normal(4, 6)
    run = partial(permute, impl="triton")
    with pytest.raises(ValueError, match=r"permute: place_tk has shape \(4, 2\), needs \(3, 2\)"):
        run(x_th[1:], place_tk, rows)
    with pytest.raises(ValueError, match=r"permute: weights has shape \(4, 5\), needs \(4, 2\)"):
        run(x_th, place_tk, rows, normal(4, 5))
    with pytest.raises(ValueError, match=r"permute: expert_tk has shape \(4, 1\), needs \(4, 2\)"):
        run(x_th, place_tk, rows, normal(4, 5), expert_tk[:, :1])
    with pytest.raises(ValueError, match=r"unpermute: weights_tk has shape \(4, 5\), needs \(4, 2\)"):
        unpermute(normal(rows, 6), place_tk, normal(4, 5), impl="triton")
    with pytest.raises(RuntimeError, match=r"x_th is torch\.int32, needs float32"):
        run(x_th.int(), place_tk, rows)
    with pytest.raises(RuntimeError, match="place_tk is on meta"):
        unpermute(normal(rows, 6), place_tk.to("meta"), impl="triton")
