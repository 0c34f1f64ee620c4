"""bench_train on a tiny model: both sides really train the same model on the same tokens."""

from __future__ import annotations

import argparse
import contextlib
import math
from types import SimpleNamespace

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
    (["--precision", "fp4"], r"--precision: no precision 'fp4'. There are: fp32, bf16, fp8"),
    (["--micro-batch-size", "3"], r"--micro-batch-size: 4 sequences do not divide into micro-batches of 3"),
])
def test_options_that_do_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        bench_train.run(options(*argv))


# --- other sides -----------------------------------------------------------------------------------------------------

def test_megatron_core_as_it_comes_trains_the_same(capsys):
    """And one at a time."""
    engine, mcore = bench_train.run(options("--precision", "fp32", "--sides", "engine,mcore", "--device", "cpu",
                                            "--one-at-a-time"))
    assert mcore.name == "tiny fp32 megatron-core"
    assert mcore.values["first loss"] == pytest.approx(engine.values["first loss"], abs=1e-4)
    assert mcore.values["last loss"] == pytest.approx(engine.values["last loss"], abs=1e-3)
    assert 0.01 < mcore.values["engine x"] < 100
    assert mcore.values["note"] == "its own layers"
    assert "tiny fp32 megatron-core: " in capsys.readouterr().out


def test_fp8_is_the_engines_beside_its_bf16_and_what_is_missing_is_a_row():
    rows = {row.name: row for row in bench_train.run(options(
        "--precision", "bf16,fp8", "--sides", "engine,liger", "--device", "cpu", "--weights", "own",
        "--one-at-a-time"))}
    bf16, fp8 = rows["tiny bf16 engine"], rows["tiny fp8 engine"]
    assert fp8.values["x bf16"] > 0
    assert fp8.values["last loss"] == pytest.approx(bf16.values["last loss"], abs=0.05)
    assert fp8.values["last loss"] != bf16.values["last loss"]
    liger = rows["tiny bf16 transformers+liger compile (autocast)"]
    assert liger.values == {"note": "liger_kernel is not installed"}
    assert not liger.failed


class DeadWorker:
    def __init__(self, name, *_, **__):
        raise bench_train.WorkerError(f"{name} ended with exit code 1:\nTraceback\ntorch.OutOfMemoryError: 2 GiB")


@pytest.mark.parametrize("together", [[], ["--one-at-a-time"]])
def test_a_side_that_fails_is_a_row_and_ours_fails_the_run(monkeypatch, together):
    @contextlib.contextmanager
    def prepared(plan):
        yield {}

    monkeypatch.setattr(bench_train, "_prepared", prepared)
    monkeypatch.setattr(bench_train, "Worker", DeadWorker)
    engine, mcore = bench_train.run(options("--precision", "bf16", "--sides", "engine,mcore", *together))
    assert engine.failed.endswith("OutOfMemoryError: 2 GiB")
    assert mcore.values["note"] == "bf16 megatron-core ended with exit code 1: torch.OutOfMemoryError: 2 GiB"
    assert not mcore.failed


def test_sides_and_their_settings():
    sides = {side.name: side.changes for side in bench_train._sides(options(
        "--precision", "bf16,fp8", "--sides", "mcore,liger,liger-pure,engine"))}
    assert list(sides) == ["bf16 engine", "fp8 engine", "bf16 transformers+liger compile (autocast)",
                           "bf16 transformers+liger compile (pure)", "bf16 megatron-core", "fp8 megatron-core"]
    assert sides["bf16 transformers+liger compile (pure)"] == {"precision": "pure", "compile": True, "liger": True}
    default = bench_train._sides(options("--precision", "bf16"))
    assert {side.kind for side in default}.isdisjoint(bench_train.ON_REQUEST)


def test_8b_fits_with_small_optimizer_state_and_megatron_core_does_not(monkeypatch):
    from benchmarks.workers import engine_worker, megatron_worker
    from engine.config import Config

    plan = bench_train.worker_config(options("--model", "8b", "--device", "cpu")) | {"precision": "bf16"}
    cfg = Config.model_validate(engine_worker.engine_config(plan))
    assert (cfg.train.adamw.moments, cfg.train.adamw.master) == ("bf16", "remainder")
    assert plan["parameters"] == pytest.approx(8.03e9, rel=0.001)
    properties = SimpleNamespace(total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with pytest.raises(MemoryError, match="take 145 GB of the GPU's 150 GB"):
        megatron_worker.refuse_what_cannot_fit(plan, torch.device("cuda"))
    small = bench_train.worker_config(options("--model", "3b", "--device", "cpu"))
    megatron_worker.refuse_what_cannot_fit(small, torch.device("cuda"))


def test_the_device_can_draw_the_weights(tmp_path, monkeypatch):
    losses = trained(tmp_path, monkeypatch, steps=1, weights="own")
    assert losses[0] == pytest.approx(math.log(128), abs=0.1)
