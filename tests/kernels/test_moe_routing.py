"""Routing against float64, token by token in plain Python, and where numbers are equal, huge or not numbers."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import jit
from engine_kernels.moe_routing import ROUTERS, route, route_reference

IMPLS = ["torch", "triton"]
KINDS: list[tuple[str, bool]] = [*((router, False) for router in ROUTERS), ("sigmoid", True)]
HERE = "cuda" if torch.cuda.is_available() else "cpu"


def biased(router: str, bias: bool, e: int, device=HERE) -> dict[str, Any]:
    return {"router": router, "expert_bias_e": 0.3 * torch.randn(e, device=device) if bias else None}


def tied(t: int, e: int, device=HERE) -> torch.Tensor:
    """Logits on a coarse grid: every row has equal ones."""
    return torch.randint(-2, 3, (t, e), device=device).float()


def by_hand(logits: list[float], top_k: int, router: str, bias: list[float]) -> tuple[list[int], list[float]]:
    """One token's experts, best first and the lowest of equals, and their weights."""
    scores = [1 / (1 + math.exp(-x)) if router == "sigmoid" else math.exp(x) for x in logits]
    chosen = sorted(range(len(logits)), key=lambda e: -(scores[e] + bias[e]))[:top_k]
    if router == "sigmoid" and top_k == 1:
        return chosen, [scores[chosen[0]]]
    total = sum(scores) if router == "softmax_before_topk" else sum(scores[e] for e in chosen)
    return chosen, [scores[e] / total for e in chosen]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("router", "bias"), KINDS)
def test_equals_the_formula_and_the_lowest_of_equals_is_chosen(device, router, bias, impl):
    t, e, k = 12, 7, 3
    logits_te = tied(t, e)
    bias_e = torch.tensor([0.5, 0.0, 0.5, 0.25, 0.0, 0.5, 0.0], device=device) if bias else None
    found = route(logits_te, top_k=k, router=router, expert_bias_e=bias_e, scaling_factor=1.5, impl=impl)
    for i, row in enumerate(logits_te.tolist()):
        chosen, weights = by_hand(row, k, router, [0.0] * e if bias_e is None else bias_e.tolist())
        assert found.chosen[i].tolist() == chosen
        assert found.weights[i].tolist() == pytest.approx([1.5 * w for w in weights], rel=1e-5)


@pytest.mark.parametrize(("router", "bias"), KINDS)
@pytest.mark.parametrize(("t", "e", "k", "b", "dense"), [
    (12, 8, 2, 2, False), (12, 8, 2, 2, True), (6, 5, 5, 1, True), (1, 1, 1, 1, False), (9, 33, 4, 3, False),
    (0, 8, 2, 2, True), (10, 24, 1, 0, False), (10, 24, 3, 0, True), (2, 512, 32, 1, False)])
def test_triton_values_and_gradients(compare, device, t, e, k, b, router, bias, dense):
    options = biased(router, bias, e) | {"top_k": k, "scaling_factor": 2.5, "sequences": b, "dense": dense}
    logits_te = torch.randn(t, e, device=device)
    exact = route_reference(logits_te.double(), **options)
    ours = route(logits_te, **options, impl="triton")
    assert torch.equal(ours.chosen, exact.chosen)
    for name in ("counts_be", "balanced_be"):
        assert torch.equal(getattr(ours, name), getattr(exact, name)), name
    floats = [ours._fields.index(name) for name in ("weights", "share_be", "squares_b")]
    compare(lambda x: tuple(route(x, **options, impl="triton")[i] for i in floats),
            lambda x: tuple(route_reference(x, **options)[i] for i in floats), logits_te, fp32=5e-6, summed=5.0)


@settings(max_examples=15, deadline=None)
@given(t=st.integers(1, 30), e=st.integers(1, 40), share=st.floats(0, 1), kind=st.sampled_from(KINDS),
       dense=st.booleans(), b=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_triton_any_shape(t, e, share, kind, dense, b, seed):
    torch.manual_seed(seed)
    options = biased(kind[0], kind[1], e) | {"top_k": 1 + int(share * (e - 1)), "sequences": b, "dense": dense}
    logits_te = torch.randn(t * b, e, device=HERE).requires_grad_()
    wide_te = logits_te.detach().double().requires_grad_()
    ours, exact = route(logits_te, **options, impl="triton"), route_reference(wide_te, **options)
    for name in ("chosen", "counts_be", "balanced_be"):
        assert torch.equal(getattr(ours, name), getattr(exact, name)), name
    for name in ("weights", "share_be", "squares_b"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(ours.weights)
    for found in (ours, exact):
        ((found.weights * direction).sum() + found.share_be.square().sum() + found.squares_b.sum()).backward()
    assert logits_te.grad is not None
    torch.testing.assert_close(logits_te.grad.double(), wide_te.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_half_precision_logits(device, dtype):
    """Computed in fp32, with ties as bf16 has many; the gradient is rounded to the logits' dtype."""
    logits_te = torch.randn(20, 16, device=device).to(dtype).requires_grad_()
    wide_te = logits_te.detach().double().requires_grad_()
    ours, exact = (route(x, top_k=4, router="softmax_after_topk", impl=impl)
                   for x, impl in ((logits_te, "triton"), (wide_te, "torch")))
    assert ours.weights.dtype == torch.float32
    assert torch.equal(ours.chosen, exact.chosen)
    direction = torch.randn_like(ours.weights)
    (ours.weights * direction).sum().backward()
    (exact.weights * direction).sum().backward()
    assert logits_te.grad is not None
    assert logits_te.grad.dtype == dtype
    torch.testing.assert_close(logits_te.grad.double(), wide_te.grad, rtol=2**-8, atol=1e-4)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", ROUTERS)
def test_nan_infinity_and_zeros_of_both_signs(device, router, dtype, impl):
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 6, [-inf] * 6, [nan, 1.0, nan, inf, -inf, 2.0], [0.0, -0.0, -1.0, 0.0, -0.0, -1.0],
            [-nan, -nan, 3.0, -inf, inf, 0.0], [1e30, -1e30, 1e30, -1e30, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    wanted = [[0, 1, 2], [0, 1, 2], [0, 2, 3], [0, 1, 3], [0, 1, 4], [0, 2, 4], [5, 4, 3]]
    logits_te = torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)
    found = route(logits_te, top_k=3, router=router, sequences=1, impl=impl)
    assert found.chosen.tolist() == wanted
    assert found.counts_be.sum() == 3 * len(rows)
    assert found.weights[3:4].isfinite().all()
    assert found.weights[5:].isfinite().all()
    found.weights.sum().backward()
    assert logits_te.grad is not None
    assert logits_te.grad[5:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_moves_the_choice_and_not_the_weights(device, impl):
    logits_te, bias_e = torch.randn(20, 8, device=device), torch.zeros(8, device=device)
    bias_e[[2, 5]] = 10.0
    found = route(logits_te, top_k=2, router="sigmoid", expert_bias_e=bias_e, sequences=2, impl=impl)
    assert found.chosen.sort(1).values.tolist() == [[2, 5]] * 20
    assert found.counts_be.tolist() == [[0, 0, 10, 0, 0, 10, 0, 0]] * 2
    own = route(logits_te, top_k=2, router="sigmoid", sequences=2, impl=impl)
    assert torch.equal(found.balanced_be, own.counts_be)
    assert torch.equal(own.balanced_be, own.counts_be)
    scores = logits_te.sigmoid().gather(1, found.chosen)
    torch.testing.assert_close(found.weights, scores / scores.sum(1, keepdim=True))


def test_triton_strided(compare, device):
    options = {"top_k": 3, "router": "softmax_before_topk"}
    for view in (lambda x: x[:, :9], lambda x: x[:, ::2], lambda x: x.t()[:6], lambda x: x[::2, 5:]):
        compare(lambda x, v=view: route(v(x), **options, impl="triton").weights.t(),
                lambda x, v=view: route_reference(v(x), **options).weights.t(), torch.randn(20, 20, device=device))


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_by_hand_and_their_order(device, impl, monkeypatch):
    """Token t is of sequence t % b; and however many programs share the tokens, counts are exact."""
    logits_te = torch.randn(60, 6, device=device)
    found = route(logits_te, top_k=2, router="softmax_after_topk", sequences=3, impl=impl)
    for b in range(3):
        rows_te = logits_te[b::3]
        torch.testing.assert_close(found.share_be[b], rows_te.softmax(-1).sum(0))
        torch.testing.assert_close(found.squares_b[b], rows_te.logsumexp(-1).square().sum())
        assert torch.equal(found.counts_be[b], found.chosen[b::3].flatten().bincount(minlength=6))
    for processors in (1, 100):
        monkeypatch.setattr(jit, "multiprocessors", lambda _, n=processors: n)
        again = route(logits_te.repeat(40, 1), top_k=2, router="softmax_after_topk", sequences=3, impl=impl)
        assert torch.equal(again.counts_be, 40 * found.counts_be)
        torch.testing.assert_close(again.share_be, 40 * found.share_be)


def test_triton_is_deterministic(device):
    logits_te = torch.randn(500, 16, device=device, requires_grad=True)
    seen = set()
    for _ in range(3):
        found = route(logits_te, top_k=4, router="sigmoid", sequences=2, impl="triton")
        grad = torch.autograd.grad((found.share_be**2).sum() + found.weights[:, 0].sum(), logits_te)[0]
        seen.add(pickle.dumps([x.detach().cpu().numpy() for x in (*found, grad)]))
    assert len(seen) == 1


@pytest.mark.parametrize(("kind", "dense"), [*((kind, False) for kind in KINDS), (KINDS[0], True), (KINDS[2], True)])
def test_triton_gradients_by_differences(device, kind, dense):
    options = biased(kind[0], kind[1], 4) | {"top_k": 2, "sequences": 2, "dense": dense, "impl": "triton"}
    logits_te = torch.stack([torch.randperm(4).double() for _ in range(2)]).to(device) * 0.4  # far from ties
    logits_te += 0.1 * torch.rand_like(logits_te)

    def floats(x):
        found = route(x, **options)
        return found.weights, found.share_be, found.squares_b

    assert torch.autograd.gradcheck(floats, logits_te.requires_grad_())


def test_triton_library_contract(device):
    logits_te, bias_e = torch.randn(6, 5, device=device, requires_grad=True), torch.randn(5, device=device)
    ops = torch.ops.engine_kernels
    torch.library.opcheck(ops.route_fwd.default, (logits_te, bias_e, 2, 2, 1.5, 2, False))
    torch.library.opcheck(ops.route_fwd.default, (logits_te, None, 2, 0, 1.0, 0, True))
    mask_te = route(logits_te, top_k=2, router="sigmoid", dense=True, impl="torch").chosen
    torch.library.opcheck(ops.route_bwd.default, (
        torch.randn(6, 5, device=device), torch.randn(2, 5, device=device), torch.randn(2, device=device),
        logits_te.detach(), mask_te, 2, 1, 1.0, 2, True))


def test_refusals_name_the_argument(device):
    logits_te = torch.randn(6, 5, device=device)
    usual: dict[str, Any] = {"top_k": 2, "router": "softmax_after_topk", "impl": "triton"}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"router": "topk"}, "router must be one of softmax_after_topk.*not 'topk'"),
        ({"top_k": 6}, r"top_k is 6, needs 1 to 5 for logits_te \(6, 5\)"),
        ({"top_k": 0}, "top_k is 0"),
        ({"sequences": 4}, "sequences is 4, which does not divide the 6 rows of logits_te"),
        ({"expert_bias_e": torch.zeros(5)}, "expert_bias_e.*router is softmax_after_topk"),
        ({"expert_bias_e": torch.zeros(4), "router": "sigmoid"}, r"expert_bias_e has shape \(4,\)"),
    ]
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            route(logits_te, **usual | options)
    with pytest.raises(RuntimeError, match=r"logits_te is torch\.int64, needs float32"):
        route(logits_te.long(), top_k=2, router="sigmoid", impl="triton")
    with pytest.raises(RuntimeError, match="expert_bias_e is on meta"):
        route(logits_te, top_k=2, router="sigmoid", expert_bias_e=torch.zeros(5, device="meta"), impl="triton")
    with pytest.raises(ValueError, match='impl must be one of "auto", "torch", "triton", not \'cpu\''):
        route(logits_te, top_k=2, router="sigmoid", impl="cpu")
