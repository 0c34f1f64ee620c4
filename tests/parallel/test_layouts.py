"""Every layout of two ranks trains like one rank: losses, gradient norms, weights; so does every micro-batch size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from engine.config import Config

STEPS = 3
LAYOUTS = {
    "dp2": {},
    "dp2_distributed_optimizer": {"parallel__distributed_optimizer": True},
    "dp2_overlap": {"parallel__overlap_grad_reduce": True, "parallel__distributed_optimizer": True},
    "tp2": {"parallel__tensor": 2},
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "pp2": {"parallel__pipeline": 2},
    "pp2_interleaved": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
}
# What a layout could break besides: norms of single heads, untied embeddings, no clipping, fewer groups than ranks.
SHAPES = {
    "plain": {},
    "qk_norm": {"model__qk_norm": True, "model__tie_embeddings": False, "train__clip_grad": 0.0},
    "one_group": {"model__num_query_groups": 1, "model__attention_bias": True},
    "biases": {"model__linear_bias": True, "model__activation": "clamped_swiglu"},
}
# Weights differ where Adam divides a gradient of nothing but rounding by its own size; this eps is above those.
COMMON = {"model__num_layers": 4, "train__global_batch_size": 8, "train__eps": 1e-5, "train__clip_grad": 0.5}


def cases() -> dict[str, tuple[str, dict, str]]:
    """name: (layout, changes, the case of one rank that it must equal)."""
    found = {f"{layout}-plain": (layout, {}, "plain") for layout in LAYOUTS}
    for shape in ("qk_norm", "one_group"):
        found |= {f"{layout}-{shape}": (layout, SHAPES[shape], shape) for layout in ("tp2", "tp2_sp", "pp2")}
    found |= {f"{layout}-biases": (layout, SHAPES["biases"], "biases") for layout in ("tp2", "tp2_sp")}
    for layout in ("tp2_sp", "dp2_distributed_optimizer", "pp2"):
        found[f"{layout}-bf16"] = (layout, {"train__precision": "bf16"}, "bf16")
    return found


def one_rank(cfg: Config) -> dict:
    run = tiny.start(cfg, masked=True)
    found = {"initial": tiny.whole_weights(run)}
    results = [run.step() for _ in range(STEPS)]
    return found | {"losses": [r.sums.loss for r in results], "tokens": [r.sums.tokens for r in results],
                    "correct": [r.sums.correct for r in results], "norms": [r.grad_norm for r in results],
                    "weights": tiny.whole_weights(run)}


def differences(found: dict, expected: dict, *, losses: float = 1e-6, norms: float = 1e-6,
                weights: float = 1e-6) -> list[str]:
    """What is not equal: initial weights bit for bit, the rest relative; a tensor's error to the model's whole norm."""
    wrong = [f"{name} initially" for name, value in expected["initial"].items()
             if not torch.equal(value, found["initial"][name])]
    if found["weights"].keys() != expected["weights"].keys():
        wrong.append(f"other weights: {found['weights'].keys() ^ expected['weights'].keys()}")
        return wrong
    if found["tokens"] != expected["tokens"]:
        wrong.append(f"tokens {found['tokens']} for {expected['tokens']}")
    for name, bound in (("losses", losses), ("norms", norms)):
        if found[name] != pytest.approx(expected[name], rel=bound):
            wrong.append(f"{name} {found[name]} for {expected[name]}")
    norm = torch.stack([value.norm() for value in expected["weights"].values()]).norm()
    for name, value in expected["weights"].items():
        error = ((found["weights"][name].float() - value.float()).norm() / norm).item()
        if not error <= weights:
            wrong.append(f"{name} is off by {error:.1e}")
    return wrong


def test_two_ranks_equal_one(config, tmp_path: Path):
    configs = {name: config(**COMMON | LAYOUTS[layout] | changes) for name, (layout, changes, _) in cases().items()}
    (tmp_path / "cases.json").write_text(json.dumps({name: tiny.to_json(cfg) for name, cfg in configs.items()}))
    expected = {shape: one_rank(config(**COMMON | SHAPES[shape])) for shape in SHAPES}
    expected["bf16"] = one_rank(config(**COMMON, train__precision="bf16"))
    assert len(set(expected["plain"]["tokens"])) == STEPS, "the masks are not uneven"
    ranks = tiny.launch(Path(__file__).with_name("layouts_worker.py"), 2, tmp_path)
    wrong = {}
    for name, (_, _, same_as) in cases().items():
        if not (tmp_path / f"{name}.pt").exists():
            wrong[name] = ["did not finish"]
            continue
        found = torch.load(tmp_path / f"{name}.pt")
        bounds = {"losses": 2e-3, "norms": 2e-2, "weights": 1e-2} if same_as == "bf16" else {}
        wrong[name] = differences(found, expected[same_as], **bounds)
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert [code for code, _ in ranks] == [0, 0], outputs
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, whats in wrong.items() for what in whats)


def test_overlap_on_four_ranks_changes_nothing(config, tmp_path: Path):
    """Every overlap that a CPU can have, where chunks and stages, or sequences, are shared as well."""
    overlap = {"parallel__distributed_optimizer": True, "parallel__overlap_grad_reduce": True}
    layouts = {"interleaved": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
               "sequence": {"parallel__tensor": 2, "parallel__sequence_parallel": True}}
    configs = {name: config(**COMMON | overlap | changes) for name, changes in layouts.items()}
    (tmp_path / "cases.json").write_text(json.dumps({name: tiny.to_json(cfg) for name, cfg in configs.items()}))
    expected = one_rank(config(**COMMON))
    ranks = tiny.launch(Path(__file__).with_name("layouts_worker.py"), 4, tmp_path)
    assert [code for code, _ in ranks] == [0] * 4, [output.strip().splitlines()[-15:] for _, output in ranks]
    for name in layouts:
        assert not differences(torch.load(tmp_path / f"{name}.pt"), expected), name


def test_gradients_do_not_depend_on_the_micro_batch_size(config):
    expected = None
    for micro in (1, 2, 4, 8):
        found = one_rank(config(train__micro_batch_size=micro, **COMMON))
        expected = expected or found
        assert not differences(found, expected), micro
    assert len(set(expected["tokens"])) == STEPS, "the masks are not uneven"


def test_a_batch_with_nothing_supervised_changes_nothing_by_gradient(config):
    run = tiny.start(config(train__weight_decay=0.0))
    run.data = Unsupervised(run.data)
    before = tiny.whole_weights(run)
    result = run.step()
    assert result.sums.tokens == 0
    assert result.grad_norm == 0.0
    for name, value in tiny.whole_weights(run).items():
        assert torch.equal(value, before[name]), name


class Unsupervised:
    """Every loss mask empty."""

    def __init__(self, inner):
        self.inner = inner

    def micro_batches(self, *args, **kwargs):
        for batch in self.inner.micro_batches(*args, **kwargs):
            batch.loss_mask_bs.zero_()
            yield batch
