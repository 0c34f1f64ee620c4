"""Checkpoints of FP8 runs: resuming repeats every bit; delayed scaling's history fits any layout, or begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from engine.checkpoint import layout, restore
from engine.model import fp8

FP8 = {"train__fp8": True, "train__precision": "bf16", "train__max_steps": 5}
DELAYED = FP8 | {"train__fp8_recipe__scaling": "delayed", "train__fp8_recipe__history_length": 3}


def losses(run: tiny.Run, steps: int) -> list[tuple[float, float]]:
    results = [run.step() for _ in range(steps)]
    return [(r.sums.loss, r.grad_norm) for r in results]


@pytest.mark.parametrize("changes", [FP8, DELAYED, FP8 | {"train__fp8_recipe__granularity": "rowwise"}, DELAYED | {
    "train__recompute": "full", "parallel__distributed_optimizer": True, "train__fp8_recipe__last_layers_bf16": 1}],
    ids=["current", "delayed", "rowwise", "delayed, recomputed"])
def test_resuming_repeats_every_bit(config, changes):
    cfg = config(**changes, checkpoint__keep_last=4)
    run, whole, saved = tiny.start(cfg), [], {}
    for step in range(1, 6):
        whole += losses(run, 1)
        if step in (1, 4):  # while the history fills, and when it has come round
            saved[step] = run.save()
    for step, path in saved.items():
        resumed = tiny.start(cfg)
        losses(resumed, 1)  # which must leave nothing behind
        resumed.load(path)
        assert losses(resumed, 5 - step) == whole[step:], step


def test_the_history_is_of_the_unsplit_model(config, tmp_path: Path):
    cfg = config(**DELAYED, output_dir=tmp_path / "one")
    run = tiny.start(cfg)
    losses(run, 2)
    run.save()
    history = fp8.scaling_of(run.chunks).history.clone()
    assert history[..., :2].all()
    assert not history[..., 2].any()
    expected = [loss for loss, _ in losses(run, 2)]
    (tmp_path / "config.json").write_text(tiny.to_json(cfg))
    ranks = tiny.launch(Path(__file__).with_name("fp8_ranks.py"), 2, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks[0][1][-4000:]
    two = torch.load(tmp_path / "two.pt")
    assert torch.equal(two["loaded"], history)
    assert two["continued"] == pytest.approx(expected, rel=5e-3)
    again = tiny.start(cfg.with_values({"output_dir": tmp_path / "unused"}))
    again.load(layout.find(tmp_path / "two"))
    assert torch.equal(fp8.scaling_of(again.chunks).history, two["saved"])
    assert [loss for loss, _ in losses(again, 2)] == pytest.approx(two["expected"], rel=5e-3)


def test_checkpoints_without_a_fitting_history(config, tmp_path: Path):
    """From bf16, to bf16, from another length: the first step is one of current scaling."""
    bf16 = FP8 | {"train__fp8": False}
    run = tiny.start(config(**bf16, output_dir=tmp_path / "bf16"))
    losses(run, 1)
    plain = run.save()
    run = tiny.start(config(**DELAYED, output_dir=tmp_path / "fp8"))
    losses(run, 1)
    delayed = run.save()
    for changes, path in ((DELAYED, plain), (DELAYED | {"train__fp8_recipe__history_length": 2}, delayed)):
        run = tiny.start(config(**changes))
        losses(run, 1)
        run.load(path)
        scaling = fp8.scaling_of(run.chunks)
        assert not scaling.known
        assert not scaling.history.any()
        losses(run, 1)
        assert scaling.known
    back = tiny.start(config(**bf16))
    back.load(delayed)
    losses(back, 1)


def test_a_restored_model_multiplies_in_its_parameters_precision(config):
    run = tiny.start(config(**DELAYED))
    losses(run, 1)
    path = run.save()
    tiny.forget_layout()
    with restore.load(restore.plan(path, device="cpu")) as restored:
        assert fp8.scaling_of(restored.chunks) is None
        assert restored.chunks[0].config.fp8_linears is None
