"""bench_train on a tiny model: both sides really train the same model on the same tokens."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from benchmarks import bench_train
from benchmarks.workers import transformers_worker
from engine.errors import UserError


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)  # run.py's
    bench_train.add_options(parser.add_argument_group())
    return parser.parse_args(["--model", "tiny", "--threads", "1", "--rounds", "2", "--steps-per-round", "2", *argv])


def test_engine_and_transformers_agree_step_by_step():
    """The first loss proves the copied weights, the last one seven optimizer steps with clipping and accumulation."""
    engine, eager = bench_train.run(options("--precision", "fp32", "--sides", "engine,eager", "--device", "cpu"))
    assert [engine.name, eager.name] == ["tiny fp32 engine", "tiny fp32 transformers eager"]
    assert engine.values["first loss"] == pytest.approx(math.log(128), abs=0.1)
    assert engine.values["first loss"] == pytest.approx(eager.values["first loss"], abs=1e-4)
    assert engine.values["last loss"] == pytest.approx(eager.values["last loss"], abs=1e-3)
    assert engine.values["last loss"] < engine.values["first loss"] - 0.01
    assert engine.values["M parameters"] == eager.values["M parameters"]
    assert eager.values["x eager"] == 1.0
    assert engine.values["x compile"] is None
    assert 0.01 < engine.values["x eager"] < 100
    for row in (engine, eager):
        assert row.compare == "tokens/s"
        assert row.values["tokens/s"] > 0
        assert row.values["MFU %"] > 0
        assert 0.05 < row.values["memory GB"] < 4
        assert row.values["start-up s"] > row.values["first step s"] / 100 > 0


def trained(tmp_path, monkeypatch, steps=3, **changes) -> list[float]:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    plan = bench_train.worker_config(options("--device", "cpu"))
    plan["tokens"] = str(bench_train._write_tokens(tmp_path / "tokens.npy", plan))
    step, _ = transformers_worker.build(plan | changes)
    return [float(step(index)) for index in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "autocast", "pure"])
def test_transformers_trains_in_every_precision(tmp_path, monkeypatch, precision):
    losses = trained(tmp_path, monkeypatch, steps=7, precision=precision, lr=1e-2)
    assert losses[0] == pytest.approx(math.log(128), abs=0.1)
    assert losses[-1] < losses[0] - 0.2


def test_accumulation_does_not_change_the_training(tmp_path, monkeypatch):
    whole = trained(tmp_path, monkeypatch, micro_batch_size=4)
    assert trained(tmp_path, monkeypatch, micro_batch_size=1) == pytest.approx(whole, abs=1e-5)


def test_every_worker_gets_the_same_tokens(tmp_path):
    import numpy as np

    plan = bench_train.worker_config(options())
    first = np.load(bench_train._write_tokens(tmp_path / "a.npy", plan))
    np.testing.assert_array_equal(first, np.load(bench_train._write_tokens(tmp_path / "b.npy", plan)))
    assert first.shape == (1 + bench_train.WARMUP_STEPS + 2 * 2, 4, 17)
    assert first.min() == 0
    assert 64 < first.max() < 128


@pytest.mark.parametrize("model", bench_train.MODELS)
def test_every_model_has_a_whole_plan(model):
    plan = bench_train.worker_config(options("--model", model))
    assert all(value is not None for value in plan["shape"].values())
    assert plan["global_batch_size"] % plan["micro_batch_size"] == 0
    assert bench_train._flops_per_token(plan) > 0


@pytest.mark.parametrize(("model", "millions"), [("125m", 123.6), ("1b", 1076)])
def test_flops_are_about_six_a_parameter(model, millions):
    """6N for the matrices (tied output head included), plus causal attention."""
    plan = bench_train.worker_config(options("--model", model))
    shape = plan["shape"]
    attention = 6 * shape["num_layers"] * shape["num_attention_heads"] * shape["head_dim"] * plan["seq_length"]
    assert bench_train._flops_per_token(plan) - attention == pytest.approx(6e6 * millions, rel=0.01)


def test_the_ratio_in_bf16_is_with_autocast():
    rounds = {"bf16 transformers eager (pure)": [{"seconds": 1.0}],
              "bf16 transformers eager (autocast)": [{"seconds": 2.0}],
              "fp32 transformers eager": [{"seconds": 3.0}]}
    assert bench_train._reference(rounds, "bf16", "eager") == [{"seconds": 2.0}]
    assert bench_train._reference(rounds, "fp32", "eager") == [{"seconds": 3.0}]
    assert bench_train._reference(rounds, "bf16", "compile") is None


@pytest.mark.parametrize(("argv", "message"), [
    (["--sides", "engine,nonsense"], r"--sides: no side 'nonsense'.*There are: .*eager"),
    (["--precision", "fp32", "--sides", "eager-pure"], r"no side 'eager-pure' at precision fp32"),
    (["--micro-batch-size", "3"], r"--micro-batch-size: 4 sequences do not divide into micro-batches of 3"),
])
def test_options_that_do_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        bench_train.run(options(*argv))
