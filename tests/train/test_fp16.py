"""fp16 with dynamic loss scaling. The configuration wants a GPU for it; the arithmetic is the same on a CPU."""

from __future__ import annotations

import pytest
import tiny
import torch

from engine.model import build


@pytest.fixture
def half(config, monkeypatch):
    """A run in fp16, as it would be built on a GPU."""
    monkeypatch.setattr(build.model_config, "resolve_precision", lambda precision, device: torch.float16)
    return tiny.start(config())


def test_losses_follow_fp32_and_the_scale_cancels(half, config, monkeypatch):
    assert half.optimizer.get_loss_scale().item() == 2.0**16 / tiny.SEQ  # micro-batches of one sequence
    found = [half.step() for _ in range(4)]
    monkeypatch.undo()
    exact = tiny.start(config())
    expected = [exact.step() for _ in range(4)]
    assert all(step.stepped for step in found)
    assert [step.sums.loss for step in found] == pytest.approx([step.sums.loss for step in expected], rel=2e-3)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=2e-2)


def test_an_overflow_skips_the_update_and_lowers_the_scale(half):
    for inner in half.optimizer.chained_optimizers:
        inner.grad_scaler._scale.fill_(2.0**40)  # far above what fp16 holds
    before = {name: p.detach().clone() for name, p in tiny.unwrapped(half).named_parameters()}
    results = [half.step() for _ in range(2)]  # hysteresis: the second overflow in a row lowers it
    assert [step.stepped for step in results] == [False, False]
    assert half.state.skipped_steps == 2
    assert half.state.step == 2
    assert half.optimizer.get_loss_scale().item() == 2.0**39
    for name, p in tiny.unwrapped(half).named_parameters():
        assert torch.equal(p, before[name]), name
