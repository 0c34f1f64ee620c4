"""The projection with its loss, and with its log-probabilities, against float64 autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import linear_cross_entropy as module
from engine_kernels.linear import matmul_nn, matmul_nt
from engine_kernels.linear_cross_entropy import (
    chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
)

IMPLS = ["cpu", "torch", "triton"]
TERMS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}]


@pytest.fixture(params=IMPLS)
def impl(request) -> str:
    return request.param


def some(n, h=12, v=70, dtype=torch.float32, device="cpu"):
    """Hidden states, weight, labels of which some are ignored, weights of which some are zero."""
    hidden, weight = torch.randn(n, h, device=device, dtype=dtype), torch.randn(v, h, device=device).mul(0.6).to(dtype)
    labels = torch.randint(-1, v - 6, (n,), device=device)
    return hidden, weight, labels, torch.rand(n, device=device) * (torch.rand(n, device=device) < 0.7)


def test_references_are_torchs(place):
    hidden, weight, labels, weights = some(9, dtype=torch.float64, device=place)
    logits = hidden @ weight[:64].t()
    plain = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none", label_smoothing=0.1)
    plain = plain + 1e-2 * torch.where(labels < 0, 0.0, logits.logsumexp(-1) ** 2)
    loss = linear_cross_entropy_reference(hidden, weight, labels, weights, vocab_valid=64, label_smoothing=0.1,
                                          z_loss=1e-2)
    torch.testing.assert_close(loss, (plain * weights).sum())
    logps = linear_log_probs_reference(hidden, weight, labels, vocab_valid=64, temperature=0.5)
    torch.testing.assert_close(logps, -F.cross_entropy(logits / 0.5, labels, ignore_index=-1, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("n", "chunk"), [(0, 8), (1, 8), (8, 8), (9, 8), (33, 8), (20, None)])
def test_loss_and_gradients(compare, impl, place, n, chunk, terms, dtype):
    hidden, weight, labels, weights = some(n, dtype=dtype, device=place)

    def ours(h, w):
        return linear_cross_entropy(h, w, labels, weights_n=weights, vocab_valid=64, chunk_tokens=chunk, impl=impl,
                                    **terms)[0]

    def exact(h, w):
        return linear_cross_entropy_reference(h, w, labels, weights.double(), vocab_valid=64, **terms)

    # bf16: the logits and their gradient are rounded; a sum of n of them has errors of the size of its terms.
    compare(ours, exact, hidden, weight, bf16=2.0**-6, fp32=5e-6 if dtype == torch.float32 else 4e-3, summed=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("n", "chunk"), [(0, 8), (1, 8), (9, 8), (33, 8), (20, None)])
def test_log_probs_and_gradients(compare, impl, place, n, chunk, temperature, dtype):
    hidden, weight, labels, _ = some(n, dtype=dtype, device=place)

    def ours(h, w):
        return linear_log_probs(h, w, labels, vocab_valid=64, temperature=temperature, chunk_tokens=chunk, impl=impl)[0]

    def exact(h, w):
        return linear_log_probs_reference(h, w, labels, vocab_valid=64, temperature=temperature)

    compare(ours, exact, hidden, weight, bf16=2.0**-6, fp32=5e-6 if dtype == torch.float32 else 8e-3, summed=4.0)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 20), h=st.integers(1, 20), v=st.integers(1, 200), chunk=st.integers(1, 30),
       kind=st.sampled_from(IMPLS), seed=st.integers(0, 2**31), smooth=st.sampled_from([0.0, 0.3]))
def test_any_shape(n, h, v, chunk, kind, seed, smooth):
    torch.manual_seed(seed)
    device = "cuda" if kind == "triton" and torch.cuda.is_available() else "cpu"
    hidden, weight, _, weights = some(n, h, v + 6, device=device)
    labels = torch.randint(-1, v, (n,), device=device)
    loss, _ = linear_cross_entropy(hidden, weight, labels, weights_n=weights, vocab_valid=v, chunk_tokens=chunk,
                                   impl=kind, label_smoothing=smooth)
    logps, _ = linear_log_probs(hidden, weight, labels, vocab_valid=v, chunk_tokens=chunk, impl=kind)
    wide = hidden.double(), weight.double(), labels
    exact = linear_cross_entropy_reference(*wide, weights.double(), vocab_valid=v, label_smoothing=smooth)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps.double(), linear_log_probs_reference(*wide, vocab_valid=v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", TERMS)
def test_shards_of_the_vocabulary_equal_the_whole(impl, place, terms):
    """Two shards in one process: what `combine` is given, what it must return, and that gradients are shares."""
    hidden, weight, labels, weights = some(21, device=place)
    halves, seen = weight.chunk(2), [[], []]
    options = {"weights_n": weights, "vocab_size": 64, "chunk_tokens": 8, "impl": impl, **terms}
    for i in range(2):
        linear_cross_entropy(hidden, halves[i], labels, vocab_start=35 * i, vocab_valid=[35, 29][i], **options,
                             combine=lambda stats, i=i: seen[i].append(stats) or stats)
    grads, losses = [], []
    for i in range(2):
        h, w = hidden.clone().requires_grad_(), halves[i].clone().requires_grad_()
        both = (torch.cat(pair) for pair in zip(*seen, strict=True))
        loss, correct = linear_cross_entropy(h, w, labels, vocab_start=35 * i, vocab_valid=[35, 29][i], **options,
                                             combine=lambda _own, both=both: next(both))
        grads.append(torch.autograd.grad(loss, [h, w]))
        losses.append((loss.item(), correct.item()))
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = linear_cross_entropy_reference(*wide, labels, weights.double(), vocab_valid=64, **terms)
    grad_h, grad_w = torch.autograd.grad(exact, wide)
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(exact.item(), rel=2e-6)
    guesses = (wide[0] @ wide[1][:64].t()).argmax(-1)
    assert losses[0][1] == ((guesses == labels) & (weights > 0)).sum().item()
    torch.testing.assert_close(grads[0][0] + grads[1][0], grad_h.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([g[1] for g in grads]), grad_w.float(), rtol=1e-4, atol=1e-5)


def test_entropy(impl, place):
    hidden, weight, labels, _ = some(21, device=place)
    logps, entropy = linear_log_probs(hidden, weight, labels, vocab_valid=64, temperature=0.8, entropy=True,
                                      chunk_tokens=8, impl=impl)
    exact = torch.distributions.Categorical(logits=(hidden.double() @ weight[:64].double().t()) / 0.8).entropy()
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), exact.masked_fill(labels < 0, 0.0), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    assert linear_log_probs(hidden, weight, labels, impl=impl)[1] is None
    assert logps.dtype == torch.float32


def test_left_out_tokens_leave_exact_zeros(impl, place):
    hidden, weight, labels, weights = some(20, device=place)
    hidden[(weights == 0) | (labels < 0)] = float("nan")
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss, correct = linear_cross_entropy(h, w, labels, weights_n=weights, chunk_tokens=8, impl=impl)
    assert loss.isfinite()
    assert correct <= (weights > 0).sum()
    out = (weights == 0) | (labels < 0)
    assert not torch.autograd.grad(loss, h)[0][out].any()
    assert not linear_log_probs(h.detach()[out], w.detach(), torch.full_like(labels[out], -1), impl=impl)[0].any()
    nothing, _ = linear_cross_entropy(h, w, labels, weights_n=torch.zeros_like(weights), chunk_tokens=8, impl=impl)
    assert nothing == 0
    assert not torch.autograd.grad(nothing, h)[0].any()


@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_hits_of_each_token(impl, place, kept):
    hidden, weight, labels, weights = some(40, device=place)
    guesses = (hidden @ weight[:64].t()).argmax(-1)
    labels = torch.where(torch.rand(40, device=place) < 0.5, guesses, labels)
    weights = torch.where(torch.rand(40, device=place) < kept, 1.0, 0.0)
    options = {"weights_n": weights, "vocab_valid": 64, "impl": impl, "chunk_tokens": 8}
    loss, hits = linear_cross_entropy(hidden, weight, labels, per_token=True, **options)
    assert torch.equal(hits > 0, (guesses == labels) & (weights > 0))
    summed, count = linear_cross_entropy(hidden, weight, labels, **options)
    assert (loss, hits.sum()) == (summed, count)
    assert 0 < count < 40


@pytest.mark.parametrize("op", ["loss", "logps"])
def test_only_the_gradients_that_are_wanted_are_made(monkeypatch, op):
    hidden, weight, labels, weights = some(20)
    calls = []
    for name in ("matmul_nn", "matmul_tn", "cross_entropy_grad_"):
        true = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, true=true, **k: calls.append(name) or true(*a, **k))

    def run(h, w):
        calls.clear()
        result = (linear_cross_entropy(h, w, labels, weights_n=weights)[0] if op == "loss"
                  else linear_log_probs(h, w, labels)[0].sum())
        if result.requires_grad:
            result.backward()
        return sorted(set(calls))

    leaf_h, leaf_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    assert run(leaf_h, leaf_w) == ["cross_entropy_grad_", "matmul_nn", "matmul_tn"]
    assert run(leaf_h, weight) == ["cross_entropy_grad_", "matmul_nn"]  # a frozen head
    assert run(hidden, leaf_w) == ["cross_entropy_grad_", "matmul_tn"]
    with torch.no_grad():
        assert run(leaf_h, leaf_w) == []


def test_log_probs_without_gradient_keep_nothing():
    hidden, weight, labels, _ = some(20)
    weight.requires_grad_()
    with torch.no_grad():
        logps, _ = linear_log_probs(hidden, weight, labels)
    assert not logps.requires_grad
    assert logps.grad_fn is None


def test_no_copy_of_the_logits_is_made(monkeypatch):
    """The gradient is where the logits were: the product reads the memory that the projection wrote."""
    hidden, weight, labels, weights = some(20)
    addresses = []

    def projecting(x, w):
        made = matmul_nt(x, w)
        addresses.append(made.data_ptr())
        return made

    monkeypatch.setattr(module, "matmul_nt", projecting)
    monkeypatch.setattr(module, "matmul_nn", lambda g, w: addresses.append(g.data_ptr()) or matmul_nn(g, w))
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, weights_n=weights)
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]


def test_weight_gradient_over_many_chunks_is_summed_in_fp32():
    """4096 equal parts: summed in bf16 they would stop growing at 256."""
    hidden, weight = torch.ones(4096, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), weights_n=torch.ones(4096),
                                   chunk_tokens=1)
    assert torch.autograd.grad(loss, weight)[0].flatten().tolist() == [-2048.0, 2048.0]


@pytest.mark.parametrize(("tokens", "rows", "dtype", "device", "expected"), [
    (10**6, 8192, torch.float32, "cpu", 2048), (10**6, 50304, torch.bfloat16, "cpu", 640),
    (10**6, 10**7, torch.float32, "cpu", 128), (100, 8192, torch.float32, "cpu", 128),
    (8192, 131072, torch.bfloat16, "cuda", 4096), (8192, 32000, torch.bfloat16, "cuda", 8192),
    (8320, 131072, torch.bfloat16, "cuda", 2816),  # three equal chunks, not two and a small one
    (0, 8192, torch.bfloat16, "cpu", 128)])
def test_chunks_are_few_large_and_equal(tokens, rows, dtype, device, expected):
    assert chunk_tokens(tokens, rows, dtype, device) == expected


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_nh": torch.ones(3, 5)}, r"hidden \(3, 5\) must be \[n, h\] and weight \(7, 4\)"),
    ({"weight_vh": torch.ones(7, 4).bfloat16()}, r"weight is torch\.bfloat16, but hidden is torch\.float32"),
    ({"labels_n": torch.zeros(2, dtype=torch.int64)}, r"labels \(2,\)"),
    ({"labels_n": torch.zeros(3)}, r"labels \(3,\) torch\.float32"),
    ({"weights_n": torch.ones(4)}, r"weights \(4,\) must be \[3\]"),
    ({"vocab_valid": 8}, r"vocab_valid 8 must be in 0\.\.7"),
    ({"chunk_tokens": 0}, "chunk_tokens 0 must be at least 1"),
    ({"combine": lambda stats: stats}, "vocab_size, of the whole vocabulary, is needed with combine"),
    ({"z_loss": -1.0}, r"z_loss -1\.0"),
])
def test_arguments_that_do_not_fit_are_named(change, message):
    given = {"hidden_nh": torch.ones(3, 4), "weight_vh": torch.ones(7, 4), "weights_n": torch.ones(3),
             "labels_n": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(given.pop("hidden_nh"), given.pop("weight_vh"), given.pop("labels_n"), **given)


def test_log_probs_refuse_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature 0 must be above 0"):
        linear_log_probs(torch.ones(3, 4), torch.ones(7, 4), torch.zeros(3, dtype=torch.int64), temperature=0)
