"""Muon under every kind of layout gives one rank's losses, gradient norms and weights, and each state one owner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

COMMON = {"train__optimizer": "muon", "train__global_batch_size": 8, "train__eps": 1e-5, "train__clip_grad": 0.5}
MOE = {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 40,
                      "num_dense_layers": 1}}
BIASES = {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}, "model__linear_bias": True}
SHAPES = {
    "plain": {},
    "untied": {"model__num_layers": 4, "model__tie_embeddings": False, "model__qk_norm": True, "train__clip_grad": 0.0},
    "one_group": {"model__num_query_groups": 1, "model__attention_bias": True},
    "bf16": {"train__precision": "bf16"},
    "moe": MOE,
    "expert_biases": BIASES,
}
TP2, SP = {"parallel__tensor": 2}, {"parallel__sequence_parallel": True}
# What Newton–Schulz is made to think of communication: dear beyond measure, so that Gram matrices never pay, or free.
GATHER, GRAM = {"newton_schulz.FLOPS_A_BYTE": 1e9}, {"newton_schulz.FLOPS_A_BYTE": 0}
# name: (shape of the model, layout, changes of constants in engine.train)
TWO_RANKS = {
    "tp2_gather": ("plain", TP2, GATHER),
    "tp2_gram": ("plain", TP2, GRAM),
    "tp2_sp": ("untied", TP2 | SP, {}),
    "tp2_one_group": ("one_group", TP2, {}),
    "pp2": ("plain", {"parallel__pipeline": 2}, {}),
    "pp2_interleaved": ("untied", {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, {}),
    "dp2": ("plain", {}, {"ownership.BUCKET": 4096}),  # many broadcasts
    "dp2_overlap": ("untied", {"parallel__overlap_grad_reduce": True, "parallel__distributed_optimizer": True}, {}),
    "dp2_bf16": ("bf16", {}, {}),
    "cp2": ("plain", {"parallel__context": 2}, {}),
    "dp2_moe": ("moe", {}, {}),
    "ep2": ("moe", {"parallel__expert": 2}, {}),
    "tp2_sp_moe_gram": ("moe", TP2 | SP, GRAM),
    "expert_biases": ("expert_biases", TP2 | SP | {"parallel__expert_tensor": 1, "parallel__expert": 2}, {}),
}
FOUR_RANKS = {
    "tp2_dp2": ("plain", TP2, {}),
    "tp4": ("plain", {"parallel__tensor": 4}, {}),  # two ranks share one of the two groups
    "tp2_sp_ep2": ("moe", TP2 | SP | {"parallel__expert": 2, "parallel__expert_tensor": 1}, {}),
    "dp2_pp2_bf16": ("bf16", {"parallel__pipeline": 2}, {}),
}


def one_rank(cfg) -> dict:
    run = tiny.start(cfg, masked=True)
    results = [run.step() for _ in range(3)]
    state = run.optimizer.chained_optimizers[0].optimizer.state
    return {"losses": [r.sums.loss for r in results], "norms": [r.grad_norm for r in results],
            "weights": tiny.whole_weights(run),
            "held": {kind: sum(s[kind].numel() for s in state.values() if kind in s)
                     for kind in ("momentum", "exp_avg", "exp_avg_sq")}}


def differences(found: dict, expected: dict, bound: float) -> list[str]:
    """What is relatively off by more than ``bound``; a tensor by its own norm."""
    wrong = [f"{name} {found[name]} for {expected[name]}" for name in ("losses", "norms")
             if found[name] != pytest.approx(expected[name], rel=bound)]
    if found["weights"].keys() != expected["weights"].keys():
        return [*wrong, f"other weights: {found['weights'].keys() ^ expected['weights'].keys()}"]
    for name, value in expected["weights"].items():
        error = ((found["weights"][name].float() - value.float()).norm() / value.float().norm()).item()
        if not error <= bound:
            wrong.append(f"{name} is off by {error:.1e}")
    return wrong


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("one_rank")
    return {shape: one_rank(tiny.config(corpus, output, **COMMON | changes)) for shape, changes in SHAPES.items()}


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_ranks_equal_one(world, cases, config, expected, tmp_path: Path):
    configs = {name: (tiny.to_json(config(**COMMON | SHAPES[shape] | layout)), changes)
               for name, (shape, layout, changes) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(configs))
    ranks = tiny.launch(Path(__file__).with_name("muon_ranks.py"), world, tmp_path)
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    wrong = {}
    for name, (shape, _, _) in cases.items():
        if not (tmp_path / f"{name}.pt").exists():
            wrong[name] = ["did not finish", *outputs[0]]
            break
        found = torch.load(tmp_path / f"{name}.pt")
        wrong[name] = differences(found, expected[shape], 2e-2 if shape == "bf16" else 1e-5)
        if name.startswith("dp2"):
            wrong[name] += not_shared(found["held"], expected[shape]["held"], stages=world // 2)
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, whats in wrong.items() for what in whats)
    assert [code for code, _ in ranks] == [0] * world, outputs
    for errors in json.loads((tmp_path / "split.json").read_text()):
        assert all(error < 3e-6 for error in errors.values()), errors


def not_shared(held: list[dict[str, int]], whole: dict[str, int], stages: int) -> list[str]:
    """Complaints where ranks hold not each number once, or one of them none.

    The tied embedding is on the first and the last of two pipeline stages.
    """
    wrong = []
    for kind, numbers in whole.items():
        total = sum(rank.get(kind, 0) for rank in held)
        if total < numbers or (total > numbers and stages == 1):
            wrong.append(f"{kind}: ranks hold {total} numbers, one rank alone {numbers}")
    owned = [rank.get("momentum", 0) + rank.get("exp_avg", 0) for rank in held]
    if "weights" in held[0] and [rank["weights"] for rank in held] != owned:
        wrong.append(f"fp32 weights are not those that are owned: {held}")
    if not all(sum(rank.values()) for rank in held):
        wrong.append(f"a rank has nothing to do: {held}")
    return wrong
