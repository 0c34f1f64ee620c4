"""The frame of the data benchmarks: sides in turn, ratios, wrong results, sides that fail, the picture."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types

import numpy as np
import pytest

from benchmarks import bench_data, harness
from benchmarks.data import plot, worker


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A job of two sides that are told apart by what they answer; runs in this process."""
    calls: list[tuple] = []
    module = types.SimpleNamespace(
        UNIT="documents", SIZE=1000, BAR=3.0, make=lambda folder, size: calls.append(("make", folder.exists(), size)),
        SIDES={"engine": None, "other": None}, compare=lambda mine, theirs: "" if mine == theirs else "other ids",
        answers={"engine": {"seconds": 1.0, "memory_mb": 2.0, "found": {"ids": 7}},
                 "other": {"seconds": 4.0, "memory_mb": 50.0, "found": {"ids": 7}}}, calls=calls)

    def measure(name, side, folder, size):
        calls.append((side, size))
        return dict(module.answers[side])

    monkeypatch.setattr(bench_data, "measure", measure)
    monkeypatch.setitem(sys.modules, "benchmarks.data.fake", module)
    return module


def rows(*arguments: str) -> list[harness.Row]:
    parser = argparse.ArgumentParser()
    bench_data.add_options(parser.add_argument_group("data"))
    return list(bench_data.run(parser.parse_args(["--jobs", "fake", *arguments])))


def test_sides_in_turn_and_the_ratio(job):
    mine, other = rows("--rounds", "2")
    assert job.calls == [("make", True, 1000), ("engine", 1000), ("other", 1000), ("engine", 1000), ("other", 1000)]
    assert mine.name == "fake 1,000 documents: engine"
    assert mine.values["M documents/s"] == pytest.approx(0.001)
    assert "engine is x" not in mine.values
    assert (other.values["engine is x"], other.values["bar"], other.failed) == (4.0, 3.0, "")


def test_other_results_fail_the_row(job):
    job.answers["other"]["found"] = {"ids": 8}
    assert [row.failed for row in rows()] == ["", "other ids"]


def test_a_side_of_others_that_fails_is_no_failure_of_ours(job):
    job.answers["other"] = {"error": "MemoryError"}
    assert [row.failed for row in rows()] == ["", ""]
    job.answers["engine"] = {"error": "Segmentation fault"}
    assert [row.failed for row in rows()] == ["Segmentation fault", ""]


def test_a_curve_leaves_out_what_takes_days(job):
    job.LARGEST = {"other": 100}
    names = [row.name for row in rows("--sizes", "100,1000")]
    assert names == ["fake 100 documents: engine", "fake 100 documents: other", "fake 1,000 documents: engine"]
    result = {"suites": {"data": [vars(row) for row in rows("--sizes", "100,1000")]}}
    assert plot.curves(result) == {"fake (documents)": {"engine": [(100, 1.0, 2.0), (1000, 1.0, 2.0)],
                                                        "other": [(100, 4.0, 50.0)]}}


def test_the_picture_is_the_same_for_the_same_figures(job, tmp_path):
    result = {"suites": {"data": [vars(row) for row in rows("--sizes", "100,1000")]}}
    for name in ("a.svg", "b.svg"):
        plot.draw(result, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"fake (documents)" in (tmp_path / "a.svg").read_bytes()


def test_memory_is_what_the_work_took():
    with worker.PeakMemory() as memory:
        held = np.ones(20_000_000)  # 160 MB
        time.sleep(0.2)
        del held
    assert 0.9 * 160e6 < memory.above_start < 1.5 * 160e6


@pytest.mark.parametrize("name", bench_data.jobs())
def test_jobs_are_whole(name):
    module = importlib.import_module(f"benchmarks.data.{name}")
    assert next(iter(module.SIDES)) == "engine"
    assert len(module.SIDES) >= 2
    assert module.SIZE > 0
    assert module.BAR > 1
    assert module.UNIT
    assert callable(module.make)
    assert callable(module.compare)
