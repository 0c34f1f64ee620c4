"""DPO, IPO and robust DPO under every layout like on one rank: the reference, losses, rewards, gradients, weights."""

from __future__ import annotations

import json
from pathlib import Path

import moe_runs
import pair_runs
import pytest
import tiny
import torch

TP2, SP2 = {"parallel__tensor": 2}, {"parallel__tensor": 2, "parallel__sequence_parallel": True}
PP2, CP2, EP2 = {"parallel__pipeline": 2}, {"parallel__context": 2}, {"parallel__expert": 2}
INTERLEAVED = PP2 | {"parallel__virtual_pipeline": 2}
SHAPES = {
    "dpo": {"model__num_layers": 4},
    "ipo": {"dpo__loss": "ipo", "dpo__beta": 0.3, "train__micro_batch_size": 2},
    "robust": {"dpo__loss": "robust", "dpo__label_smoothing": 0.2},
    "windows": {"model__window_size": 6, "model__full_attention_every": 2, "model__attention_sinks": True},
    "unshared": {"examples__prefix_sharing": False, "model__num_layers": 4},
    "moe": moe_runs.SHAPES["mixtral"],
}
# name: (shape, layout); the same shape on one rank is what it must equal.
TWO_RANKS = {
    "tp2": ("dpo", TP2), "tp2_sp": ("robust", SP2), "pp2": ("dpo", PP2), "dp2": ("dpo", {}),
    "dp2_shared": ("dpo", {"parallel__distributed_optimizer": True}), "cp2": ("dpo", CP2),
    "cp2_unshared": ("unshared", CP2), "ep2_moe": ("moe", EP2),
}
FOUR_RANKS = {
    "tp2_pp2": ("dpo", TP2 | PP2), "tp2_cp2": ("windows", SP2 | CP2), "cp2_pp2": ("dpo", CP2 | INTERLEAVED),
    "ep2_tp2_moe": ("moe", EP2 | SP2), "cp2_dp2": ("ipo", CP2),
}


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    output, known = tmp_path_factory.mktemp("one_rank"), {}

    def train(shape: str) -> dict:
        if shape not in known:
            tiny.forget_layout()
            known[shape] = pair_runs.three_steps(tiny.config(corpus, output, **pair_runs.MODEL | SHAPES[shape]))
        return known[shape]

    return train


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_ranks_equal_one(config, one_rank, tmp_path: Path, world: int, cases: dict):
    configs = {name: tiny.to_json(config(**pair_runs.MODEL | SHAPES[shape] | layout))
               for name, (shape, layout) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(configs))
    expected = {name: one_rank(shape) for name, (shape, _) in cases.items()}
    ranks = tiny.launch(Path(__file__).with_name("dpo_worker.py"), world, tmp_path)
    wrong = {}
    for name in cases:
        there = (tmp_path / f"{name}.pt").exists()
        wrong[name] = (pair_runs.differences(torch.load(tmp_path / f"{name}.pt"), expected[name], 1e-5) if there
                       else ["did not finish"])
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert [code for code, _ in ranks] == [0] * world, outputs
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, whats in wrong.items() for what in whats)


def test_the_shapes_differ(one_rank):
    """Else the cases above could all be the same."""
    losses = [round(one_rank(shape)["losses"][2], 5) for shape in ("dpo", "ipo", "robust", "windows", "moe")]
    assert len(set(losses)) == len(losses), losses
    counts = one_rank("dpo")["counts"]
    assert len({tokens for tokens, _ in counts[:3]}) > 1, "as many pairs in every batch"
    assert 0 < counts[0][1] < counts[0][0]
    assert counts[3] == 60, "evaluation has every pair once"


def test_prompts_computed_once_or_twice_learn_the_same(one_rank):
    """Whole runs: rows are packed otherwise, so their batches are not the same pairs; the reference is."""
    shared, apart = one_rank("dpo")["reference"], one_rank("unshared")["reference"]
    torch.testing.assert_close(shared, apart, rtol=1e-6, atol=1e-5)
    assert one_rank("unshared")["counts"][0] != one_rank("dpo")["counts"][0]
