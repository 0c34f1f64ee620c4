"""Adapters train under every layout like on one rank: their gradients, the norms, losses and weights, while the frozen
weights stay bit for bit.

The bound is far above what summation order costs (some 1e-7) and far below what any missing or doubled sum does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_runs
import moe_runs
import pytest
import tiny
import torch

from engine.model import lora

COMMON = {"model__num_layers": 4, "train__global_batch_size": 8, "train__eps": 1e-5, "train__clip_grad": 0.5}
TP2, PP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
SP = TP2 | {"parallel__sequence_parallel": True}
EP2, ETP1, ETP2 = {"parallel__expert": 2}, {"parallel__expert_tensor": 1}, {"parallel__expert_tensor": 2}
SHARED, FULL = {"parallel__distributed_optimizer": True}, {"train__recompute": "full"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "biases": {"model__linear_bias": True, "model__qk_norm": True, "model__tie_embeddings": False},
    "one_group": {"model__num_query_groups": 1},  # two tensor ranks share one key-value head
    "half_experts": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "num_dense_layers": 2}},
} | {name: moe_runs.SHAPES[name] for name in ("mixtral", "deepseek", "gpt_oss", "starved")}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"target_modules": ["v_proj", "q_proj", "up_proj", "experts"], "rslora": True},
    "attention": {"target_modules": ["attention"]},
    "experts": {"target_modules": ["experts"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
}

# name: (model, adapters, layout); the same model with the same adapters on one rank is what it must equal.
TWO_RANKS = {
    "dp2": ("dense", "all", {}),
    "dp2_shared": ("dense", "all", SHARED | {"parallel__overlap_grad_reduce": True}),
    "tp2": ("dense", "all", TP2),
    "tp2_some": ("biases", "some", TP2),
    "tp2_sp": ("biases", "all", SP),
    "tp2_sp_recompute": ("dense", "all", SP | FULL),
    "tp2_one_group": ("one_group", "all", TP2),
    "pp2": ("dense", "all", PP2),  # tied embeddings: frozen on both stages
    "pp2_recompute": ("biases", "attention", PP2 | FULL),
    "pp2_none_first": ("half_experts", "experts", PP2),  # a stage that has no adapter at all
    "pp2_none_last": ("half_experts", "mlp", PP2),
    "pp2_interleaved": ("dense", "some", PP2 | {"parallel__virtual_pipeline": 2}),
    "cp2": ("dense", "all", {"parallel__context": 2}),
    "ep2": ("mixtral", "all", EP2),
    "ep2_deepseek": ("deepseek", "all", EP2 | SHARED),
    "etp2": ("mixtral", "all", ETP2),
    "etp2_starved": ("starved", "all", ETP2),
    "tp2_etp1": ("gpt_oss", "all", SP | ETP1),
}
FOUR_RANKS = {
    "tp2_pp2": ("dense", "all", TP2 | PP2),
    "ep2_tp2": ("mixtral", "all", EP2 | SP),
    "ep2_etp2": ("mixtral", "all", EP2 | ETP2),
    "ep2_pp2": ("gpt_oss", "all", EP2 | PP2),
}


def configuration(config, model: str, layout: dict):
    return config(**COMMON | MODELS[model] | layout)


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    """What one rank has, by model and adapters; each is trained once."""
    output, known = tmp_path_factory.mktemp("one_rank"), {}

    def train(model: str, adapters: str, layout: dict) -> dict:
        kept = {k: v for k, v in layout.items() if k in FULL}
        key = model, adapters, *kept
        if key not in known:
            cfg = tiny.config(corpus, output, **COMMON | MODELS[model] | kept)
            known[key] = lora_runs.three_steps(lora_runs.with_lora(cfg, **ADAPTERS[adapters]))
        return known[key]

    return train


def differences(found: dict, expected: dict, bound: float = 1e-5) -> list[str]:
    wrong = [f"{name} initially" for name, value in expected["initial"].items()
             if not torch.equal(value, found["initial"][name])]
    wrong += [f"{name} is frozen, and moved" for name, value in found["weights"].items()
              if not lora.is_adapter(name) and not torch.equal(value, found["initial"][name])]
    if not min(expected["norms"]) > 0:
        wrong.append("one rank has no gradients, so equal ones prove nothing")
    if found["tokens"] != expected["tokens"]:
        wrong.append(f"tokens {found['tokens']} for {expected['tokens']}")
    for kind in ("losses", "norms"):
        if found[kind] != pytest.approx(expected[kind], rel=bound):
            wrong.append(f"{kind} {found[kind]} for {expected[kind]}")
    for kind in ("gradients", "weights"):
        if found[kind] is None:
            continue
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            error = ((found[kind][name] - value).norm() / (value.norm() + 1e-30)).item()
            if not error <= bound:
                wrong.append(f"{kind}: {name} is off by {error:.1e}")
    return wrong


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_ranks_equal_one(config, one_rank, tmp_path: Path, world: int, cases: dict):
    texts = {name: (tiny.to_json(configuration(config, model, layout)), ADAPTERS[adapters])
             for name, (model, adapters, layout) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(texts))
    ranks = tiny.launch(Path(__file__).with_name("lora_layouts_worker.py"), world, tmp_path)
    wrong = {}
    for name, case in cases.items():
        saved = tmp_path / f"{name}.pt"
        wrong[name] = differences(torch.load(saved), one_rank(*case)) if saved.exists() else ["did not finish"]
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert not any(wrong.values()), "\n".join(
        [*(f"{name}: {what}" for name, whats in wrong.items() for what in whats), *map(str, outputs)])
    assert [code for code, _ in ranks] == [0] * world, outputs


def test_every_gradient_of_the_reference_counts(one_rank):
    """Had a factor no gradient, equal ranks would prove nothing of it."""
    found = one_rank("mixtral", "all", {})["gradients"]
    assert all(value.abs().max() > 1e-6 for value in found.values())
    assert {lora.factor(name)[1] for name in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"}
