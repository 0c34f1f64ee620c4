"""bench_layers on a tiny model: both sides are one computation, and another one is noticed."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import bench_layers, bench_train
from benchmarks.workers import direct, engine_worker, layers_worker


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)  # run.py's
    bench_layers.add_options(parser.add_argument_group())
    return parser.parse_args(["--layers-model", "tiny", "--threads", "1", "--layers-rounds", "3",
                              "--layers-processes", "1", *argv])


def test_both_sides_are_timed():
    row, = bench_layers.run(options("--layers-precision", "fp32"))
    assert (row.name, row.compare, row.higher_is_better) == ("tiny fp32", "engine / direct CPU", False)
    for column in ("engine / direct CPU", "engine / direct time"):
        assert 0.5 < row.values[column] < 20
    for side in bench_layers.SIDES:
        assert 0 < row.values[f"{side} CPU s/step"] < 10
    for what in ("loss", "gradient", "weight"):
        assert 0 <= row.values[f"{what} error"] <= layers_worker.TOLERANCE


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The comparison, in this process; ``changes``: what the direct side is told that the engine is not."""
    def compare(precision: str, **changes) -> dict:
        from engine.parallel.wrap import unwrap

        init = direct.Trainer.__init__
        monkeypatch.setattr(direct.Trainer, "__init__",
                            lambda self, config, weights: init(self, config | changes, weights))
        plan = bench_layers.worker_config(options())
        plan |= {"tokens": str(bench_train._write_tokens(tmp_path / "tokens.npy", plan)), "precision": precision}
        monkeypatch.setattr("torch.set_num_threads", lambda count: None)
        step, wrapped = engine_worker.start(plan)
        return layers_worker.compare(plan, step, dict(unwrap(wrapped[0]).named_parameters()))[0]

    return compare


def test_in_bf16_both_are_the_same_bit_for_bit(compare):
    assert max(compare("bf16").values()) <= 1e-7


@pytest.mark.parametrize(("changes", "message"), [
    ({"clip_grad": 1e-3}, "gradient of .* is off by"), ({"weight_decay": 50.0}, "weight of .* is off by"),
])
def test_another_computation_is_refused(compare, changes, message):
    with pytest.raises(AssertionError, match=message):
        compare("fp32", **changes)


def test_sides_take_turns():
    order: list[str] = []
    found = layers_worker.in_turns({"a": lambda i: order.append(f"a{i}"), "b": lambda i: order.append(f"b{i}")}, 3, 2)
    assert order == ["a3", "b3", "b4", "a4"]
    assert {side: {name: len(times) for name, times in lists.items()} for side, lists in found.items()} == {
        side: {"cpu_seconds": 2, "seconds": 2} for side in "ab"}
