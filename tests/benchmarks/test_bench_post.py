"""The suites of the stages after pretraining, at their smallest."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import bench_post, bench_stages
from benchmarks.harness import result, write_json


def options(suite, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)  # run.py's
    suite.add_options(parser.add_argument_group())
    return parser.parse_args(["--threads", "1", *argv])


def test_every_stage_is_timed_beside_pretraining():
    rows = list(bench_stages.run(options(
        bench_stages, "--stages-model", "tiny", "--stages-precision", "fp32", "--stages-device", "cpu", "--kinds",
        "pretrain,sft,dpo,lora", "--stages-rounds", "1", "--stages-steps", "1")))
    assert [row.name for row in rows] == [f"tiny fp32 {kind}" for kind in ("pretrain", "sft", "dpo", "lora")]
    assert not [row.failed for row in rows if row.failed]
    assert rows[0].values["x pretrain"] == 1.0
    assert all(row.values["tokens/s"] > 0 and row.values["x pretrain"] > 0 for row in rows)
    assert rows[3].values["M trained"] < rows[0].values["M trained"]


def test_a_stage_that_fails_is_a_row():
    row, = bench_stages.run(options(  # nf4 has blocks of 64 features, the tiny model 32
        bench_stages, "--stages-model", "tiny", "--stages-precision", "fp32", "--stages-device", "cpu",
        "--kinds", "qlora"))
    assert "lora.base" in row.failed


@pytest.mark.parametrize(("task", "ours"), [("sft", "engine unpacked"), ("dpo", "engine")])
def test_both_sides_train_on_the_same_examples(task, ours, tmp_path, monkeypatch):
    """TRL's and the engine's first losses and tokens agree; the result can be written."""
    monkeypatch.setattr(bench_post, "SOURCE", bench_post.SOURCE / "json")
    rows = list(bench_post.run(options(
        bench_post, "--task", task, "--model", "tiny", "--precision", "fp32", "--seq-length", "512", "--max-examples",
        "24", "--rounds", "1", "--steps-per-round", "1", "--batch-size", "4", "--micro-batch-size", "2",
        "--sides", f"{ours},trl")))
    named = {row.name.removeprefix(f"{task} fp32 "): row.values for row in rows}
    assert set(named) == {ours, "trl"}
    own, theirs = named[ours], named["trl"]
    assert own["x trl"] > 0
    assert own["last loss"] == pytest.approx(theirs["last loss"], rel=0.05)
    each = [values["tokens/s"] / values["examples/s"] for values in (own, theirs)]
    assert each[0] == pytest.approx(each[1], rel=0.1)
    if task == "dpo":
        assert 0 < own["x trl with reference"] < own["x trl"]
    write_json(tmp_path / "result.json", result({"post": rows}, {}))
