"""Resuming is bit-exact: losses, norms, samples, weights and optimizer state; and what is refused before a step."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
import torch

from engine import disk
from engine.checkpoint import layout
from engine.errors import UserError

STEPS = 10
# 14,656 tokens, of which an epoch has 11,500: the run crosses its end, two batch sizes and two lengths.
RAMP = {"train__max_steps": STEPS, "train__global_batch_size": 160, "train__micro_batch_size": 8,
        "train__batch_size_schedule": {"kind": "ramp", "start": 32, "every_steps": 3, "increment": 64},
        "train__seq_length_schedule": [{"step": 0, "seq_length": 10}, {"step": 5, "seq_length": 16}],
        "train__schedule": "cosine", "train__warmup_steps": 3}


@dataclass
class Trace:
    """What a run did from some step on, and where it ended."""

    steps: list[tuple] = field(default_factory=list)
    weights: dict = field(default_factory=dict)
    optimizer: list = field(default_factory=list)
    state: dict = field(default_factory=dict)


def go_on(run: tiny.Run, *, save_at: tuple[int, ...] = ()) -> Trace:
    trace = Trace()
    while run.state.step < run.cfg.train.max_steps:
        position = run.state.consumed_tokens
        result = run.step()
        samples = run.data.sample_ids(position, result.global_batch_size, result.seq_length)
        trace.steps.append((run.state.step, result.sums, result.grad_norm, result.lr, samples))
        if run.state.step in save_at:
            run.save()
    trace.weights, trace.optimizer = tiny.whole_weights(run), tiny.optimizer_state(run)
    trace.state = run.state.to_dict()
    return trace


EVERYWHERE, SOME = (1, 2, 3, 4, 5, 7, 9), (2, 5, 9)  # within and at the ramp's and the curriculum's changes


@pytest.mark.parametrize(("changes", "stops"), [
    ({"model__dropout": 0.1}, EVERYWHERE),
    ({"model__dropout": 0.1, "train__precision": "bf16"}, SOME),
    ({"train__precision": "bf16", "parallel__distributed_optimizer": True, "model__tie_embeddings": False}, SOME),
], ids=["fp32 dropout", "bf16 dropout", "bf16 distributed"])
def test_resuming_repeats_every_bit(config, changes, stops):
    cfg = config(**RAMP | changes, checkpoint__keep_last=len(stops))
    whole = go_on(tiny.start(cfg), save_at=stops)
    assert len({step[1].loss for step in whole.steps}) == STEPS
    assert {piece[1] for step in whole.steps for sample in step[4] for piece in sample} >= {0, 1}, "no epoch ended"
    for stop in stops:
        resumed = tiny.start(cfg)
        torch.rand(stop)  # whatever was drawn before must not matter
        resumed.load(layout.folder(layout.root(cfg.output_dir), stop))
        assert resumed.state.step == stop
        trace = go_on(resumed)
        assert trace.steps == whole.steps[stop:], stop
        assert trace.state == whole.state
        for name, value in trace.weights.items():
            assert torch.equal(value, whole.weights[name]), (stop, name)
        tiny.assert_same_state(trace.optimizer, whole.optimizer)


def test_saving_does_not_disturb_the_run(config):
    changes = RAMP | {"model__dropout": 0.1}
    plain = go_on(tiny.start(config(**changes)))
    saving = go_on(tiny.start(config(**changes)), save_at=(2, 6))
    assert saving.steps == plain.steps


def test_dropout_resumes_though_a_timeout_changed(config):
    cfg = config(model__dropout=0.2, train__max_steps=4)
    whole = go_on(tiny.start(cfg), save_at=(2,))
    resumed = tiny.start(cfg.with_values({"parallel.timeout_minutes": 3.0}))
    torch.rand(7)
    resumed.load(layout.latest(layout.root(cfg.output_dir)))
    assert go_on(resumed).steps == whole.steps[2:]


@pytest.fixture
def saved(config) -> tuple[tiny.Run, Path]:
    """A run after two steps, and its checkpoint."""
    run = tiny.start(config(train__max_steps=4))
    run.step()
    run.step()
    return run, run.save()


def test_what_a_checkpoint_holds(saved):
    run, path = saved
    layout.verify(path)
    record = json.loads((path / "state.json").read_text())
    assert record["train"] == run.state.to_dict()
    assert (path / "config.yaml").read_text().startswith("stage: pretrain")
    from engine.data.tokenizer import load_tokenizer

    assert load_tokenizer(path / "tokenizer").sha256 == load_tokenizer(run.cfg.data.path / "tokenizer").sha256
    assert not list(path.parent.glob("*.tmp"))


def test_damage_anywhere_is_found_before_anything_is_loaded(saved):
    run, path = saved
    before, rng = tiny.whole_weights(run), random.Random(1)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert len(files) >= 9
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for damage in (bytes(flipped), whole[: rng.randrange(len(whole))], None):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            with pytest.raises(UserError, match=file.name):
                run.load(path)
        file.write_bytes(whole)
    for name, value in tiny.whole_weights(run).items():
        assert torch.equal(value, before[name]), name
    run.load(path)


def test_an_existing_step_is_refused_and_unchanged(saved):
    run, path = saved
    before = {p: disk.sha256(p) for p in path.rglob("*") if p.is_file()}
    run.state.consumed_tokens += 1
    with pytest.raises(UserError, match=r"iter_0000002: this checkpoint exists and is not replaced"):
        run.save()
    assert {p: disk.sha256(p) for p in path.rglob("*") if p.is_file()} == before
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("change", [
    {"model__hidden_size": 64}, {"model__num_layers": 4}, {"model__num_layers": 1}, {"model__ffn_hidden_size": 96},
    {"model__tie_embeddings": False}, {"model__qk_norm": True}, {"model__num_query_groups": 4},
    {"model__attention_bias": True}, {"model__num_attention_heads": 2}])
def test_another_model_is_refused_in_words_of_the_configuration(saved, config, change):
    _, path = saved
    other = tiny.start(config(**change))
    name = next(iter(change)).replace("__", ".")
    with pytest.raises(UserError, match=f"another model: .*{name}"):
        other.load(path)


def test_another_tokenizer_or_vocabulary_is_refused(saved):
    run, path = saved
    for identity in ({"tokenizer_sha256": "another"}, {"vocab_size": tiny.VOCAB - 1}):
        checkpointer = run.checkpointer(**identity)
        with pytest.raises(UserError, match=next(iter(identity))):
            checkpointer.load(path, run.chunks, run.optimizer)


def test_which_checkpoint_is_resumed(saved, config):
    run, path = saved
    elsewhere = path.parents[2] / "elsewhere"

    def found(**changes):
        return tiny.start(config(**changes)).checkpointer().find_resume()

    assert found() == path
    assert found(output_dir=elsewhere) is None
    assert found(output_dir=elsewhere, resume_from_checkpoint=str(path)) == path
    assert found(output_dir=elsewhere, resume_from_checkpoint=str(run.cfg.output_dir)) == path
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        found(resume_from_checkpoint="none")
    with pytest.raises(UserError, match="no such folder"):
        found(resume_from_checkpoint=str(elsewhere / "iter_0000007"))
    (path.parent / layout.POINTER).write_text("")
    with pytest.raises(UserError, match="names no finished checkpoint"):
        found()


def test_an_older_checkpoint_is_not_resumed_under_newer_ones(saved):
    run, path = saved
    run.step()
    newer = run.save()
    cfg = run.cfg.with_values({"resume_from_checkpoint": str(path)})
    with pytest.raises(UserError, match=r"iter_0000003.*move"):  # its save would be refused, after the work is done
        tiny.start(cfg).checkpointer().find_resume()
    newer.rename(newer.with_name("aside"))
    assert tiny.start(cfg).checkpointer().find_resume() == path


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_last_and_the_best_are_kept(config, keep_best):
    run = tiny.start(config(checkpoint__keep_last=2, checkpoint__keep_best=keep_best, train__max_steps=6))
    left = []
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 0.5), start=1):
        run.step()
        if run.state.best_val_loss is None or loss < run.state.best_val_loss:
            run.state.best_val_loss, run.state.best_step = loss, step
        run.save()
        left.append([layout.step_of(p) for p in layout.existing(layout.root(run.cfg.output_dir))])
    assert left == ([[1], [1, 2], [2, 3], [2, 3, 4], [4, 5]] if keep_best else [[1], [1, 2], [2, 3], [3, 4], [4, 5]])


@pytest.mark.parametrize("name", ["common.pt", "__0_0.distcp", ".metadata", "metadata.json", "state.json",
                                  "rank_00000.safetensors", "manifest.json", "tokenizer.json", layout.POINTER])
def test_a_save_that_fails_leaves_the_previous_and_says_why(saved, monkeypatch, name):
    run, path = saved
    pointer = path.parent / layout.POINTER
    run.step()
    with tiny.full_disk(monkeypatch, name) as hit, pytest.raises(UserError, match=r"rank 0: .*(No space|device)"):
        run.save()
    assert hit, "nothing failed"
    assert pointer.read_text() == "2\n"
    assert layout.existing(path.parent) == [path]
    layout.verify(path)
    assert layout.step_of(run.save()) == 3  # there is space again
    assert pointer.read_text() == "3\n"
    assert not list(path.parent.glob("*.tmp"))
