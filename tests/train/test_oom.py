"""Recovery from lack of memory keeps the global batch, the loss and the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from engine.errors import UserError
from engine.train.oom import is_out_of_memory, smaller_micro_batch


@pytest.mark.parametrize(("micro", "smaller"), [(8, 4), (6, 3), (7, 1), (9, 3), (2, 1), (12, 6)])
def test_the_largest_proper_divisor(micro, smaller):
    assert smaller_micro_batch(micro) == smaller


def test_a_single_sequence_cannot_shrink():
    with pytest.raises(UserError, match=r"train\.micro_batch_size: out of memory with a single sequence"):
        smaller_micro_batch(1)


def test_only_lack_of_memory_counts():
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(MemoryError("can't allocate memory"))


def starve(monkeypatch, micro_batch_above: int) -> list[int]:
    """The forward pass runs out of memory for larger micro-batches, as torch's CPU allocator says it. -> sizes seen."""
    from engine.model.gpt import GPT

    forward, sizes = GPT.forward, []

    def limited(self, tokens_bs, *args, **kwargs):
        sizes.append(len(tokens_bs))
        if len(tokens_bs) > micro_batch_above:
            import torch

            torch.empty(1 << 61, dtype=torch.uint8)
        return forward(self, tokens_bs, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", limited)
    return sizes


def test_a_starved_run_ends_where_an_unstarved_one_does(config, monkeypatch):
    changes = {"train__global_batch_size": 8, "train__micro_batch_size": 8, "train__enable_oom_recovery": True}
    free = tiny.start(config(**changes))
    losses = [free.step().sums.loss for _ in range(3)]
    starved = tiny.start(config(**changes))
    sizes = starve(monkeypatch, micro_batch_above=2)
    found = [starved.step() for _ in range(3)]
    assert sizes == [8, 4, *[2] * 12]
    assert [step.micro_batch_size for step in found] == [2, 2, 2]
    assert [step.global_batch_size for step in found] == [8, 8, 8]
    assert [step.sums.loss for step in found] == pytest.approx(losses, rel=1e-6)
    assert starved.state.to_dict() == free.state.to_dict() | {"micro_batch_size": 2}
    ours, theirs = tiny.whole_weights(starved), tiny.whole_weights(free)
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-6 * max(w.norm() for w in theirs.values()), name


def test_without_the_flag_the_error_stands(config, monkeypatch):
    run = tiny.start(config(train__micro_batch_size=4))
    starve(monkeypatch, micro_batch_above=2)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run.step()
    assert run.state.step == 0


def test_other_errors_are_not_taken_for_it(config, monkeypatch):
    from engine.model.gpt import GPT

    def broken(*_args, **_kwargs):
        raise RuntimeError("shapes do not match")

    run = tiny.start(config(train__enable_oom_recovery=True))
    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run.step()


def test_one_rank_of_two_starves_and_both_go_on_alike(corpus, tmp_path):
    for code, output in tiny.launch(Path(__file__).with_name("oom_ranks.py"), 2, corpus, tmp_path, timeout=120):
        assert code == 0, output
    expected = json.loads((tmp_path / "rank0.json").read_text())
    assert expected == json.loads((tmp_path / "rank1.json").read_text())
    assert expected["micro_batch_sizes"] == [2, 2]
    assert expected["losses"] == pytest.approx(expected["free_losses"], rel=1e-6)
