"""Sorting by expert, against Python's stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import jit
from engine_kernels.moe_sort import sort_by_expert, sort_mask, transpose_chunks

IMPLS = ["torch", "triton"]
HERE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(37, 8, 3), (5, 6, 6), (1, 1, 1), (1, 4, 1), (0, 4, 2), (300, 3, 2), (12, 130, 4), (3, 512, 32)]


def choices(t: int, e: int, k: int) -> torch.Tensor:
    return torch.rand(t, e).argsort(1)[:, :k].to(HERE)


def ragged(t: int, e: int, k: int) -> torch.Tensor:
    """0 to k of each row."""
    mask_te = torch.rand(t, e) < 0.5
    return (mask_te & (mask_te.cumsum(1) <= torch.randint(0, k + 1, (t, 1)))).to(HERE)


def check_choices(chosen_tk: torch.Tensor, e: int, impl: str) -> None:
    t, k = chosen_tk.shape
    counts_e, place_tk, source_p = sort_by_expert(chosen_tk, e, impl=impl)
    pairs = sorted((expert, token) for token, row in enumerate(chosen_tk.tolist()) for expert in row)
    assert source_p.tolist() == [token for _, token in pairs]
    rows = [[pairs.index((expert, token)) for expert in row] for token, row in enumerate(chosen_tk.tolist())]
    assert place_tk.shape == (t, k)
    assert place_tk.tolist() == rows
    assert counts_e.tolist() == [sum(expert == i for expert, _ in pairs) for i in range(e)]
    assert {counts_e.dtype, place_tk.dtype, source_p.dtype} == {torch.int64}


def check_mask(mask_te: torch.Tensor, k: int, impl: str) -> None:
    t, e = mask_te.shape
    counts_e, place_tk, expert_tk = sort_mask(mask_te, k, impl=impl)
    pairs = sorted((expert, token) for token, expert in mask_te.nonzero().tolist())
    assert place_tk.shape == expert_tk.shape == (t, min(k, e))
    for token in range(t):
        experts = mask_te[token].nonzero()[:, 0].tolist()
        none = [-1] * (min(k, e) - len(experts))
        assert expert_tk[token].tolist() == experts + none
        assert place_tk[token].tolist() == [pairs.index((expert, token)) for expert in experts] + none
    assert counts_e.tolist() == mask_te.sum(0).tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("t", "e", "k"), SIZES)
def test_choices(t, e, k, impl):
    check_choices(choices(t, e, k), e, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("t", "e", "k"), SIZES)
def test_masks(t, e, k, impl):
    check_mask(ragged(t, e, k), k, impl)


@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 60), e=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_triton_any_shape(t, e, share, seed):
    torch.manual_seed(seed)
    k = 1 + int(share * (e - 1))
    check_choices(choices(t, e, k), e, "triton")
    check_mask(ragged(t, e, k), k, "triton")


@pytest.mark.parametrize("processors", [1, 3, 1000])
def test_triton_is_the_same_however_many_programs(monkeypatch, processors):
    monkeypatch.setattr(jit, "multiprocessors", lambda _: processors)
    check_choices(choices(700, 4, 2), 4, "triton")
    check_mask(ragged(700, 4, 3), 3, "triton")


def test_triton_strided_and_int32():
    check_choices(choices(20, 8, 6)[::2, ::2], 8, "triton")
    check_choices(choices(20, 8, 6)[:, 1:4].int(), 8, "triton")
    check_mask(ragged(20, 16, 4)[:, 5:11], 4, "triton")  # an expert-parallel rank's part
    check_mask(ragged(8, 20, 4).t()[:, :6], 6, "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (4, 5), (2, 64), (1, 1)])
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_chunks(shape, empty, impl):
    sizes_sl = (torch.randint(1, 9, shape) * (torch.rand(shape) >= empty)).to(HERE)
    rows, chunks = int(sizes_sl.sum()), []
    for sender, sizes in enumerate(sizes_sl.tolist()):
        for expert, size in enumerate(sizes):
            chunks += [(expert, sender, i) for i in range(size)]
    place_p = transpose_chunks(sizes_sl, rows, impl=impl)
    assert place_p.tolist() == [sorted(chunks).index(row) for row in chunks]


def test_triton_library_contract():
    ops = torch.ops.engine_kernels
    torch.library.opcheck(ops.moe_sort_by_expert.default, (choices(9, 5, 2), 5))
    torch.library.opcheck(ops.moe_sort_mask.default, (ragged(9, 5, 2), 2))
    torch.library.opcheck(ops.moe_transpose_chunks.default, (torch.full((2, 3), 2, device=HERE), 12))


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"sort_by_expert: chosen_tk is torch.float32 of shape \(3, 2\)"):
        sort_by_expert(torch.zeros(3, 2), 4, impl="triton")
    with pytest.raises(ValueError, match=r"sort_mask: mask_te is torch.int64 of shape \(3, 2\), needs bool"):
        sort_mask(torch.zeros(3, 2).long(), 1, impl="triton")
    with pytest.raises(ValueError, match=r"transpose_chunks: sizes_sl is torch.int64 of shape \(6,\)"):
        transpose_chunks(torch.zeros(6).long(), 0, impl="triton")
    with pytest.raises(RuntimeError, match="chosen_tk is on meta"):
        sort_by_expert(torch.zeros(3, 2, device="meta").long(), 4, impl="triton")
