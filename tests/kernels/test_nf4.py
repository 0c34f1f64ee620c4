"""NF4: codes, scales and weights are bitsandbytes' bit for bit; every implementation gives the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_kernels import nf4
from engine_kernels.nf4 import (
    BLOCK,
    GROUP,
    LEVELS,
    Nf4,
    absmax_of,
    compressed,
    dequantise_nf4,
    dequantise_nf4_reference,
    empty,
    quantise_nf4,
    quantise_nf4_reference,
)

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def same(a: Nf4, b: Nf4) -> bool:
    return a.group == b.group and all(torch.equal(x.cpu(), y.cpu())
                                      for x, y in zip(a.tensors(), b.tensors(), strict=True))


def hard(dtype: torch.dtype, m: int = 37, k: int = 192) -> Tensor:
    """Normal weights with blocks of zeros, one outlier, tiny and huge numbers, and numbers between two levels."""
    w = torch.randn(m, k)
    w[3, :BLOCK] = 0.0
    w[4, 0], w[5] = 100.0, w[5] * (1e-30 if dtype != torch.float16 else 1e-4)
    w[6] *= 1e30 if dtype != torch.float16 else 1e3
    w[7, BLOCK:2 * BLOCK] = -1.0
    levels = torch.tensor(LEVELS)
    w[8, :15], w[8, 15] = (levels[:-1] + levels[1:]) / 2, 1.0  # with absmax 1: exactly in the middle
    w[8, 16:BLOCK].clamp_(-1, 1)
    w[9, :16], w[9, 16:BLOCK] = levels, 0.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bitsandbytes_has_the_same_bits(impl, place, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = hard(dtype)
    ours = quantise_nf4(w.to(place), impl=impl)
    codes, state = functional.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(ours.codes.cpu().flatten(), codes.flatten())
    assert torch.equal(ours.absmax.cpu().flatten(), state.absmax)
    for out in TYPES:
        theirs = torch.ops.bitsandbytes.dequantize_4bit(codes, state.absmax, BLOCK, "nf4", list(w.shape), out)
        assert torch.equal(dequantise_nf4(ours, out, impl=impl).cpu(), theirs)


def test_levels_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(LEVELS), functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_each_number_becomes_the_nearest_level(impl, place, dtype):
    w = torch.randn(21, 128, dtype=torch.float64).to(dtype)
    q = quantise_nf4(w.to(place), impl=impl)
    absmax = w.double().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    assert torch.equal(q.absmax.cpu().double(), absmax)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    exact = w.double().unflatten(-1, (-1, BLOCK)) / absmax[..., None]
    nearest = (exact[..., None] - levels).abs().amin(-1)
    found = dequantise_nf4(q, torch.float64 if impl == "torch" else torch.float32, impl=impl).cpu().double()
    error = (found.unflatten(-1, (-1, BLOCK)) / absmax[..., None] - exact).abs()
    assert (error - nearest).abs().max() < 1e-6  # a number in the middle may go either way


@settings(max_examples=12, deadline=None)
@given(m=st.integers(1, 300), blocks=st.integers(1, 6), seed=st.integers(0, 2**31), along=st.sampled_from([None, 0, 1]),
       experts=st.sampled_from([None, 1, 3]))
def test_implementations_agree_on_any_shape(m, blocks, seed, along, experts):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (m, blocks * BLOCK) if experts is None else (experts, m, blocks * BLOCK)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    q = quantise_nf4_reference(w)
    assert same(quantise_nf4(w.to(device), impl="triton"), q)
    if along is not None:
        q = compressed(q, along=along)
    parts: Any = [None if t is None else t.to(device) for t in (q.codes, q.absmax, q.low, q.step)]
    on_device = Nf4(*parts, group=q.group)
    for out in TYPES[:2]:
        assert torch.equal(dequantise_nf4(on_device, out, impl="triton").cpu(), dequantise_nf4_reference(q, out))


def test_more_than_one_program_and_group(impl, place):
    """Two groups along either dimension, the second not full; experts whose groups are their own."""
    w = torch.randn(2, 3, 300 * BLOCK).to(place) * torch.rand(2, 3, 1).to(place)
    wide = compressed(quantise_nf4(w, impl=impl), along=1)
    assert wide.low is not None
    assert wide.low.shape == (2, 3, 2)
    tall = compressed(quantise_nf4(w.reshape(2, 450, 2 * BLOCK), impl=impl), along=0)
    assert tall.low is not None
    assert tall.low.shape == (2, 2, 2)
    for q in (wide, tall):
        whole = dequantise_nf4(q, torch.float32, impl=impl)
        assert torch.equal(whole, dequantise_nf4_reference(q, torch.float32))
        for i in range(2):
            assert torch.equal(dequantise_nf4(q[i], torch.float32, impl=impl), whole[i])


@pytest.mark.parametrize("along", [0, 1])
def test_compressed_scales_are_off_by_half_a_step_at_most(along):
    q = quantise_nf4_reference(torch.randn(600, 5 * BLOCK) * torch.rand(600, 1) * 3)
    found = compressed(q, along=along)
    assert found.absmax.dtype == torch.uint8
    assert torch.equal(found.codes, q.codes)
    groups = q.absmax.t() if along == 0 else q.absmax
    for row, ours in zip(groups, absmax_of(found).t() if along == 0 else absmax_of(found), strict=True):
        for part, approximate in zip(row.split(GROUP), ours.split(GROUP), strict=True):
            low = part.min() * (1 - 2.0**-7)  # as low as bf16 rounds it
            step = (part.max() - low) / 255 * (1 + 2.0**-7)
            assert (part - approximate).abs().max() <= step / 2 + 1e-7


def test_compressed_scales_cost_less_than_bitsandbytes_adds_error():
    """The error of a weight's dequantised form grows by less than a hundredth, as bitsandbytes' does."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(512, 1024)
    q = quantise_nf4_reference(w)
    plain, ours = (dequantise_nf4_reference(x, torch.float32) for x in (q, compressed(q, along=1)))
    codes, state = functional.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_4bit(codes, state)
    assert (ours - plain).norm() <= (theirs - plain).norm()
    assert (ours - w).norm() <= 1.0001 * (plain - w).norm()


def test_compressed_scales_of_special_blocks():
    """Equal scales come back exactly where bf16 holds them; zero stays zero beside others."""
    w = torch.zeros(3, 4 * BLOCK)
    w[1] = 0.5
    w[2, BLOCK:] = torch.randn(3 * BLOCK)
    for along in (0, 1):
        q = compressed(quantise_nf4_reference(w), along=along)
        found = dequantise_nf4_reference(q, torch.float32)
        assert not found[0].any()
    assert torch.equal(dequantise_nf4_reference(compressed(quantise_nf4_reference(w[1:2]), along=1), torch.float32),
                       w[1:2])


@pytest.mark.parametrize("along", [0, 1])
def test_what_ranks_hold_are_parts_of_the_whole(along):
    """Rows split wherever, columns between blocks; groups along the dimension that is whole."""
    w = torch.randn(520, 8 * BLOCK)
    whole = compressed(quantise_nf4_reference(w), along=along)
    parts = w.split([130, 390], 0) if along == 1 else w.split([3 * BLOCK, 5 * BLOCK], 1)
    found = [dequantise_nf4_reference(compressed(quantise_nf4_reference(part), along=along), torch.float32)
             for part in parts]
    assert torch.equal(torch.cat(found, 1 - along), dequantise_nf4_reference(whole, torch.float32))


def test_four_bits_and_an_eighth():
    q = quantise_nf4_reference(torch.randn(1024, 4096))
    bits = 8 / (1024 * 4096)
    assert q.nbytes * bits == 4.5
    assert compressed(q, along=0).nbytes * bits == 4 + 1 / 8 + 32 / (64 * 256)
    assert empty(1024, 4096).nbytes == q.nbytes
    assert empty(1024, 4096, group=(256, 1)).nbytes == compressed(q, along=0).nbytes


def test_numbers_that_are_not_finite_show_in_the_scale(impl, place):
    w = torch.randn(3, 2 * BLOCK)
    w[0, 3], w[1, 70], w[2, 0] = math.nan, math.inf, -math.inf
    q = quantise_nf4(w.to(place), impl=impl)
    assert q.absmax.isfinite().tolist() == [[False, True], [True, False], [False, True]]


def test_strides_and_empty_tensors(impl, place):
    w = torch.randn(2 * BLOCK, 10).to(place)
    assert same(quantise_nf4(w.t(), impl=impl), quantise_nf4(w.t().contiguous(), impl=impl))
    none = quantise_nf4(w.new_empty(0, BLOCK), impl=impl)
    assert dequantise_nf4(none, torch.float32, impl=impl).shape == (0, BLOCK)
    assert dequantise_nf4(compressed(none, along=1), torch.float32, impl=impl).shape == (0, BLOCK)


def test_library_ops(device):
    w = torch.randn(4, 2 * BLOCK, device=device)
    q, ops = quantise_nf4(w, impl="triton"), torch.ops.engine_kernels
    torch.library.opcheck(ops.nf4_quantise, (w,))
    torch.library.opcheck(ops.nf4_dequantise, (q.codes, q.absmax, None, None, 1, GROUP, torch.bfloat16))
    small = compressed(q, along=0)
    torch.library.opcheck(ops.nf4_dequantise, (small.codes, small.absmax, small.low, small.step, GROUP, 1,
                                               torch.float32))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"quantise_nf4: weight has shape \(3, 65\), needs rows of a multiple of 64"):
        quantise_nf4(torch.randn(3, 65))
    q = quantise_nf4(torch.randn(3, 128))
    with pytest.raises(ValueError, match=r"absmax is torch\.float16"):
        dequantise_nf4(Nf4(q.codes, q.absmax.half()))
    with pytest.raises(ValueError, match=r"absmax is torch.float32 \(2, 2\), needs torch.float32 \(3, 2\)"):
        dequantise_nf4(Nf4(q.codes, q.absmax[:2]))
    with pytest.raises(ValueError, match=r"codes are torch\.int32"):
        dequantise_nf4(Nf4(q.codes.int(), q.absmax))
    small = compressed(q, along=1)
    with pytest.raises(ValueError, match="low and step come together"):
        dequantise_nf4(Nf4(small.codes, small.absmax, small.low, None))
    with pytest.raises(ValueError, match=r"step is torch.bfloat16 \(1, 1\), needs torch.bfloat16 \(3, 1\)"):
        dequantise_nf4(Nf4(small.codes, small.absmax, small.low, small.step[:1]))  # type: ignore[index]
    with pytest.raises(ValueError, match="in 8 bits already"):
        compressed(small, along=1)
    with pytest.raises(ValueError, match=r'impl must be one of "auto", "torch", "triton", not .cpu.'):
        quantise_nf4(torch.randn(3, 128), impl="cpu")
    with pytest.raises(RuntimeError, match=r"weight is torch\.int64"):
        quantise_nf4(torch.ones(3, 128, dtype=torch.int64), impl="triton")


def test_bounds_lie_between_the_levels():
    bounds = nf4._bounds(torch.device("cpu"))
    assert ((torch.tensor(LEVELS[:-1]) < bounds) & (bounds < torch.tensor(LEVELS[1:]))).all()
