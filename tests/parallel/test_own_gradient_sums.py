"""Linear layers that add their gradients to ``main_grad`` themselves leave the bits that Megatron's hooks leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from engine.parallel.wrap import unwrap

SHAPES = {
    "plain": {}, "bf16": {"train__precision": "bf16"}, "recompute": {"train__recompute": "full"},
    "biases": {"model__attention_bias": True, "model__tie_embeddings": False},
    "experts": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "num_dense_layers": 1,
                               "shared_ffn_hidden_size": 40}},
}


def steps(cfg, *, hooks: bool = False) -> tuple[list[dict], set[str]]:
    """Gradients of two steps of four micro-batches, and the parameters whose hooks had nothing to add.

    ``hooks``: the layers leave the sums to Megatron's.
    """
    run, found = tiny.start(cfg), []
    if hooks:
        for p in unwrap(run.chunks[0]).parameters():
            p.sums_own_gradient = p.sums_before_hook = False
    for _ in range(2):
        run.step()
        found.append({name: p.main_grad.clone() for name, p in tiny.unwrapped(run).named_parameters()})
    return found, {name for name, p in tiny.unwrapped(run).named_parameters() if p.grad_added_to_main_grad}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits(config, shape, overlap):
    own, added = steps(config(parallel__overlap_grad_reduce=overlap, **SHAPES[shape]))
    hooks, none = steps(config(parallel__overlap_grad_reduce=overlap, **SHAPES[shape]), hooks=True)
    assert not none
    matrices = {name for name in own[0] if ".linear_" in name and name.endswith("weight")}
    assert added == matrices
    for mine, theirs in zip(own, hooks, strict=True):
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
        assert all(mine[name].any() for name in matrices if "local_experts" not in name)


def test_a_hook_on_the_weight_gets_its_gradient(config):
    for overlap in (False, True):
        run = tiny.start(config(parallel__overlap_grad_reduce=overlap))
        weight = tiny.unwrapped(run).decoder.layers[0].mlp.linear_fc1.weight
        seen = []
        weight.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        run.step()
        assert len(seen) == 4
        assert torch.equal(sum(seen[1:], seen[0]), weight.main_grad) or weight.main_grad.any()
        assert not weight.grad_added_to_main_grad


def test_overlapped_on_two_ranks(corpus, tmp_path):
    """Two data-parallel ranks that reduce while they go backward: the gradients of one rank with both's batches."""
    cfg = tiny.config(corpus, tmp_path / "run", train__global_batch_size=8, model__attention_bias=True,
                      train__clip_grad=0.0)
    (tmp_path / "cfg.json").write_text(tiny.to_json(cfg))
    for code, output in tiny.launch(Path(__file__).with_name("overlap_ranks.py"), 2, tmp_path):
        assert code == 0, output[-4000:]
    alone, _ = steps(cfg)
    for kind in ("plain", "overlap", "buckets"):
        found = torch.load(tmp_path / f"{kind}.pt")
        assert len(found) == len(alone)
        for mine, theirs in zip(found, alone, strict=True):
            for name, value in theirs.items():
                error = (mine[name] - value).norm() / value.norm().clamp(min=1e-12)
                assert error < 1e-5, (kind, name, error)
