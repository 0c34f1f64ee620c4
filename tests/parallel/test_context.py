"""Ranks that share sequences train like one rank: losses, norms, gradients, weights, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import context_runs
import pytest
import tiny
import torch

# Weights differ where Adam divides a gradient of nothing but rounding by its own size; this eps is above those.
COMMON = {"train__global_batch_size": 8, "train__micro_batch_size": 2, "train__eps": 1e-5, "train__clip_grad": 0.5}
SHAPES = {
    "plain": {},
    "untied": {"model__tie_embeddings": False, "model__qk_norm": True, "model__num_query_groups": 1},
    "gpt_oss": {"model__window_size": 5, "model__full_attention_every": 2, "model__attention_sinks": True,
                "model__attention_bias": True, "model__yarn": {"factor": 4.0, "original_seq_length": 8}},
    "growing": {"train__batch_size_schedule": {"kind": "ramp", "start": 4, "increment": 4, "every_steps": 2},
                "train__seq_length_schedule": [{"step": 0, "seq_length": 8}, {"step": 1, "seq_length": tiny.SEQ}]},
    "bf16": {"train__precision": "bf16"},
    "four layers": {"model__num_layers": 4},
}
CP2, TP2, SP2 = {"parallel__context": 2}, {"parallel__tensor": 2}, {"parallel__sequence_parallel": True}
PP2, SHARED = {"parallel__pipeline": 2}, {"parallel__distributed_optimizer": True}
FULL, SELECTIVE = {"train__recompute": "full"}, {"train__recompute": "selective"}

# name: (shape, packed, layout); the same shape on one rank is what it must equal.
TWO_RANKS = {
    "cp2": ("plain", False, CP2),
    "cp2_untied": ("untied", False, CP2),
    "cp2_gpt_oss": ("gpt_oss", False, CP2 | SHARED),
    "cp2_packed": ("plain", True, CP2),
    "cp2_gpt_oss_packed": ("gpt_oss", True, CP2 | SELECTIVE),
    "cp2_recompute": ("plain", False, CP2 | FULL),
    "cp2_growing": ("growing", False, CP2),
    "cp2_bf16": ("bf16", False, CP2),
    "tp2_sp_gpt_oss_packed": ("gpt_oss", True, TP2 | SP2),
    "tp2_one_group_packed": ("untied", True, TP2),
    "pp2_gpt_oss_packed": ("gpt_oss", True, PP2),
}
FOUR_RANKS = {
    "cp4": ("plain", False, {"parallel__context": 4}),
    "cp4_gpt_oss_packed": ("gpt_oss", True, {"parallel__context": 4}),
    "tp2_sp_cp2_gpt_oss": ("gpt_oss", False, TP2 | SP2 | CP2),
    "tp2_cp2_one_group_packed": ("untied", True, TP2 | CP2),
    "cp2_pp2_packed": ("plain", True, CP2 | PP2),
    "cp2_pp2_interleaved": ("four layers", False, CP2 | PP2 | {"parallel__virtual_pipeline": 2} | FULL),
    "cp2_dp2_shared": ("plain", False, CP2 | SHARED),
}


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    """What one rank has, by shape and whether rows are packed; each is trained once."""
    output, known = tmp_path_factory.mktemp("one_rank"), {}

    def train(shape: str, packed: bool) -> dict:
        if (shape, packed) not in known:
            known[shape, packed] = context_runs.three_steps(tiny.config(corpus, output, **COMMON | SHAPES[shape]),
                                                            packed)
        return known[shape, packed]

    return train


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_ranks_equal_one(config, one_rank, tmp_path: Path, world: int, cases: dict):
    configs = {name: (packed, tiny.to_json(config(**COMMON | SHAPES[shape] | layout)))
               for name, (shape, packed, layout) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(configs))
    expected = {name: one_rank(shape, packed) for name, (shape, packed, _) in cases.items()}
    ranks = tiny.launch(Path(__file__).with_name("context_worker.py"), world, tmp_path)
    wrong = {}
    for name, (shape, _, _) in cases.items():
        if not (tmp_path / f"{name}.pt").exists():
            wrong[name] = ["did not finish"]
            continue
        found = torch.load(tmp_path / f"{name}.pt")
        wrong[name] = context_runs.differences(found, expected[name], 3e-2 if shape == "bf16" else 1e-5)
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert [code for code, _ in ranks] == [0] * world, outputs
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, whats in wrong.items() for what in whats)
    assert torch.load(tmp_path / "exchange.pt") == world


def test_packing_and_windows_are_seen(one_rank):
    """Else the cases above could all leave them out."""
    losses = [one_rank(shape, packed)["losses"][0] for shape in ("plain", "gpt_oss") for packed in (False, True)]
    assert len({round(loss, 3) for loss in losses}) == 4, losses
    assert len(set(one_rank("plain", True)["counts"][:3])) == 3, "the masks are not uneven"


def test_the_documented_arithmetic_is_the_benchmarks():
    from benchmarks import bench_context

    text = (Path(__file__).parents[2] / "docs" / "context_parallel.md").read_text(encoding="utf-8")
    assert bench_context.paper() in text
