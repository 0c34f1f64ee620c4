"""Exact values of every schedule, and what each step consumes by them."""

from __future__ import annotations

import math

import pytest

from engine.config import TrainConfig
from engine.train.schedules import learning_rate


def rates(**changes) -> list[float]:
    train = TrainConfig(**{"max_steps": 10, "lr": 1.0, "min_lr": 0.2} | changes)
    return [learning_rate(train, step) for step in range(train.max_steps)]


def test_constant_after_warmup():
    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_linear_falls_from_the_end_of_warmup_to_min_lr_at_max_steps():
    expected = [0.5, 1.0] + [1.0 - 0.8 * k / 8 for k in range(8)]
    assert rates(schedule="linear", warmup_steps=2) == pytest.approx(expected, rel=1e-12)


def test_cosine_is_halfway_down_at_half_time():
    found = rates(schedule="cosine")
    assert found == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * k / 10)) for k in range(10)], rel=1e-12)
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.6, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_shorter_decay_stays_at_min_lr(schedule):
    found = rates(schedule=schedule, warmup_steps=2, decay_steps=4)
    assert found[2] == 1.0
    assert found[4] == pytest.approx(0.6, rel=1e-12)
    assert found[6:] == pytest.approx([0.2] * 4, rel=1e-12)


def test_wsd_is_stable_then_decays():
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
    assert rates(schedule="wsd", warmup_steps=2, decay_steps=4) == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_over_the_last_tenth_by_default_but_never_into_warmup():
    assert rates(schedule="wsd", max_steps=20) == pytest.approx([1.0] * 19 + [0.6], rel=1e-12)
    late = rates(schedule="wsd", max_steps=100, warmup_steps=95)
    assert late[93:] == pytest.approx([94 / 95, 1.0, 1.0, 0.84, 0.68, 0.52, 0.36], rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_run_that_is_all_warmup_only_rises(schedule):
    assert rates(schedule=schedule, warmup_steps=10) == pytest.approx([k / 10 for k in range(1, 11)], rel=1e-12)


def test_doubling_batches():
    train = TrainConfig(global_batch_size=8, batch_size_schedule={"kind": "doubling", "start": 1, "every_steps": 2})
    assert [train.batch_size_at(k) for k in range(10)] == [1, 1, 2, 2, 4, 4, 8, 8, 8, 8]
    assert train.batch_size_at(10**11) == 8


def test_ramped_batches():
    train = TrainConfig(global_batch_size=10, micro_batch_size=2, batch_size_schedule={
        "kind": "ramp", "start": 2, "every_steps": 3, "increment": 4})
    assert [train.batch_size_at(k) for k in range(10)] == [2, 2, 2, 6, 6, 6, 10, 10, 10, 10]


def test_curriculum():
    train = TrainConfig(seq_length_schedule=[
        {"step": 0, "seq_length": 4}, {"step": 2, "seq_length": 8}, {"step": 5, "seq_length": 16}])
    assert [train.seq_length_at(k, 16) for k in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert TrainConfig().seq_length_at(3, 16) == 16


def test_a_step_consumes_its_batch_times_its_length():
    train = TrainConfig(global_batch_size=4, batch_size_schedule={"kind": "doubling", "start": 1, "every_steps": 2},
                        seq_length_schedule=[{"step": 0, "seq_length": 4}, {"step": 3, "seq_length": 10}])
    consumed = [4, 4, 8, 20, 40, 40]
    assert [train.batch_size_at(k) * train.seq_length_at(k, 10) for k in range(6)] == consumed


@pytest.mark.parametrize("plan", [
    None, {"start": 1, "every_steps": 2}, {"start": 8, "every_steps": 3}, {"start": 2, "every_steps": 7},
    {"kind": "ramp", "start": 2, "every_steps": 3, "increment": 2}, {"kind": "ramp", "start": 5, "every_steps": 1,
                                                                    "increment": 1}])
@pytest.mark.parametrize("lengths", [(), ((0, 4),), ((0, 4), (3, 10), (20, 6))])
def test_what_comes_before_a_step_is_the_sum_of_the_steps(plan, lengths):
    train = TrainConfig(global_batch_size=8, batch_size_schedule=plan, seq_length_schedule=[
        {"step": step, "seq_length": length} for step, length in lengths])
    sequences = tokens = 0
    for step in range(40):
        assert (train.sequences_before(step), train.tokens_before(step, 16)) == (sequences, tokens)
        sequences += train.batch_size_at(step)
        tokens += train.batch_size_at(step) * train.seq_length_at(step, 16)
    assert train.sequences_before(10**12) == sequences + (10**12 - 40) * 8  # at once, however far
