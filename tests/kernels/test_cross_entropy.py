"""Cross-entropy against float64 and torch: whole, in shards, with padding, ignored labels and extreme logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.cross_entropy import cross_entropy, cross_entropy_grad_, cross_entropy_stats

DTYPES = [torch.float32, torch.bfloat16]
INF = float("inf")


def exact_loss(logits, labels, valid=None):
    """Per token, by torch, in float64."""
    flat = logits.double().flatten(0, -2)[:, :valid]
    return F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=-1).view(labels.shape)


def some(shape, v, dtype=torch.float32, scale=4.0):
    return (torch.randn(*shape, v) * scale).to(dtype), torch.randint(-1, v, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "v"), [((3, 7), 64), ((5,), 1), ((1,), 33), ((0,), 8), ((4,), 1025), ((6,), 5003)])
def test_values_and_gradients(compare, threads, dtype, shape, v):
    logits, labels = some(shape, v, dtype)
    # "x * 1": the gradient overwrites the logits, which must not be the leaf. fp32 losses near 0 cancel: 4e-6.
    compare(lambda x: cross_entropy(x * 1, labels, reduction="none", impl="cpu").double(),
            lambda x: exact_loss(x, labels), logits, fp32=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(compare, instruction_set, dtype):
    logits, labels = some((9,), 3001, dtype)
    compare(lambda x: cross_entropy(x * 1, labels, reduction="none", impl="cpu").double(),
            lambda x: exact_loss(x, labels), logits, fp32=4e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 20), v=st.integers(1, 3000), seed=st.integers(0, 2**31),
       scale=st.sampled_from([0.01, 1.0, 50.0]))
def test_any_shape(n, v, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(n, v, generator=draw) * scale, torch.randint(-1, v, (n,), generator=draw)
    ours = cross_entropy(logits, labels, reduction="none", impl="cpu")
    torch.testing.assert_close(ours.double(), exact_loss(logits, labels), rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_combine_to_the_whole(dtype, impl):
    logits, labels = some((40,), 300, dtype)
    labels[:20] = logits[:20].argmax(-1)
    bounds = [(0, 100), (100, 200), (200, 310)]  # the last shard has 10 columns of padding
    padded = torch.cat((logits, torch.full((40, 10), 1e4, dtype=dtype)), -1)
    shards = [padded[:, a:b].clone() for a, b in bounds]
    valid = [100, 100, 100]
    stats = [cross_entropy_stats(x, labels, a, n, impl=impl)
             for x, (a, _), n in zip(shards, bounds, valid, strict=True)]
    top = torch.stack([s[0] for s in stats]).amax(0)
    total = sum(s[1] * (s[0] - top).exp() for s in stats)
    target = sum(s[2] for s in stats)
    loss = torch.where(labels < 0, 0, total.log() + top - target)
    torch.testing.assert_close(loss.double(), exact_loss(logits, labels), rtol=1e-5, atol=1e-5)
    hit = torch.stack([s[3] & (s[0] == top) for s in stats]).any(0)
    assert torch.equal(hit[:20], torch.ones(20, dtype=torch.bool))

    weight = torch.rand(40)
    for x, (a, _), n in zip(shards, bounds, valid, strict=True):
        cross_entropy_grad_(x, labels, a, top, total, weight, n, impl=impl)
    wide = logits.double().requires_grad_()
    (exact_loss(wide, labels) * weight).sum().backward()
    ours = torch.cat(shards, -1)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(ours[:, :300].double(), wide.grad, rtol=tolerance, atol=2e-6)
    assert not ours[:, 300:].any()
    assert not ours[labels < 0].any()


def test_hit_is_argmax_with_its_first_of_equals():
    logits = torch.randint(0, 4, (200, 50)).bfloat16()  # many ties
    labels = torch.randint(0, 50, (200,))
    labels[:100] = logits[:100].argmax(-1)
    for impl in ("cpu", "torch"):
        assert torch.equal(cross_entropy_stats(logits, labels, impl=impl)[3], logits.argmax(-1) == labels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_equal_torch(reduction):
    logits, labels = some((4, 6), 30)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = cross_entropy(a * 1, labels, reduction=reduction, impl="cpu")
    torchs = F.cross_entropy(b.flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=-1)
    torch.testing.assert_close(ours.flatten(), torchs.flatten(), rtol=2e-6, atol=2e-6)
    ours.sum().backward()
    torchs.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_and_minus_infinity(dtype):
    logits = torch.randn(5, 2100).to(dtype)
    logits[0] *= 1e4
    logits[1] -= 1e4
    logits[2, 5:] = -INF
    logits[3, :2000] = -INF  # whole blocks of -inf before the first number
    logits[4, 2099] = 1e4
    labels = torch.tensor([1, 2, 3, 2050, 2099])
    wide = logits.double().requires_grad_()
    exact_loss(wide, labels).sum().backward()
    x = logits.clone().requires_grad_()
    loss = cross_entropy(x * 1, labels, reduction="none", impl="cpu")
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), exact_loss(logits, labels), rtol=2e-6, atol=4e-3)  # 1e4 in fp32: 1e-3
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2.0**-8 if dtype == torch.bfloat16 else 2e-5, atol=1e-6)


def test_a_shard_of_minus_infinity_adds_nothing():
    logits, labels = torch.full((2, 70), -INF), torch.tensor([100, 101])
    for impl in ("cpu", "torch"):
        top, total, target, hit = cross_entropy_stats(logits, labels, 0, impl=impl)
        assert top.tolist() == [-INF, -INF]
        assert total.tolist() == target.tolist() == [0.0, 0.0]
        assert not hit.any()
    assert cross_entropy_stats(logits, labels, 0, 0, impl="cpu")[1].tolist() == [0.0, 0.0]  # nothing but padding
    assert cross_entropy_stats(logits, labels, 0, 0, impl="torch")[0].tolist() == [-INF, -INF]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_loss_of_its_row_only(dtype):
    logits, labels = some((3,), 2000, dtype)
    labels[:] = 4
    logits[1, 1999] = float("nan")
    assert cross_entropy(logits, labels, reduction="none", impl="cpu").isnan().tolist() == [False, True, False]


def test_ignored_rows_give_zeros_even_from_nan():
    logits = torch.full((2, 40), float("nan"), requires_grad=True)
    labels = torch.tensor([-1, -100])
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits * 1, labels, reduction=reduction, impl="cpu")
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_strided_logits():
    base, labels = torch.randn(30, 80), torch.randint(0, 40, (30,))
    for view in (base[:, :40], base[:, ::2]):
        whole = view.contiguous()
        ours, plain = (cross_entropy_stats(x, labels, impl="cpu") for x in (view, whole))
        assert all(map(torch.equal, ours, plain))
        weight = torch.rand(30)
        cross_entropy_grad_(view, labels, 0, ours[0], ours[1], weight)
        cross_entropy_grad_(whole, labels, 0, ours[0], ours[1], weight)
        torch.testing.assert_close(view, whole, rtol=1e-5, atol=1e-7)


def test_gradient_in_place_is_seen_by_autograd():
    x = torch.randn(4, 9, requires_grad=True)
    logits = x * 1
    other = logits.square().sum()  # needs the logits in its backward pass
    cross_entropy(logits, torch.tensor([0, 1, 2, 3]), impl="cpu").backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_torch_library_contract_and_compile():
    logits, labels = some((6,), 40)
    stats = torch.ops.engine_kernels.cross_entropy_stats(logits, labels, 0, 39)
    torch.library.opcheck(torch.ops.engine_kernels.cross_entropy_stats.default, (logits, labels, 0, 39))
    torch.library.opcheck(torch.ops.engine_kernels.cross_entropy_grad_.default,
                          (logits.clone(), labels, 0, 39, stats[0], stats[1], torch.rand(6)))
    x = logits.clone().requires_grad_()
    compiled = torch.compile(lambda t: cross_entropy(t * 2, labels), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x), x)[0]
    theirs = torch.autograd.grad(F.cross_entropy(x * 2, labels, ignore_index=-1), x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("logits", "labels", "more", "message"), [
    (torch.ones(3, 4), torch.zeros(2, dtype=torch.int64), {}, r"labels \(2,\)"),
    (torch.ones(3, 4), torch.zeros(3, dtype=torch.int32), {}, "int32"),
    (torch.ones(3, 4), torch.zeros(3, dtype=torch.int64), {"vocab_valid": 5}, r"vocab_valid 5 must be in 0\.\.4"),
    (torch.ones(3, 4), torch.zeros(3, dtype=torch.int64), {"reduction": "avg"}, "'avg'"),
    (torch.ones(3, 4), torch.tensor([0, 1, 3]), {"vocab_valid": 3}, "label 3 in a vocabulary of 3"),
])
def test_input_that_does_not_fit_is_named(logits, labels, more, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, labels, **more)
