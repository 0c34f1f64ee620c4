"""The choice of implementation: what "auto" takes, what "cpu" refuses, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from engine_kernels import _cpu, dispatch


def test_auto_takes_the_kernel_for_fp32_and_bf16_and_torch_for_the_rest():
    assert dispatch.choose("auto", "op", torch.ones(2)) == "cpu"
    assert dispatch.choose("auto", "op", torch.ones(2, dtype=torch.bfloat16)) == "cpu"
    assert dispatch.choose("auto", "op", torch.ones(2, dtype=torch.float64)) == "torch"
    assert dispatch.choose("auto", "op", torch.ones(2), torch.ones(2, dtype=torch.bfloat16)) == "torch"
    assert dispatch.choose("auto", "op", torch.ones(2, device="meta")) == "torch"
    assert dispatch.choose("auto", "op", torch.ones(2), others=(torch.ones(2, device="meta"),)) == "torch"
    assert dispatch.choose("auto", "op", torch.ones(2), others=(torch.ones(2, dtype=torch.int64),)) == "cpu"
    assert dispatch.choose("torch", "op", torch.ones(2)) == "torch"


@pytest.mark.parametrize(("tensor", "reason"), [
    (torch.ones(2, dtype=torch.float16), "dtype torch.float16"),
    (torch.ones(2, device="meta"), "a tensor on meta"),
])
def test_cpu_that_cannot_run_says_why(tensor, reason):
    with pytest.raises(RuntimeError, match=reason):
        dispatch.choose("cpu", "swiglu", tensor)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'triton'"):
        dispatch.choose("triton", "swiglu", torch.ones(2))


def test_without_the_extension_auto_is_torch_and_cpu_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "_extension", None)
    monkeypatch.setattr(dispatch, "_missing", "No module named '_cpu'")
    assert dispatch.choose("auto", "op", torch.ones(2)) == "torch"
    with pytest.raises(RuntimeError, match=r"_cpu is not built \(No module named"):
        dispatch.choose("cpu", "op", torch.ones(2))
    with pytest.raises(RuntimeError, match="is not built"):
        dispatch.extension()


def test_each_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.INFO, "engine_kernels"):
        for _ in range(3):
            dispatch.choose("auto", "op", torch.ones(2))
            dispatch.choose("auto", "op", torch.ones(2, dtype=torch.float64))
    assert caplog.messages == ["op: C++ kernel", "op: plain torch (dtype torch.float64, needs float32 or bfloat16)"]


def test_threads_follow_torch_and_the_size():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert dispatch.num_threads(0) == dispatch.num_threads(dispatch._ELEMENTS_A_THREAD) == 1
    assert dispatch.num_threads(10**9) == 2
    torch.set_num_threads(1)
    assert dispatch.num_threads(10**9) == 1
    torch.set_num_threads(before)


def test_an_instruction_set_that_is_unknown_changes_nothing():
    before = _cpu.instruction_set()
    assert not _cpu.use_instruction_set("amx")
    assert _cpu.instruction_set() == before


def test_rows_are_viewed_where_possible():
    x = torch.arange(24.0).view(4, 6)
    assert dispatch.as_rows(x[:, :3]).data_ptr() == x.data_ptr()
    assert dispatch.as_rows(x[:, ::2]).is_contiguous()
    assert dispatch.as_rows(torch.ones(1).expand(4, 6)).stride(1) == 1
    assert dispatch.as_rows(torch.ones(3, 0)).shape == (0, 0)
