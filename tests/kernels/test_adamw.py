"""adamw_ against its float64 reference and torch's fused step; stochastic rounding; masters in two halves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import adamw
from engine_kernels.adamw import Place, adamw_, adamw_reference
from engine_kernels.stochastic import join_master, random_halves, round_stochastic, split_master

F32, BF16 = torch.float32, torch.bfloat16
NUMBERS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
FORMS = {"fp32": (F32, False), "remainder": (BF16, True), "stochastic": (BF16, False)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(6, 16), (7, 5), (1,), (0,), (4104,), (2, 3, 8)]


def tensors(shapes, form="fp32", grad=F32, moments=F32, scale=1.0):
    """Parameters, gradients, moments and remainders as adamw_ takes them."""
    dtype, remainder = FORMS[form]
    made = [[(torch.randn(shape) * scale).to(kind).to(DEVICE) for shape in shapes] for kind in (dtype, grad)]
    for factor in (0.1, scale):
        made.append([(torch.rand(shape) * scale * factor).to(moments).to(DEVICE) for shape in shapes])
    low = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).to(DEVICE) for shape in shapes]
    return [*made, low if remainder else None]


def copies(found):
    return [None if kind is None else [t.clone() for t in kind] for kind in found]


def wide(found, i):
    """The numbers that tensor i's param, grad and moments stand for, in float64."""
    params, grads, m, v, low = found
    param = params[i].double() if low is None else join_master(params[i], low[i]).double()
    return param, grads[i].double(), m[i].double(), v[i].double()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("moments", [F32, BF16])
@pytest.mark.parametrize("grad", [F32, BF16])
@pytest.mark.parametrize("form", FORMS)
def test_values(form, grad, moments, impl):
    """What is fp32 is exact to rounding; a bf16 is one of the two neighbours of the exact number."""
    found = tensors(SHAPES, form, grad, moments)
    scale = torch.tensor(0.3, device=DEVICE)
    exact = [adamw_reference(*wide(found, i), **NUMBERS, step=7, grad_scale=0.3) for i in range(len(SHAPES))]
    before = copies(found)
    adamw_(*found, **NUMBERS, step=7, grad_scale=scale, impl=impl)
    for i, numbers in enumerate(exact):
        assert torch.equal(found[1][i], before[1][i]), "gradients stay"
        param, _, m, v = wide(found, i)
        for value, expected, dtype in ((param, numbers[0], BF16 if form == "stochastic" else F32),
                                       (m, numbers[1], moments), (v, numbers[2], moments)):
            rtol = 2.0**-7 if dtype == BF16 else 1e-6
            torch.testing.assert_close(value.cpu(), expected.cpu(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(("moments", "form"), list(itertools.product([F32, BF16], FORMS)))
def test_both_paths_store_the_same(moments, form):
    """The same random bits, whether elements come in groups of eight or not: only fp32 roundings may differ."""
    shapes = [(16, 24), (33,), (40, 3)]
    places = [Place(2**62 + 5, 48, 24, 3, 2), Place(9, 3), Place(77, 0, 6, 4, 1)]
    one = tensors(shapes, form, F32, moments)
    other = copies(one)
    for step in (1, 2**33):
        adamw_(*one, **NUMBERS, step=step, places=places, impl="triton")
        adamw_(*other, **NUMBERS, step=step, places=places, impl="torch")
    for kind, same in zip(one, other, strict=True):
        for a, b in zip(kind or [], same or [], strict=True):
            if a.dtype == BF16:
                assert (a != b).float().mean() < 0.01
            elif a.dtype == F32:
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)


def test_equals_torch_fused_over_many_magnitudes():
    """Also where squares underflow or overflow: 1e-30, 0, 1e30."""
    ours = tensors([(64,), (64,), (64,), (8,)])
    ours[2], ours[3] = ([torch.zeros_like(t) for t in ours[0]] for _ in range(2))
    ours[1] = [t * scale for t, scale in zip(ours[1], (1.0, 1e-30, 1e30, 0.0), strict=True)]
    theirs = copies(ours)
    for step in range(1, 6):
        adamw_(*ours[:4], **NUMBERS, step=step, impl="triton")
        torch._fused_adamw_(*theirs[:4], [], [torch.tensor(float(step), device=DEVICE)] * 4, **NUMBERS,
                            amsgrad=False, maximize=False)
    for kind, same in zip(ours[:4], theirs[:4], strict=True):
        for a, b in zip(kind, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            assert not a.isnan().any()
    assert ours[3][2].isinf().all()  # as torch's: the update is then zero
    assert not ours[3][3].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_extreme_gradients_in_two_bytes(scale, impl):
    found = tensors([(256,)], "remainder", F32, BF16)
    found[2][0].zero_()
    found[3][0].zero_()
    before = join_master(found[0][0], found[4][0])
    found[1] = [found[1][0] * scale]
    exact = adamw_reference(*wide(found, 0), **NUMBERS, step=1)[0]
    adamw_(*found, **NUMBERS, step=1, impl=impl)
    after = join_master(found[0][0], found[4][0])
    assert after.isfinite().all()
    # Below eps, and where squares overflow in fp32, nothing is left but decay.
    expected = before.double() * (1 - 3e-4) if scale in (1e-30, 1e30) else exact
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_zero_gradients_leave_zero_moments_and_decay(impl):
    found = tensors([(40,)], "remainder", F32, BF16)
    before = join_master(found[0][0], found[4][0])
    for kind in found[1:4]:
        kind[0].zero_()
    adamw_(*found, **NUMBERS, step=3, impl=impl)
    assert not found[2][0].any()
    assert not found[3][0].any()
    torch.testing.assert_close(join_master(found[0][0], found[4][0]), before * (1 - 3e-4), rtol=2e-7, atol=0)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_step_that_changes_nothing_leaves_both_halves(impl):
    """Also of numbers halfway between two bf16, which are the upper one's, with a negative remainder."""
    found = tensors([(48,)], "remainder")
    found[4][0][:3] = torch.tensor([-(2**15), 2**15 - 1, 0], dtype=torch.int16)
    before = copies(found)
    adamw_(*found, **{**NUMBERS, "lr": 0.0}, step=1, impl=impl)
    assert torch.equal(found[0][0], before[0][0])
    assert torch.equal(found[4][0], before[4][0])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 70), start=st.integers(0, 40), seed=st.integers(0, 2**31), form=st.sampled_from(list(FORMS)))
def test_any_size(n, start, seed, form):
    torch.manual_seed(seed)
    found = tensors([(n,), (8,)], form, F32, BF16)
    exact = adamw_reference(*wide(found, 0), **NUMBERS, step=2)
    adamw_(*found, **NUMBERS, step=2, places=[Place(seed, start), Place(1)], impl="triton")
    for value, expected in zip((wide(found, 0)[0], *wide(found, 0)[2:]), exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=2.0**-7, atol=1e-7)


def test_views_at_any_address():
    """Shards of a flat buffer begin anywhere; neighbours are not touched."""
    whole = tensors([(256,)], "remainder", F32, BF16)
    reference = copies(whole)
    cut = lambda found: [[t[0][9:201]] for t in found]  # noqa: E731
    adamw_(*cut(whole), **NUMBERS, step=4, places=[Place(3, 9)], impl="triton")
    adamw_(*reference, **NUMBERS, step=4, places=[Place(3)], impl="triton")
    for a, b in zip(whole, reference, strict=True):
        assert torch.equal(a[0][9:201], b[0][9:201])
    assert not torch.equal(whole[0][0], reference[0][0])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_rounds_as_the_whole(dim, impl):
    """A weight of gate and up rows, whole, and in two tensor-parallel parts of which one is cut in two slices."""
    whole = [kind[0].view(8, 16) for kind in tensors([(128,)], "stochastic", F32, BF16)[:4]]
    parts = []
    for index in range(2):
        part = [torch.cat([block.chunk(2, dim)[index] for block in t.chunk(2, 0)], 0) if dim == 0
                else t.chunk(2, dim)[index] for t in whole]
        parts.append([t.contiguous() for t in part])
    run = 2 * 16 if dim == 0 else 8
    adamw_(*([t] for t in whole), **NUMBERS, step=9, places=[Place(5)], impl=impl)
    adamw_(*([t] for t in parts[0]), **NUMBERS, step=9, places=[Place(5, 0, run, 2, 0)], impl=impl)
    for a, b in ((0, 24), (24, 64)):
        adamw_(*([t.view(-1)[a:b]] for t in parts[1]), **NUMBERS, step=9, places=[Place(5, a, run, 2, 1)], impl=impl)
    for k, t in enumerate(whole):
        for index in range(2):
            expected = (torch.cat([block.chunk(2, 0)[index] for block in t.chunk(2, 0)], 0) if dim == 0
                        else t.chunk(2, 1)[index])
            assert torch.equal(parts[index][k], expected)


def test_rounding_is_unbiased_and_repeats():
    x = torch.full((1 << 16,), 1.0 + 2.0**-7 * 0.3)
    found = round_stochastic(x, Place(1), 5, 0)
    assert set(found.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert ((found > 1).float().mean().item() - 0.3) == pytest.approx(0.0, abs=4 * (0.21 / 2**16) ** 0.5)
    assert torch.equal(found, round_stochastic(x, Place(1), 5, 0))
    for other in (round_stochastic(x, Place(2), 5, 0), round_stochastic(x, Place(1), 6, 0),
                  round_stochastic(x, Place(1), 5, 1)):
        assert 0.3 < (found != other).float().mean() < 0.54  # 2 · 0.3 · 0.7 if they are independent


def test_random_bits_are_philox():
    """The words of Philox4x32-7 for zero, from the authors' known answers (Random123, kat_vectors)."""
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    expected = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert random_halves(8, Place(0), 0, 0).tolist() == expected
    assert random_halves(3, Place(0, 5), 0, 0).tolist() == expected[5:]


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1))
def test_any_32_bits_are_a_bf16_and_a_remainder(bits):
    x = torch.tensor([bits], dtype=torch.int32)
    high, low = split_master(x.view(F32))
    assert torch.equal(join_master(high, low).view(torch.int32), x)
    if x.view(F32).isfinite() and bits & 0xFFFF != 0x8000:  # not between two: as torch rounds
        assert torch.equal(high, x.view(F32).bfloat16())


def test_what_is_not_finite_stays_so():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert round_stochastic(x, Place(), 1, 0).tolist()[:2] == [torch.inf, -torch.inf]
    assert round_stochastic(x, Place(), 1, 0)[2].isnan()


def test_a_table_is_made_once(monkeypatch):
    made = []
    original = adamw._made
    monkeypatch.setattr(adamw, "_made", lambda *args: made.append(1) or original(*args))
    monkeypatch.setattr(adamw, "_tables", {})
    found = tensors([(16,), (8,)])
    for step in (1, 2, 3):
        adamw_(*found[:4], **NUMBERS, step=step, impl="triton")
    assert len(made) == 1
    found[1][0] = found[1][0].clone()
    adamw_(*found[:4], **NUMBERS, step=4, impl="triton")
    assert len(made) == 2
    (grouped, table, blocks), = adamw._found(list(found[:4]), [0] * 10)
    assert grouped, "one launch"
    assert table.shape == (2, 11)
    assert len(blocks) == 2


@pytest.mark.parametrize("form", FORMS)
def test_torch_library_contract(form):
    found = tensors([(16,), (5,)], form, F32, BF16)
    places = [number for place in (Place(1), Place(2)) for number in place]
    arguments = (*found[:4], found[4] or [], places, torch.tensor(0.5, device=DEVICE), *NUMBERS.values(), 3)
    torch.library.opcheck(torch.ops.engine_kernels.adamw_.default, arguments)


def test_refusals_name_the_argument():
    p, g, m, v, _ = tensors([(16,), (8,)])
    low = [t.to(torch.int16) for t in p]
    step = {**NUMBERS, "step": 1}
    with pytest.raises(ValueError, match=r"adamw_: grads has 1 tensors, needs 2"):
        adamw_(p, g[:1], m, v, **step)
    with pytest.raises(ValueError, match=r"exp_avgs\[1\] is torch.float16, needs float32 or bfloat16"):
        adamw_(p, g, [m[0], m[1].half()], v, **step)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] is \(8,\) on .*, needs 16 contiguous elements"):
        adamw_(p, g, m, [v[1], v[1]], **step)
    with pytest.raises(ValueError, match=r"grads\[0\] is \(16,\)"):
        adamw_(p, [torch.stack([g[0], g[0]], 1)[:, 0], g[1]], m, v, **step)
    with pytest.raises(ValueError, match=r"remainders are for bfloat16 params, not torch.float32"):
        adamw_(p, g, m, v, low, **step)
    with pytest.raises(ValueError, match=r"remainders\[0\] is torch.float32, needs int16"):
        adamw_([t.bfloat16() for t in p], g, m, v, p, **step)
    with pytest.raises(ValueError, match="places has 1 items, needs 2"):
        adamw_(p, g, m, v, places=[Place()], **step)
    with pytest.raises(ValueError, match="impl must be one of"):
        adamw_(p, g, m, v, impl="cpu", **step)
    with pytest.raises(RuntimeError, match="grad_scale is on meta"):
        adamw_(p, g, m, v, grad_scale=torch.tensor(1.0, device="meta"), impl="triton", **step)
    with pytest.raises(RuntimeError, match='impl="triton" cannot run: params is on meta'):
        adamw_(*([t.to("meta") for t in kind] for kind in (p, g, m, v)), impl="triton", **step)
