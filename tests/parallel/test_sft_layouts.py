"""SFT on packed rows under every layout like on one rank: losses, both accuracies, gradients, weights."""

from __future__ import annotations

import json
from pathlib import Path

import context_runs
import moe_runs
import pytest
import sft_runs
import tiny
import torch

TP2, SP2 = {"parallel__tensor": 2}, {"parallel__tensor": 2, "parallel__sequence_parallel": True}
PP2, CP2, EP2 = {"parallel__pipeline": 2}, {"parallel__context": 2}, {"parallel__expert": 2}
INTERLEAVED = PP2 | {"parallel__virtual_pipeline": 2}
SHAPES = {
    "dense": {"model__num_layers": 4},
    "windows": {"model__window_size": 6, "model__full_attention_every": 2, "train__micro_batch_size": 2},
    "moe": moe_runs.SHAPES["mixtral"],
}
# name: (shape, layout); the same shape on one rank is what it must equal.
TWO_RANKS = {
    "tp2": ("dense", TP2), "tp2_sp": ("dense", SP2), "pp2": ("dense", PP2), "dp2": ("dense", {}),
    "dp2_shared": ("dense", {"parallel__distributed_optimizer": True}), "cp2": ("dense", CP2), "ep2_moe": ("moe", EP2),
}
FOUR_RANKS = {"tp2_pp2": ("dense", TP2 | PP2), "cp2_pp2": ("dense", CP2 | INTERLEAVED),
              "cp2_dp2": ("windows", CP2), "ep2_tp2_moe": ("moe", EP2 | SP2)}


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    output, known = tmp_path_factory.mktemp("one_rank"), {}

    def train(shape: str) -> dict:
        if shape not in known:
            tiny.forget_layout()
            known[shape] = sft_runs.three_steps(tiny.config(corpus, output, **sft_runs.MODEL | SHAPES[shape]))
        return known[shape]

    return train


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_ranks_equal_one(config, one_rank, tmp_path: Path, world: int, cases: dict):
    configs = {name: tiny.to_json(config(**sft_runs.MODEL | SHAPES[shape] | layout))
               for name, (shape, layout) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(configs))
    expected = {name: one_rank(shape) for name, (shape, _) in cases.items()}
    ranks = tiny.launch(Path(__file__).with_name("sft_worker.py"), world, tmp_path)
    wrong = {}
    for name in cases:
        there = (tmp_path / f"{name}.pt").exists()
        wrong[name] = (context_runs.differences(torch.load(tmp_path / f"{name}.pt"), expected[name], 1e-5) if there
                       else ["did not finish"])
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert [code for code, _ in ranks] == [0] * world, outputs
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, whats in wrong.items() for what in whats)


def test_there_is_something_to_compare(one_rank):
    *steps, evaluated = one_rank("dense")["counts"]
    for tokens, correct, (_, documents), (_, exact) in steps:
        assert 0 < documents < tokens
        assert exact <= correct
    assert 0 < evaluated[2] < evaluated[1] < 1, "no example was predicted whole, or all were"
