"""The experts' products and their layer against float64: any split of the rows, both forms of the weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_kernels import grouped_gemm
from engine_kernels.grouped_gemm import grouped_nn, grouped_nt, grouped_tn
from engine_kernels.grouped_linear import bias_gradients, grouped_linear, grouped_linear_reference

DTYPES = [torch.float32, torch.bfloat16]
# Rows of each expert, inputs, outputs, rows after the last expert's.
SHAPES = {
    "uneven": ([3, 0, 5, 20, 1], 33, 20, 0), "spare rows": ([17, 2], 16, 48, 9), "no rows": ([0, 0, 0], 8, 8, 0),
    "one row": ([0, 1], 24, 3, 0), "one expert": ([37], 64, 40, 0), "one of each": ([1], 1, 1, 0),
    "all spare": ([0, 0], 8, 16, 5), "first and last empty": ([0, 40, 0], 130, 24, 0),
}


@pytest.fixture
def tiles(monkeypatch) -> None:
    small_tiles(monkeypatch)


def small_tiles(monkeypatch) -> None:
    """So that the interpreter's shapes have every kind of walk over tiles."""
    sizes = {"ROWS": 16, "COLUMNS": 16, "INNER": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(grouped_gemm, "_blocks", lambda *_: dict(sizes))


def made(shape, dtype=torch.float32, device="cpu", seed=None):
    """x, weights [e, m, k], biases, the rows' scales, tokens of each expert."""
    tokens, k, m, spare = shape
    g = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)
    p, e = sum(tokens) + spare, len(tokens)
    x, w, b = (torch.randn(*size, generator=g).to(device, dtype) for size in ((p, k), (e, m, k), (e, m)))
    return x, w, b, torch.rand(p, generator=g).to(device), torch.tensor(tokens, device=device)


def layer(function, form, **options):
    """As a function of tensors alone: a list of weights is what the stack falls into."""
    def run(x, w, b, s, tokens):
        parts = (lambda t: t) if form == "stack" else (lambda t: [one.clone() for one in t.unbind(0)])
        return function(x, parts(w), tokens, parts(b), s, **options)
    return run


@pytest.mark.parametrize(("form", "dtype"),
                         [("stack", torch.float32), ("list", torch.bfloat16), ("list", torch.float16)])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(compare, device, monkeypatch, name, form, dtype):
    if dtype != torch.float16:  # the interpreter's shapes fit one tile of the default sizes
        small_tiles(monkeypatch)
    inputs = made(SHAPES[name], dtype, device)
    compare(layer(grouped_linear, form, impl="triton"), layer(grouped_linear_reference, "stack"), *inputs, summed=8.0)


@pytest.mark.parametrize("form", ["stack", "list"])
@pytest.mark.parametrize("biased", [True, False])
def test_without_scales_or_biases(compare, device, form, biased):
    x, w, b, _, tokens = made(SHAPES["uneven"], device=device)

    def run(function, x, w, b):
        weights, biases = (w, b) if form == "stack" else (list(w.unbind(0)), list(b.unbind(0)))
        return function(x, weights, tokens, biases if biased else None) + 0 * b.sum()
    ours = partial(run, partial(grouped_linear, impl="triton"))
    compare(ours, partial(run, grouped_linear_reference), x, w, b, summed=8.0)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.integers(0, 25), min_size=1, max_size=5), k=st.integers(1, 40), m=st.integers(1, 40),
       spare=st.integers(0, 20), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-15, 1.0, 1e15]))
def test_any_sizes(monkeypatch, tokens, k, m, spare, seed, scale):
    small_tiles(monkeypatch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w, _, _, tokens_e = made((tokens, k, m, spare), device=device, seed=seed)
    dy, x = torch.randn(x.shape[0], m, device=device), x * scale
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5 * scale)
    wide = grouped_linear_reference(x.double(), w.double(), tokens_e)
    close(grouped_nt(x, list(w.unbind(0)), tokens_e, impl="triton").double(), wide)
    for own, there in zip(grouped_tn(dy, x, tokens_e, impl="triton"),
                          grouped_tn(dy.double(), x.double(), tokens_e, impl="torch"), strict=True):
        close(own.double(), there, atol=1e-4 * scale)
    dx = grouped_nn(dy.double(), w.double(), tokens_e, impl="torch")
    torch.testing.assert_close(grouped_nn(dy, w, tokens_e, impl="triton").double(), dx, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["stack", "list"])
def test_sums_over_micro_batches(device, tiles, form, impl, total, dtype):
    """First micro-batch overwrites what is there, others add; an expert without rows then keeps what it has."""
    e, m, k = 4, 35, 18
    exact = torch.zeros(e, m, k, dtype=torch.float64, device=device)
    found = torch.full((e, m, k), float("nan"), device=device, dtype=total)
    into = [found] if form == "stack" and impl == "triton" else list(found.unbind(0))
    for micro, tokens in enumerate(([4, 0, 30, 2], [0, 0, 17, 40], [1, 2, 0, 0])):
        tokens_e = torch.tensor(tokens, device=device)
        dy, x = (torch.randn(sum(tokens), n, device=device).to(dtype) for n in (m, k))
        before = found.clone()
        grouped_tn(dy, x, tokens_e, into=into, add=micro > 0, impl=impl)
        exact += torch.stack(list(grouped_tn(dy.double(), x.double(), tokens_e, impl="torch")))
        for i, own in enumerate(tokens):
            if micro and not own:
                assert torch.equal(found[i], before[i])
    rounding = 1e-5 if total == torch.float32 and (dtype == torch.float32 or impl == "triton") else 2.0**-6
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding * exact.abs().max().item())


def test_bf16_sums_are_not_rounded_between(device):
    """What the kernel adds to an fp32 total are fp32 sums: a thousand ones are a thousand, and a bit more."""
    tokens = torch.tensor([0, 1001], device=device)
    dy, x = (torch.ones(1001, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = [torch.full((16, 16), 0.125, device=device) for _ in range(2)]
    grouped_tn(dy, x, tokens, into=found, add=True, impl="triton")
    assert [set(t.flatten().tolist()) for t in found] == [{0.125}, {1001.125}]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loop_equals_the_kernels(device, dtype):
    x, w, b, s, tokens = made(SHAPES["spare rows"], dtype, device)
    dy = torch.randn(x.shape[0], w.shape[1], device=device).to(dtype)
    results = []
    for impl in ("cpu", "triton"):
        db, ds = bias_gradients(dy, b, s, tokens, impl=impl)
        results.append([grouped_nt(x, w, tokens, b, s, impl=impl), grouped_nn(dy, w, tokens, impl=impl),
                        *grouped_tn(dy, x, tokens, impl=impl), *db, ds])
    for loop, kernel in zip(*results, strict=True):
        assert loop.dtype == kernel.dtype
        torch.testing.assert_close(loop, kernel, rtol=2.0**-6 if dtype == torch.bfloat16 else 1e-5,
                                   atol=0.06 if dtype == torch.bfloat16 else 1e-4)


def test_strided_rows_and_weights(compare, device):
    _, _, b, s, tokens = made(SHAPES["uneven"], device=device)
    for view in (lambda t: t[:, :33], lambda t: t[:, 1:67:2], lambda t: t.t()[:29, :33]):
        def run(function, x, w, view=view):
            return function(view(x)[:29], w[:, :, :33], tokens, b.to(x.dtype), s).t()
        compare(partial(run, partial(grouped_linear, impl="triton")), partial(run, grouped_linear_reference),
                torch.randn(70, 70, device=device), torch.randn(5, 20, 40, device=device), summed=8.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_with_their_expert(device, tiles, bad):
    x, w, b, s, tokens = made(SHAPES["uneven"], device=device)
    x[5, 3] = bad  # of expert 2, rows 3 to 7; its neighbours share the tile
    y = grouped_linear(x, w, tokens, b, s, impl="triton")
    assert not y[5].isfinite().any()
    assert y[:5].isfinite().all()
    assert y[6:].isfinite().all()
    dw = grouped_tn(torch.randn_like(y), x, tokens, impl="triton")
    assert [bool(t.isfinite().all()) for t in dw] == [True, True, False, True, True]


def test_deterministic(device):
    x, w, b, s, tokens = made(([40, 0, 77], 65, 40, 0), torch.bfloat16, device)
    found = [grouped_linear(x, w, tokens, b, s, impl="triton") for _ in range(2)]
    assert torch.equal(*found)
    dw = [torch.stack(list(grouped_tn(found[0], x, tokens, impl="triton"))) for _ in range(2)]
    assert torch.equal(*dw)


def test_gradients_by_differences(device):
    x, w, b, s, tokens = made(([2, 0, 1], 3, 2, 1), torch.float64, device)
    inputs = [t.requires_grad_() for t in (x, w, b, s.double())]
    assert torch.autograd.gradcheck(lambda x, w, b, s: grouped_linear(x, w, tokens, b, s, impl="triton"), inputs,
                                    fast_mode=True)
    lists = [t.clone().requires_grad_() for t in (*w.detach().unbind(0), *b.detach().unbind(0))]
    assert torch.autograd.gradcheck(
        lambda x, *own: grouped_linear(x, own[:3], tokens, own[3:], impl="triton"), (x, *lists), fast_mode=True)


def test_library_contract(device):
    x, w, b, s, tokens = made(([2, 0, 3], 8, 24, 1), device=device)
    dy, ops = torch.randn(6, 24, device=device), torch.ops.engine_kernels
    for weights, biases in (([w], [b]), (list(w.unbind(0)), list(b.unbind(0)))):
        leaves = [[t.clone().requires_grad_() for t in group] for group in (weights, biases)]
        check = torch.library.opcheck
        check(ops.grouped_linear_fwd.default, (x.clone().requires_grad_(), *leaves, s.clone().requires_grad_(), tokens))
        check(ops.grouped_linear_fwd.default, (x, weights, [], None, tokens))
        check(ops.grouped_linear_dgrad.default, (dy, weights, tokens))
        check(ops.grouped_linear_bias_bwd.default, (dy, biases, s, tokens))
        check(ops.grouped_linear_bias_bwd.default, (dy, biases, None, tokens))
        check(ops.grouped_linear_wgrad_into.default, (dy, x, tokens, [t.clone() for t in weights], True))
    torch.library.opcheck(ops.grouped_linear_wgrad.default, (dy, x, tokens))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_adapters_beside_frozen_experts(compare, device, impl, monkeypatch):
    """LoRA: y = x W_e^T + (x A_e^T) B_e^T with stacked adapters; for the frozen experts no gradient is computed."""
    x, w, _, _, tokens = made(([9, 0, 14, 1], 40, 48, 0), device=device)
    e, (_, m, k), r = len(tokens), w.shape, 8
    a, b = torch.randn(e, r, k, device=device) / k**0.5, torch.randn(e, m, r, device=device)
    frozen = list(w.unbind(0))
    computed, wgrad = [], grouped_gemm._weight_gradients

    def counted(dy, x, tokens_e, into, add):
        computed.append(tuple(into[0].shape))
        wgrad(dy, x, tokens_e, into, add)
    monkeypatch.setattr(grouped_gemm, "_weight_gradients", counted)

    def adapted(x, a, b):
        return (grouped_linear(x, frozen, tokens, impl=impl)
                + grouped_linear(grouped_linear(x, a, tokens, impl=impl), b, tokens, impl=impl))

    def exact(x, a, b):
        rows = torch.repeat_interleave(torch.arange(e, device=device), tokens)
        whole = w.double()[rows] + b[rows] @ a[rows]
        return (whole @ x[:, :, None]).squeeze(2)
    compare(adapted, exact, x, a, b, summed=20.0)
    assert computed == ([(e, m, r), (e, r, k)] if impl == "triton" else [])


def test_refusals_name_the_argument(device):
    x, w, b, s, tokens = made(SHAPES["uneven"], device=device)
    with pytest.raises(ValueError, match=r"4 weights for 5 experts"):
        grouped_linear(x, w[:4], tokens, impl="triton")
    with pytest.raises(ValueError, match=r"weights\[2\] is torch.float32 \(20, 32\), needs torch.float32 \(20, 33\)"):
        grouped_linear(x, [*w[:2], w[2, :, 1:], *w[3:]], tokens)
    with pytest.raises(ValueError, match=r"biases\[0\] is torch.bfloat16"):
        grouped_linear(x, w, tokens, b.bfloat16())
    with pytest.raises(ValueError, match="scale_p must be"):
        grouped_linear(x, w, tokens, b, s[1:])
    with pytest.raises(ValueError, match="tokens_per_expert_e integers"):
        grouped_linear(x, w, tokens.float())
    with pytest.raises(RuntimeError, match="tokens_per_expert_e is on meta"):
        grouped_nt(x, w, tokens.to("meta"), impl="triton")
    with pytest.raises(RuntimeError, match=r"dy is torch\.bfloat16, but x is torch\.float32"):
        grouped_tn(x.bfloat16(), x, tokens, impl="triton")
    with pytest.raises(ValueError, match='impl must be one of "auto", "torch", "triton"'):
        grouped_linear(x, w, tokens, impl="cuda")
