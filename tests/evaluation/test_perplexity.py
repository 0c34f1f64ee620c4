"""Held-out loss, perplexity and accuracy against a direct computation, and the same over two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from engine.data import loader
from engine.data.indexed import IndexedDataset
from engine.evaluation.perplexity import evaluate


def directly(run: tiny.Run, length: int, max_sequences: int | None = None) -> tuple[float, float, int]:
    """-> loss sum, correct predictions, tokens: the split's tokens in file order, cut every ``length``, row by row."""
    data = IndexedDataset(run.cfg.data.path / "validation")
    stream = torch.from_numpy(np.concatenate([data[i] for i in range(len(data))]).astype(np.int64))
    model, loss, correct, count = tiny.unwrapped(run).eval(), 0.0, 0, 0
    for first in list(range(0, len(stream) - 1, length))[:max_sequences]:
        tokens, labels = stream[first : first + length], stream[first + 1 : first + length + 1]
        tokens = tokens[: len(labels)]
        with torch.no_grad():
            logits_sv = model(tokens[None], torch.arange(len(tokens))[None], None)[0, :, : tiny.VOCAB].double()
        loss += torch.nn.functional.cross_entropy(logits_sv, labels, reduction="sum").item()
        correct += int((logits_sv.argmax(-1) == labels).sum())
        count += len(labels)
    return loss, correct, count


def measure(run: tiny.Run, **options) -> dict:
    with loader.build(run.cfg, "validation", dp_rank=run.groups.data_parallel_rank,
                      dp_size=run.groups.data_parallel_size) as data:
        return evaluate(run.chunks, data, run.groups, **{"micro_batch_size": 4, "seq_length": tiny.SEQ} | options)


@pytest.fixture
def trained(config) -> tiny.Run:
    run = tiny.start(config(train__global_batch_size=8, train__micro_batch_size=8, train__lr=1e-2, model__dropout=0.1))
    for _ in range(15):
        run.step()
    return run


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 7}, {"seq_length": 11}, {"max_sequences": 5},
                                     {"max_sequences": 1, "micro_batch_size": 3}])
def test_equals_a_direct_computation(trained, options):
    found = measure(trained, **options)
    loss, correct, tokens = directly(trained, options.get("seq_length", tiny.SEQ), options.get("max_sequences"))
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert found["accuracy"] == correct / tokens > 0
    assert found["tokens_per_sec"] > 0
    assert 0.5 < found["loss"] < math.log(tiny.VOCAB)


def test_evaluation_leaves_training_as_it_was(config):
    changes = {"model__dropout": 0.1, "train__max_steps": 6}
    plain, measured = tiny.start(config(**changes)), None
    expected = [plain.step().sums.loss for _ in range(4)]
    measured = tiny.start(config(**changes))
    found = []
    for _ in range(4):
        found.append(measured.step().sums.loss)
        measure(measured, max_sequences=3)
        assert all(chunk.training for chunk in measured.chunks)
    assert found == expected


def test_the_mode_of_a_model_that_only_evaluates_is_kept(trained):
    for chunk in trained.chunks:
        chunk.eval()
    measure(trained, max_sequences=3)
    assert not any(chunk.training for chunk in trained.chunks)


def test_two_ranks_of_every_layout_equal_one(config, tmp_path):
    cfg = config(model__num_layers=4)
    options = [{}, {"micro_batch_size": 3, "max_sequences": 7}, {"micro_batch_size": 2, "seq_length": 12}]
    run = tiny.start(cfg)
    run.step()
    expected = [measure(run, **o) for o in options]
    (tmp_path / "job.json").write_text(json.dumps([tiny.to_json(cfg), options]))
    for code, output in tiny.launch(Path(__file__).with_name("two_ranks.py"), 2, tmp_path):
        assert code == 0, output[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"dp2", "tp2", "pp2", "cp2", "pp2_interleaved", "dp2_overlap"}
    for layout, found in results.items():
        for one, other in zip(found, expected, strict=True):
            assert one["tokens"] == other["tokens"], layout
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-6), layout
            assert one["accuracy"] == pytest.approx(other["accuracy"], abs=2 / other["tokens"]), layout
