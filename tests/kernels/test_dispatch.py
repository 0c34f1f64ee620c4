"""The choice of implementation: what "auto" takes, what "cpu" refuses, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine_kernels import _cpu, dispatch, jit


def one(dtype=torch.float32, device="cpu"):
    return torch.ones(2, dtype=dtype, device=device)


def test_auto_takes_the_kernel_for_fp32_and_bf16_and_torch_for_the_rest():
    assert dispatch.choose("auto", "op", {"x": one()}) == "cpu"
    assert dispatch.choose("auto", "op", {"x": one(torch.bfloat16)}) == "cpu"
    assert dispatch.choose("auto", "op", {"x": one(torch.float64)}) == "torch"
    assert dispatch.choose("auto", "op", {"x": one(), "y": one(torch.bfloat16)}) == "torch"
    assert dispatch.choose("auto", "op", {"x": one(device="meta")}) == "torch"
    assert dispatch.choose("auto", "op", {"x": one()}, {"w": one(device="meta")}) == "torch"
    assert dispatch.choose("auto", "op", {"x": one()}, {"w": one(torch.int64)}) == "cpu"
    assert dispatch.choose("auto", "op", {"x": one()}, kernels=("triton",)) == "torch"
    assert dispatch.choose("torch", "op", {"x": one()}) == "torch"


@pytest.mark.parametrize(("tensor", "reason"), [
    (one(torch.float16), "gate is torch.float16, needs float32 or bfloat16"),
    (one(device="meta"), "gate is on meta"),
])
def test_cpu_that_cannot_run_says_why(tensor, reason):
    with pytest.raises(RuntimeError, match=reason):
        dispatch.choose("cpu", "swiglu", {"gate": tensor})


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r'must be one of "auto", "torch", "cpu", "triton", not \'cuda\''):
        dispatch.choose("cuda", "swiglu", {"x": one()})
    with pytest.raises(ValueError, match="'cpu'"):
        dispatch.choose("cpu", "swiglu", {"x": one()}, kernels=("triton",))


def test_triton_takes_cpu_tensors_only_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(jit, "interpreted", lambda: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert dispatch.choose("triton", "op", {"x": one(dtype)}, {"labels": one(torch.int64)}) == "triton"
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r'op: impl="triton" cannot run: labels is on cpu; Triton kernels need a'):
        dispatch.choose("triton", "op", {"x": one(device="cuda") if torch.cuda.is_available() else CudaLike()},
                        {"labels": one(torch.int64)})


class CudaLike:
    """Stands for a tensor on a GPU."""

    dtype, device = torch.float32, torch.device("cuda", 0)


@pytest.mark.parametrize(("same", "others", "reason"), [
    ({"x": one(torch.int32)}, {}, "x is torch.int32, needs float32, bfloat16, float16 or float64"),
    ({"x": one(), "residual": one(torch.bfloat16)}, {}, "residual is torch.bfloat16, but x is torch.float32"),
    ({"x": one()}, {"weight": one(device="meta")}, "weight is on meta"),
])
def test_triton_that_cannot_run_names_the_argument(monkeypatch, same, others, reason):
    monkeypatch.setattr(jit, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=reason):
        dispatch.choose("triton", "op", same, others)


def test_without_triton_auto_is_torch_on_a_gpu_and_triton_says_so(monkeypatch):
    monkeypatch.setattr(jit, "_missing", "No module named 'triton'")
    assert dispatch.choose("auto", "op", {"x": CudaLike()}) == "torch"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        dispatch.choose("triton", "op", {"x": one()})


def test_auto_on_a_gpu_is_the_triton_kernel():
    assert dispatch.choose("auto", "op", {"x": CudaLike()}) == "triton"


def test_without_the_extension_auto_is_torch_and_cpu_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "_extension", None)
    monkeypatch.setattr(dispatch, "_missing", "No module named '_cpu'")
    assert dispatch.choose("auto", "op", {"x": one()}) == "torch"
    with pytest.raises(RuntimeError, match=r"_cpu is not built \(No module named"):
        dispatch.choose("cpu", "op", {"x": one()})
    with pytest.raises(RuntimeError, match="is not built"):
        dispatch.extension()


def test_each_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.INFO, "engine_kernels"):
        for _ in range(3):
            dispatch.choose("auto", "op", {"x": one()})
            dispatch.choose("auto", "op", {"x": one(torch.float64)})
    assert caplog.messages == ["op: C++ kernel", "op: plain torch (x is torch.float64, needs float32 or bfloat16)"]


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


def test_every_kernel_file_imports_without_triton():
    """On macOS there is none: ops still run through torch or C++."""
    folder = Path(dispatch.__file__).parent
    names = [path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "interpreter")]
    code = f"""
import importlib, sys
sys.modules["triton"] = None
for name in {names}:
    importlib.import_module("engine_kernels." + name)
import torch
from engine_kernels.rms_norm import rms_norm
assert rms_norm(torch.ones(2, 4), torch.ones(4), eps=0.0).eq(1).all()
try:
    rms_norm(torch.ones(2, 4), torch.ones(4), eps=0.0, impl="triton")
except RuntimeError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
