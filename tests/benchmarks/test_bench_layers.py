"""bench_layers on a tiny model: both sides are one computation, and another one is noticed."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import bench_layers, bench_train
from benchmarks.workers import direct_worker, layers_check_worker


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)  # run.py's
    bench_layers.add_options(parser.add_argument_group())
    return parser.parse_args(["--layers-model", "tiny", "--threads", "1", "--layers-rounds", "2", "--layers-steps", "2",
                              *argv])


def test_both_sides_are_timed():
    row, = bench_layers.run(options("--layers-precision", "fp32"))
    assert (row.name, row.compare, row.higher_is_better) == ("tiny fp32", "engine / direct CPU", False)
    assert row.values["engine first loss"] == pytest.approx(row.values["direct first loss"], rel=1e-5)
    for column in ("engine / direct CPU", "engine / direct time"):
        assert 0.5 < row.values[column] < 20
    for side in bench_layers.SIDES:
        assert 0 < row.values[f"{side} CPU s/step"] < 10
    for what in ("loss", "gradient", "weight"):
        assert 0 <= row.values[f"{what} error"] <= layers_check_worker.TOLERANCE


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The comparison, in this process; ``changes``: what the direct side is told that the engine is not."""
    def compare(precision: str, **changes) -> dict:
        init = direct_worker.Trainer.__init__
        monkeypatch.setattr(direct_worker.Trainer, "__init__",
                            lambda self, config, weights: init(self, config | changes, weights))
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        plan = bench_layers._plan(options())
        plan |= {"tokens": str(bench_train._write_tokens(tmp_path / "tokens.npy", plan)), "precision": precision,
                 "save_weights": str(tmp_path / "weights.safetensors")}
        return layers_check_worker.build(plan)[1]

    return compare


def test_in_bf16_both_are_the_same_bit_for_bit(compare):
    found = compare("bf16")
    assert max(found["loss error"], found["gradient error"], found["weight error"]) <= 1e-7


@pytest.mark.parametrize(("changes", "message"), [
    ({"clip_grad": 1e-3}, "gradient of .* is off by"), ({"weight_decay": 50.0}, "weight of .* is off by"),
    ({"micro_batch_size": 1}, None),  # another order of the same sums
])
def test_another_computation_is_refused(compare, changes, message):
    if message is None:
        assert compare("fp32", **changes)["gradient error"] > 0
        return
    with pytest.raises(AssertionError, match=message):
        compare("fp32", **changes)
