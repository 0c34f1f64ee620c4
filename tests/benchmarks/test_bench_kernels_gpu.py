"""The kernels' suite at tiny scale: in the interpreter, through the same code as on a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels_gpu, correctness, timing
from benchmarks.cases import Case, Random
from benchmarks.workers import kernels_worker
from benchmarks.workers.protocol import WorkerError

CPU = torch.device("cpu")


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)  # run.py's
    bench_kernels_gpu.add_options(parser.add_argument_group())
    return parser.parse_args(["--scale", "tiny", "--device", "cpu", "--threads", "1", "--compile", "none",
                              "--samples", "3", *argv])


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def case(ours=square, **changes) -> Case:
    return dataclasses.replace(
        Case("square", "8x4", lambda new: (new.normal(8, 4, dtype=torch.float32, grad=True),),
             {"ours": ours, "eager": square}, forward_bytes=1e3, forward_flops=2e3, backward_bytes=3e3,
             backward_flops=4e3), **changes)


def test_every_part_of_a_case_is_a_row(capsys):
    machine, *rows = bench_kernels_gpu.run(options("--ops", "rms_norm"))
    assert machine.values["% copy"] == 100
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    parts = ("forward", "backward", "both")
    assert {name.rsplit(" ", 1)[1] for name in names} == set(parts)
    forward, backward, both = (next(row for row in rows if row.name.endswith(part)) for part in parts)
    for row in rows:
        assert not row.failed
        assert row.values["ms"] > 0
        assert row.values["x eager"] > 0
    assert 0 <= forward.values["error"] < 2e-2
    assert both.values["ms"] > backward.values["ms"]
    assert both.values["GB/s"] > 0
    assert f"{forward.name}: ms " in capsys.readouterr().out


def test_when_time_is_over_the_rest_is_named():
    *_, last = bench_kernels_gpu.run(options("--ops", "rms_norm", "--seconds", "0"))
    assert last.name == "not measured"
    assert "add_rms_norm 3x130 bfloat16" in last.values["note"]


def test_the_largest_case_of_each_op_comes_first():
    def sized(op, size):
        return case(op=op, size=str(size), forward_bytes=float(size))

    jobs = bench_kernels_gpu.jobs({"one": [sized("a", 10), sized("a", 30), sized("b", 5)], "two": [sized("c", 99)]})
    assert [(job.case.op, job.case.size, job.first) for job in jobs] == [
        ("a", "30", True), ("b", "5", True), ("c", "99", True), ("a", "10", False)]
    assert jobs[2].request("first", []) == {"file": "two", "op": "c", "size": "99", "without": [], "compile": True}
    assert jobs[3].request("first", ["liger"])["compile"] is False


# --- right or wrong --------------------------------------------------------------------------------------------------

class Wrong(torch.autograd.Function):
    """Right values, a gradient that is off by a percent."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        return 2.02 * ctx.saved_tensors[0] * dy


def unwritten(x):
    y = torch.empty_like(x)
    y[:-1] = (x * x)[:-1]
    return y


@pytest.mark.parametrize(("changes", "where", "error"), [
    ({}, "", 0.0),
    ({"ours": lambda x: (x * x * 1.05).detach().requires_grad_() + 0 * x}, "gradient 0", 1.0),
    ({"ours": lambda x: x * x * 1.05, "backward_bytes": None}, None, 0.05),
    ({"ours": Wrong.apply, "tolerance": 1e-3}, "gradient 0", 0.01),
    ({"ours": unwritten, "backward_bytes": None}, "output 0", math.nan),
    ({"ours": lambda x: (x * x, x), "backward_bytes": None}, "", math.nan),
    ({"ours": lambda x: (x * x)[1:]}, "", math.nan),
    ({"ours": lambda x: (x * x).detach()}, "", math.nan),
])
def test_wrong_results_are_found(changes, where, error):
    found = correctness.check(case(**changes), Random())
    assert bool(found.problem) == (error != 0)
    assert where is None or found.where == where or error == 0
    assert found.error == pytest.approx(error, abs=1e-6, rel=1e-3, nan_ok=True)


def test_poison_is_gone_afterwards():
    with correctness.poisoned_memory():
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_each_implementation_gets_arguments_of_its_own():
    x = torch.randn(3, requires_grad=True)
    copy, number = correctness.fresh([x, 5], torch.float64)
    assert copy.dtype == torch.float64
    assert copy.requires_grad
    assert number == 5
    with torch.no_grad():
        copy.zero_()
    assert x.abs().sum() > 0


def measured(tmp_path, changed: Case, **request) -> dict:
    config = {"progress": str(tmp_path / "progress"), "samples": 3, "seconds": 1.0}
    return kernels_worker.measure(changed, CPU, {"compile": False, "without": []} | request, config)


def broken(*_):
    raise RuntimeError("no such GPU\nand more")


def test_an_alternative_that_fails_is_noted_and_ends_nothing(tmp_path):
    runs = {"ours": square, "eager": square, "liger": broken}
    answer = measured(tmp_path, case(runs=runs))
    assert set(answer["times"]) == {"ours", "eager"}
    assert answer["failed"] == {"liger": "RuntimeError: no such GPU"}
    json.dumps(answer, allow_nan=False)
    facts = {"copy": 1e9, "bf16": 1e12, "fp8": None, "device": "NVIDIA H200"}
    forward, backward, both = bench_kernels_gpu.case_rows(case(), answer, facts)
    assert forward.values["note"] == "liger: RuntimeError: no such GPU"
    assert not forward.failed
    seconds = forward.values["ms"] / 1e3
    assert forward.values["GB/s"] == pytest.approx(1e-6 / seconds)
    assert forward.values["% copy"] == pytest.approx(100 * 1e3 / seconds / 1e9)
    assert backward.values["% matmul"] == pytest.approx(100 * 4e3 / (backward.values["ms"] / 1e3) / 1e12)
    assert both.values["floor ms"] == pytest.approx(1e3 * 4e3 / 4.8e12)
    assert "liger" not in measured(tmp_path, case(runs=runs), without=["liger"])["failed"]


def test_our_failure_is_a_failed_row(tmp_path):
    answer = measured(tmp_path, case(ours=broken, runs={"ours": broken, "eager": square}))
    [row] = bench_kernels_gpu.case_rows(case(), answer, {})
    assert row.failed == "RuntimeError: no such GPU"
    answer = measured(tmp_path, case(ours=lambda x: x * x * 1.05))
    row = next(bench_kernels_gpu.case_rows(case(), answer, {"copy": 1.0, "bf16": 1.0, "fp8": 1.0, "device": "cpu"}))
    assert re.match("(output|gradient) 0 is off by 5.0e-02", row.failed)
    assert row.values["ms"] > 0  # measured all the same


def test_eager_is_compiled_where_it_is_asked_for(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: compiled.append(run) or run)
    answer = measured(tmp_path, case(), compile=True)
    assert compiled == [square]
    assert set(answer["times"]) == {"ours", "eager", "compile"}
    assert len(answer["times"]["compile"]["backward"]) == 3


# --- a worker that dies ----------------------------------------------------------------------------------------------

class FakeWorker:
    """Loses the device in "liger"; hangs in "ours" of the op "endless"."""

    started = 0

    def __init__(self, _name, _module, config, **_):
        FakeWorker.started += 1
        self.progress = Path(config["progress"])
        self.facts = {"copy": 1e9, "bf16": 1e12, "fp8": None, "device": "cpu"}

    def ask(self, request, _seconds):
        if request["op"] == "endless":
            self.progress.write_text("ours")
            raise WorkerError("no answer within 60 s")
        if "liger" not in request["without"]:
            return {"lost": True, "failed": {"liger": "illegal memory access"}}
        times = {"ours": {"forward": [1.0, 1.0], "training forward": [1.0, 1.0], "backward": [1.0, 1.0]}}
        return {"lost": False, "failed": {}, "times": times, "methods": {"ours": "graph"}, "error": 0.0, "problem": ""}

    def close(self):
        pass


def test_a_lost_device_costs_one_implementation(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels_gpu, "Worker", FakeWorker)
    FakeWorker.started = 0
    bench = bench_kernels_gpu.Bench(options())
    bench.progress = tmp_path / "progress"
    forward, *_ = bench.rows(bench_kernels_gpu.Job("file", case(), True), 60.0)
    assert forward.values["ms"] == 1000.0
    assert forward.values["note"] == "liger: illegal memory access"
    [endless] = bench.rows(bench_kernels_gpu.Job("file", case(op="endless"), True), 60.0)
    assert endless.failed == "no answer within 60 s"
    assert next(bench.rows(bench_kernels_gpu.Job("file", case(), True), 60.0)).name == "square 8x4 forward"
    assert FakeWorker.started == 4  # the first, one after liger, one after the endless one, and one after liger again


def test_slow_implementations_get_fewer_samples():
    calls = {"fast": 0, "slow": 0}

    def part(name, seconds):
        def call():
            calls[name] += 1
            torch.randn(10)
            if seconds:
                import time
                time.sleep(seconds)
        return call

    prepared = {name: timing.Prepared({"forward": part(name, seconds)}, 1, "calls")
                for name, seconds in (("fast", 0), ("slow", 0.02))}
    found = timing.interleaved(prepared, CPU, 20, 0.01)
    assert len(found["fast"]["forward"]) == 20
    assert len(found["slow"]["forward"]) == 5
    assert min(found["slow"]["forward"]) >= 0.02


def test_a_sample_moves_about_a_gigabyte():
    gpu = torch.device("cuda")
    assert timing.sets_of(case(forward_bytes=2.0**28), gpu) == 4
    assert timing.sets_of(case(forward_bytes=2.0**32), gpu) == 1
    assert timing.sets_of(case(forward_bytes=1.0), gpu) == timing.MOST_SETS
    assert timing.sets_of(case(forward_bytes=2.0**20, forward_flops=1e12), gpu) == 1  # a large product
    assert timing.sets_of(case(), CPU) == 1
