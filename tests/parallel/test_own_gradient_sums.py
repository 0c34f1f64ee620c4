"""Linear layers that add their gradients to ``main_grad`` themselves leave the bits that Megatron's hooks leave."""

from __future__ import annotations

import pytest
import tiny
import torch

SHAPES = {
    "plain": {}, "bf16": {"train__precision": "bf16"}, "recompute": {"train__recompute": "full"},
    "biases": {"model__attention_bias": True, "model__tie_embeddings": False},
    "experts": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "num_dense_layers": 1,
                               "shared_ffn_hidden_size": 40}},
}


def steps(cfg) -> tuple[list[dict], set[str]]:
    """Gradients of two steps of four micro-batches, and the parameters whose hooks were handed none to add."""
    run, found = tiny.start(cfg), []
    for _ in range(2):
        run.step()
        found.append({name: p.main_grad.clone() for name, p in tiny.unwrapped(run).named_parameters()})
    return found, {name for name, p in tiny.unwrapped(run).named_parameters() if p.grad_added_to_main_grad}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits(config, shape):
    own, added = steps(config(**SHAPES[shape]))
    # To overlap, hooks must see every gradient: there the layers leave the sums to them.
    hooks, none = steps(config(parallel__overlap_grad_reduce=True, **SHAPES[shape]))
    assert not none
    matrices = {name for name in own[0] if ".linear_" in name and name.endswith("weight")}
    assert added == matrices
    for mine, theirs in zip(own, hooks, strict=True):
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
        assert all(mine[name].any() for name in matrices if "local_experts" not in name)
