"""The loop on a tiny corpus: it learns, logs the agreed names, evaluates and saves when due, and reads every token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import tiny
import torch

from engine.errors import UserError
from engine.train import loop
from engine.train.metrics import MetricLogger
from engine.train.run import logger_for
from engine.train.state import TrainState

TRAIN_NAMES = {"train/loss", "train/perplexity", "train/accuracy", "train/lr", "train/tokens_per_sec"}  # FEATURES 5.2
OTHER_NAMES = {"train/mfu", "train/grad_norm", "train/memory_gb", "train/seq_length", "train/global_batch_size",
               "train/micro_batch_size", "train/consumed_tokens"}
VAL_NAMES = {"val/loss", "val/perplexity", "val/accuracy"}


class Recorder:
    """A loader that notes what was read."""

    def __init__(self, inner):
        self.inner, self.positions, self.tokens, self.shapes = inner, [], [], []

    def micro_batches(self, position, **sizes):
        self.positions.append(position)
        for batch in self.inner.micro_batches(position, **sizes):
            self.tokens.append(batch.tokens_bs.flatten())
            self.shapes.append(tuple(batch.tokens_bs.shape))
            yield batch


def train(cfg, *, save: Callable = lambda state: None, evaluate: Callable | None = None, run=None):
    """-> the run, its state, its rows of metrics.jsonl, and what was read."""
    run = run or tiny.start(cfg)
    run.data = recorder = Recorder(run.data)
    with logger_for(cfg, run.groups, run.state) as logger:
        state = loop.run(cfg, run.chunks, run.optimizer, run.data, run.groups, state=run.state, logger=logger,
                         vocab_size=tiny.VOCAB, save=save, evaluate=evaluate)
    lines = (cfg.output_dir / "metrics.jsonl").read_text().splitlines()
    return run, state, [json.loads(line) for line in lines], recorder


def test_a_run_learns(config):
    cfg = config(train__max_steps=40, train__global_batch_size=8, train__micro_batch_size=8, train__lr=1e-2,
                 train__schedule="cosine", train__warmup_steps=4, logging__logging_steps=1)
    _, state, rows, _ = train(cfg)
    losses = [row["train/loss"] for row in rows]
    assert len(rows) == 40
    assert losses[0] == pytest.approx(math.log(tiny.VOCAB), rel=0.05)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert rows[-1]["train/accuracy"] > 0.3 > rows[0]["train/accuracy"]
    assert state.step == 40


def test_rows_have_the_agreed_names_and_values(config):
    cfg = config(train__max_steps=4, logging__logging_steps=2, evaluation__eval_steps=2)
    found = {"loss": 2.0, "perplexity": math.exp(2.0), "accuracy": 0.5, "tokens": 10}
    _, _, rows, _ = train(cfg, evaluate=lambda: found)
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert set(rows[0]) == {"step"} | TRAIN_NAMES | OTHER_NAMES
    assert set(rows[1]) == set(rows[2]) == set(rows[0]) | VAL_NAMES
    for row in rows:
        assert row["train/perplexity"] == pytest.approx(math.exp(row["train/loss"]), rel=1e-9)
        assert row["train/consumed_tokens"] == row["step"] * 4 * tiny.SEQ
        assert row["train/lr"] == cfg.train.lr
        assert row["train/tokens_per_sec"] > 0
        assert 0 < row["train/mfu"] < 1
        assert row["train/memory_gb"] > 0.05
    assert rows[1]["val/loss"] == 2.0


def test_curriculum_and_batch_schedule_read_each_token_once(config):
    cfg = config(train__max_steps=9, train__global_batch_size=8, train__micro_batch_size=2,
                 train__batch_size_schedule={"kind": "doubling", "start": 2, "every_steps": 2},
                 train__seq_length_schedule=[{"step": 0, "seq_length": 4}, {"step": 3, "seq_length": 10},
                                             {"step": 5, "seq_length": 16}])
    run, state, rows, read = train(cfg)
    sizes = [(cfg.train.batch_size_at(k), cfg.train.seq_length_at(k, tiny.SEQ)) for k in range(9)]
    assert sizes[0] == (2, 4)
    assert sizes[4] == (8, 10)
    assert sizes[8] == (8, 16)
    assert read.positions == [sum(b * s for b, s in sizes[:k]) for k in range(9)]
    assert state.consumed_tokens == sum(b * s for b, s in sizes)
    assert state.consumed_samples == sum(b for b, _ in sizes)
    assert [(row["train/global_batch_size"], row["train/seq_length"]) for row in rows] == sizes
    whole = [b.tokens_bs.flatten() for b in run.data.inner.micro_batches(
        0, global_batch_size=-(-state.consumed_tokens // 16), micro_batch_size=1, seq_length=16)]
    assert torch.equal(torch.cat(read.tokens), torch.cat(whole)[: state.consumed_tokens])


def test_evaluates_and_saves_when_due_and_at_the_end(config):
    cfg = config(train__max_steps=7, checkpoint__save_steps=3, evaluation__eval_steps=2)
    events, losses = [], iter([3.0, 1.0, 2.0, 1.5])

    def evaluate():
        events.append("evaluate")
        return {"loss": next(losses), "perplexity": 1.0, "accuracy": 0.0}

    def save(state):
        events.append((state.step, state.best_step, state.best_val_loss))

    train(cfg, save=save, evaluate=evaluate)
    # Step 4 had the lowest loss, but is not saved: the best checkpoint is one that exists.
    assert events == ["evaluate", (3, None, None), "evaluate", "evaluate", (6, 6, 2.0), "evaluate", (7, 7, 1.5)]


def test_what_is_no_number_is_not_the_best(config):
    cfg = config(train__max_steps=3, checkpoint__save_steps=1, evaluation__eval_steps=1)
    losses, saved = iter([math.nan, 2.0, math.nan]), []
    train(cfg, save=lambda state: saved.append((state.best_step, state.best_val_loss)),
          evaluate=lambda: {"loss": next(losses)})
    assert saved == [(None, None), (2, 2.0), (2, 2.0)]


def test_a_row_is_on_the_disk_before_its_checkpoint(config):
    cfg = config(train__max_steps=3, checkpoint__save_steps=1)
    rows_then = []
    train(cfg, save=lambda state: rows_then.append(
        [json.loads(line)["step"] for line in (cfg.output_dir / "metrics.jsonl").read_text().splitlines()]))
    assert rows_then == [[1], [1, 2], [1, 2, 3]]


def test_a_resumed_loop_goes_on_to_max_steps(config):
    cfg = config(train__max_steps=5)
    run = tiny.start(cfg)
    run.state = TrainState(step=3, consumed_tokens=192, consumed_samples=12)
    _, state, rows, read = train(cfg, run=run)
    assert read.positions == [192, 256]
    assert [row["step"] for row in rows] == [4, 5]
    assert (state.step, state.consumed_samples) == (5, 20)


def test_non_finite_loss_is_a_user_error_that_saves_nothing(config):
    run = tiny.start(cfg := config(train__max_steps=4, checkpoint__save_steps=1))
    saved: list[int] = []

    def save(state):
        saved.append(state.step)
        if state.step == 2:
            with torch.no_grad():
                tiny.unwrapped(run).decoder.final_layernorm.weight[0] = math.nan

    with pytest.raises(UserError, match=r"at step 3.*Nothing was updated"):
        train(cfg, run=run, save=save)
    assert saved == [1, 2]


def test_only_the_main_rank_writes(config, tmp_path):
    logger = MetricLogger(tmp_path / "other", logging=config().logging, total_steps=3, is_main=False)
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    assert not (tmp_path / "other").exists()


def test_flops_by_hand(config):
    from engine.train.flops import flops_per_token

    # 2 layers; h 32, 4 heads and 2 groups of 8, f 64, s 16, v 384; multiply-adds count 2, backward twice the forward
    qkv, out, mlp = 32 * (32 + 16 + 16), 32 * 32, 3 * 32 * 64
    attention = 2 * 32 * 16 / 2  # q·k and p·v over half of 16 keys
    expected = 3 * (2 * 2 * (qkv + out + mlp + attention) + 2 * 32 * 384)
    assert flops_per_token(config().model, 16, 384) == expected
    # the second layer: a router, 2 of 4 experts of 24 and a shared one of 40; the first sees a window of 4 keys
    experts = 4 * 32 + 3 * 32 * (2 * 24 + 40)
    pairs = 4 * 16 - 4 * 4 / 2
    shape = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 40, "num_dense_layers": 1}
    cfg = config(model__moe=shape, model__window_size=4, model__full_attention_every=2)
    expected += 3 * 2 * (experts - mlp) + 3 * 2 * 2 * 32 * (pairs / 16 - 16 / 2)
    assert flops_per_token(cfg.model, 16, 384) == expected
