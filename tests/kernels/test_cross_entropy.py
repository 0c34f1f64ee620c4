"""Cross-entropy against float64 and torch: whole, in shards, with padding, ignored labels and extreme logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import logit_stats as stats_module
from engine_kernels.cross_entropy import cross_entropy, cross_entropy_grad_
from engine_kernels.logit_stats import combine_stats, logit_stats, token_entropy, token_losses

DTYPES = [torch.float32, torch.bfloat16]
INF = float("inf")
IMPLS = ["cpu", "torch", "triton"]
TERMS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}]
SHAPES = [((3, 7), 64), ((5,), 1), ((1,), 33), ((0,), 8), ((4,), 1025), ((6,), 5003), ((2,), 9000)]


@pytest.fixture(params=IMPLS)
def impl(request) -> str:
    return request.param


def exact_loss(logits, labels, valid=None, label_smoothing=0.0, z_loss=0.0):
    """Per token, by torch, in float64."""
    flat, flat_labels = logits.double().flatten(0, -2)[:, :valid], labels.flatten()
    loss = F.cross_entropy(flat, flat_labels, reduction="none", ignore_index=-1, label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + torch.where(flat_labels < 0, 0.0, z_loss * flat.logsumexp(-1).square())
    return loss.view(labels.shape)


def some(shape, v, dtype=torch.float32, scale=4.0, device="cpu"):
    return (torch.randn(*shape, v) * scale).to(device, dtype), torch.randint(-1, v, shape, device=device)


def check(compare, logits, labels, impl, **terms):
    """Values and gradients. A loss is a difference of numbers as large as the logits, a smoothed one a sum of many."""
    # "x * 1": the gradient overwrites the logits, which must not be the leaf. fp32 losses near 0 cancel: 4e-6.
    compare(lambda x: cross_entropy(x * 1, labels, reduction="none", impl=impl, **terms).double(),
            lambda x: exact_loss(x, labels, **terms), logits, fp32=4e-6, summed=4.0 if terms else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("shape", "v"), SHAPES)
def test_values_and_gradients(compare, threads, dtype, shape, v, terms):
    check(compare, *some(shape, v, dtype), "cpu", **terms)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("shape", "v"), SHAPES)
def test_triton_values_and_gradients(compare, device, dtype, shape, v, terms):
    check(compare, *some(shape, v, dtype, device=device), "triton", **terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", TERMS)
def test_every_instruction_set(compare, instruction_set, dtype, terms):
    check(compare, *some((9,), 3001, dtype), "cpu", **terms)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 20), v=st.integers(1, 3000), seed=st.integers(0, 2**31),
       scale=st.sampled_from([0.01, 1.0, 50.0]), kind=st.sampled_from(["cpu", "triton"]),
       smooth=st.sampled_from([0, 0.2]))
def test_any_shape(n, v, seed, scale, kind, smooth):
    draw = torch.Generator().manual_seed(seed)
    where = "cuda" if kind == "triton" and torch.cuda.is_available() else "cpu"
    logits, labels = torch.randn(n, v, generator=draw) * scale, torch.randint(-1, v, (n,), generator=draw)
    ours = cross_entropy(logits.to(where), labels.to(where), reduction="none", label_smoothing=smooth, impl=kind).cpu()
    torch.testing.assert_close(ours.double(), exact_loss(logits, labels, label_smoothing=smooth), rtol=3e-6, atol=2e-5)


def test_a_quarter_of_a_million_columns(device):
    """The widest row, at the launcher's own split of it over programs."""
    logits, labels = some((2,), 262144, torch.bfloat16, device=device)
    labels[:] = torch.tensor([262143, 70000])
    x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, exact = cross_entropy(x * 1, labels, reduction="none", impl="triton"), exact_loss(wide, labels)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
    (ours,), (theirs,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(ours.double(), theirs, rtol=2.0**-8, atol=1e-9)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_combine_to_the_whole(dtype, impl, place, terms):
    logits, labels = some((40,), 300, dtype, device=place)
    labels[:20] = logits[:20].argmax(-1)
    padded = torch.cat((logits, torch.full((40, 10), 1e4, dtype=dtype, device=place)), -1)
    starts, valid = [0, 110, 220], [110, 110, 80]  # the last shard has 30 columns, of which 10 and more are padding
    padded = torch.cat((padded, padded[:, :20] + 1e4), -1)
    shards = [padded[:, a : a + 110].clone() for a in starts]
    stats = torch.cat([logit_stats(x, labels, a, n, logit_sum=True, entropy=True, impl=impl)
                       for x, a, n in zip(shards, starts, valid, strict=True)])
    loss, whole = token_losses(stats, labels, 300, impl=impl, **terms)
    torch.testing.assert_close(loss.double(), exact_loss(logits, labels, **terms), rtol=1e-5, atol=2e-5)
    assert torch.equal(whole[3] > 0, (logits.argmax(-1) == labels) & (labels >= 0))
    assert whole[3][:20].all()
    torch.testing.assert_close(whole, combine_stats(stats), rtol=2e-6, atol=1e-6)
    exact_entropy = torch.distributions.Categorical(logits=logits.double()).entropy().masked_fill(labels < 0, 0.0)
    torch.testing.assert_close(token_entropy(whole).double(), exact_entropy, rtol=1e-5, atol=1e-5)

    weight = torch.rand(40, device=place)
    for x, a, n in zip(shards, starts, valid, strict=True):
        cross_entropy_grad_(x, labels, whole, weight, vocab_start=a, vocab_valid=n, vocab_size=300, impl=impl, **terms)
    wide = logits.double().requires_grad_()
    (exact_loss(wide, labels, **terms) * weight).sum().backward()
    ours = torch.cat(shards, -1)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(ours[:, :300].double(), wide.grad, rtol=tolerance, atol=2e-6)
    assert not ours[:, 300:].any()
    assert not ours[labels < 0].any()


@pytest.mark.parametrize("columns", [50, 4500])
def test_hit_is_argmax_with_its_first_of_equals_over_shards_too(impl, place, columns):
    logits = torch.randint(0, 4, (60, columns), device=place).bfloat16()  # many ties
    labels = torch.randint(0, columns, (60,), device=place)
    half = columns // 2
    labels[:20] = logits[:20].argmax(-1)
    labels[20:40] = half + logits[20:40, half:].argmax(-1)  # of the second half, where the first often has an equal
    shards = torch.cat([logit_stats(logits[:, :half], labels, impl=impl),
                        logit_stats(logits[:, half:], labels, half, impl=impl)])
    for stats in (logit_stats(logits, labels, impl=impl), shards):
        for found in (combine_stats(stats), token_losses(stats, labels, columns, impl=impl)[1]):
            assert torch.equal(found[3] > 0, logits.argmax(-1) == labels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_equal_torch(reduction, impl, place):
    logits, labels = some((4, 6), 30, device=place)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = cross_entropy(a * 1, labels, reduction=reduction, impl=impl)
    torchs = F.cross_entropy(b.flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=-1)
    torch.testing.assert_close(ours.flatten(), torchs.flatten(), rtol=2e-6, atol=2e-6)
    ours.sum().backward()
    torchs.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_and_minus_infinity(dtype, impl, place):
    logits = torch.randn(7, 2100).to(dtype)
    logits[0] *= 1e4
    logits[1] -= 1e4
    logits[2, 5:] = -INF
    logits[3, :2000] = -INF  # whole blocks of -inf before the first number
    logits[4, 2099] = 1e4
    logits[5, 7] = 1e30
    logits[6] -= 1e30
    logits, labels = logits.to(place), torch.tensor([1, 2, 3, 2050, 2099, 7, 5], device=place)
    wide = logits.double().requires_grad_()
    exact = exact_loss(wide, labels)
    x = logits.clone().requires_grad_()
    loss = cross_entropy(x * 1, labels, reduction="none", impl=impl)
    (ours,), (theirs,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(exact.sum(), wide)
    # 1e4 in fp32: 1e-3; log(2100) beside 1e30 is below its last digit
    torch.testing.assert_close(loss[:6].double(), exact[:6], rtol=2e-6, atol=4e-3)
    assert loss[6].isfinite()
    torch.testing.assert_close(ours.double(), theirs, rtol=2.0**-8 if dtype == torch.bfloat16 else 2e-5, atol=1e-6)


def test_a_shard_of_minus_infinity_adds_nothing(impl, place):
    logits, labels = torch.full((2, 70), -INF, device=place), torch.tensor([100, 101], device=place)
    found = combine_stats(logit_stats(logits, labels, logit_sum=True, entropy=True, impl=impl))
    assert found[0].tolist() == [-INF, -INF]
    assert found[[1, 2, 3, 5]].tolist() == [[0.0, 0.0]] * 4
    nothing = combine_stats(logit_stats(logits, labels, 0, 0, logit_sum=True, impl=impl))  # nothing but padding
    assert nothing[0].tolist() == [-INF, -INF]
    assert not nothing[1:].any()
    more = logit_stats(torch.randn(2, 70, device=place), labels, 70, logit_sum=True, entropy=True, impl=impl)
    both = torch.cat([logit_stats(logits, labels, entropy=True, impl=impl), more])
    torch.testing.assert_close(combine_stats(both), more[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_row_only(dtype, impl, place):
    logits, labels = some((3,), 5000, dtype, device=place)
    labels[:] = 4
    logits[1, 4999] = float("nan")
    x = logits.requires_grad_()
    loss = cross_entropy(x * 1, labels, reduction="none", impl=impl)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(loss.sum(), x)[0].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("filling", [float("nan"), -INF, INF])
def test_ignored_rows_give_zeros_whatever_they_hold(impl, place, filling, terms):
    logits = torch.full((2, 40), filling, requires_grad=True, device=place)
    labels = torch.tensor([-1, -100], device=place)
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits * 1, labels, reduction=reduction, impl=impl, **terms)
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_strided_logits(impl, place):
    base, labels = torch.randn(30, 80, device=place), torch.randint(0, 40, (30,), device=place)
    for view in (base[:, :40], base[:, 1:41], base[:, ::2]):
        whole = view.contiguous()
        ours, plain = (logit_stats(x, labels, impl=impl) for x in (view, whole))
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=0)
        kept, weight = base.clone(), torch.rand(30, device=place)
        for x in (view, whole):
            cross_entropy_grad_(x, labels, plain[0], weight, impl=impl)
        torch.testing.assert_close(view, whole, rtol=1e-5, atol=1e-7)
        view.zero_()
        assert torch.equal(base == 0, kept.sub_(base) != 0), "columns outside the view were written"
        base = torch.randn(30, 80, device=place)


def test_triton_offsets_pass_two_to_the_31st(device):
    """Rows 2^30 elements apart, most of them never touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    logits = base.as_strided((3, 64), (2**30, 1))
    logits.copy_(torch.randn(3, 64))
    labels = torch.tensor([3, 60, 9], device=device)
    plain = logits.clone()
    stats = logit_stats(logits, labels, impl="triton")
    assert torch.equal(stats, logit_stats(plain, labels, impl="triton"))
    for x in (logits, plain):
        cross_entropy_grad_(x, labels, stats[0], torch.ones(3, device=device), impl="triton")
    assert torch.equal(logits, plain)


def test_gradient_in_place_is_seen_by_autograd(impl, place):
    x = torch.randn(4, 9, requires_grad=True, device=place)
    logits = x * 1
    other = logits.square().sum()  # needs the logits in its backward pass
    cross_entropy(logits, torch.tensor([0, 1, 2, 3], device=place), impl=impl).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


class _KeepsLogits(torch.autograd.Function):
    """The op with its gradient written into a copy, so that backward may run twice."""

    @staticmethod
    def forward(ctx, logits, labels, terms):
        loss, stats = token_losses(logit_stats(logits, labels, logit_sum=True, impl="triton"), labels, logits.shape[1],
                                   impl="triton", **terms)
        ctx.save_for_backward(logits, labels, stats)
        ctx.terms = terms
        return loss

    @staticmethod
    def backward(ctx, dloss):
        logits, labels, stats = ctx.saved_tensors
        return cross_entropy_grad_(logits.clone(), labels, stats, dloss, impl="triton", **ctx.terms), None, None


@pytest.mark.parametrize("terms", TERMS)
def test_triton_gradients_by_differences(device, terms):
    logits = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.tensor([0, 4, -1], device=device)
    assert torch.autograd.gradcheck(lambda x: _KeepsLogits.apply(x, labels, terms), (logits,))


def test_triton_result_is_the_cpu_kernels(device):
    logits, labels = some((8,), 3000, torch.bfloat16)
    there = logits.to(device)
    on_cpu, on_gpu = logit_stats(logits, labels, impl="cpu"), logit_stats(there, labels.to(device), impl="triton")
    ours = combine_stats(on_gpu).cpu()
    assert torch.equal(ours[[0, 2, 3]], on_cpu[0][[0, 2, 3]])
    torch.testing.assert_close(ours[1], on_cpu[0][1], rtol=2e-6, atol=0)
    for x, stats, kind in ((logits, on_cpu[0], "cpu"), (there, on_cpu[0].to(device), "triton")):
        cross_entropy_grad_(x, labels.to(x.device), stats, torch.ones(8, device=x.device), impl=kind)
    torch.testing.assert_close(logits, there.cpu(), rtol=2**-7, atol=1e-9)  # at most one rounding apart


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_torch_library_contract(device, kind):
    logits, labels = some((6,), 40, device=device if kind == "triton" else "cpu")
    labels = labels.clamp(max=38)  # column 39 is padding: a loss of NaN, which would differ from itself
    ops = torch.ops.engine_kernels
    torch.library.opcheck(ops.logit_stats.default, (logits, labels, 0, 39, True, True, kind))
    stats = ops.logit_stats(logits, labels, 0, 39, False, False, kind)
    torch.library.opcheck(ops.cross_entropy_grad_.default,
                          (logits.clone(), labels, stats[0, 0], stats[0, 1], torch.rand(6, device=logits.device), 0, 39,
                           0.9, 0.1 / 39, 1e-3, kind))
    if kind == "triton":
        torch.library.opcheck(ops.token_losses.default, (stats, labels, 39, 0.0, 1e-3))


def test_compiles():
    logits, labels = some((6,), 40)
    x = logits.clone().requires_grad_()
    compiled = torch.compile(lambda t: cross_entropy(t * 2, labels), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x), x)[0]
    theirs = torch.autograd.grad(F.cross_entropy(x * 2, labels, ignore_index=-1), x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 63, 4096, 32768, 50304, 131072, 262144])
@pytest.mark.parametrize("rows", [1, 100, 8192])
def test_parts_of_a_row_cover_it_once(width, rows):
    parts, span, options = stats_module.row_blocks(torch.empty(1, 1).expand(rows, width))
    assert parts * span >= width > (parts - 1) * span
    assert span % options["COLUMNS"] == 0
    assert options["num_warps"] <= 8


ONES, ZEROS = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(("logits", "labels", "more", "message"), [
    (ONES, torch.zeros(2, dtype=torch.int64), {}, r"labels \(2,\)"),
    (ONES, torch.zeros(3, dtype=torch.int32), {}, "int32"),
    (ONES, ZEROS, {"vocab_valid": 5}, r"vocab_valid 5 must be in 0\.\.4"),
    (ONES, ZEROS, {"reduction": "avg"}, "'avg'"),
    (ONES, torch.tensor([0, 1, 3]), {"vocab_valid": 3}, "label 3 in a vocabulary of 3"),
    (ONES, ZEROS, {"label_smoothing": 1.0}, r"label_smoothing 1\.0 must be in \[0, 1\)"),
    (ONES, ZEROS, {"z_loss": -0.1}, r"z_loss -0\.1"),
])
def test_input_that_does_not_fit_is_named(logits, labels, more, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, labels, **more)


def test_triton_refusals_name_the_argument(device):
    logits, labels = torch.ones(3, 4, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="labels is on meta"):
        logit_stats(logits, labels.to("meta"), impl="triton")
    with pytest.raises(RuntimeError, match=r"logits is torch\.int32"):
        logit_stats(logits.int(), labels, impl="triton")
    with pytest.raises(RuntimeError, match="weight is on meta"):
        cross_entropy_grad_(logits, labels, torch.ones(4, 3, device=device), torch.ones(3, device="meta"),
                            impl="triton")
    with pytest.raises(ValueError, match="needs statistics with logit_sum"):
        token_losses(torch.ones(1, 4, 3, device=device), labels, 4, label_smoothing=0.1, impl="triton")


def test_a_label_outside_the_vocabulary_is_nan_where_nobody_looked(impl, place):
    logits = torch.randn(2, 4, device=place)
    stats = logit_stats(logits, torch.tensor([4, 1], device=place), impl=impl)
    assert token_losses(stats, torch.tensor([4, 1], device=place), 4, impl=impl)[0].isnan().tolist() == [True, False]
