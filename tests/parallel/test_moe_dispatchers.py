"""The dispatchers' kernels against Megatron's own methods: what a step computes, and what the host waits for."""

from __future__ import annotations

import json
from pathlib import Path

import moe_runs
import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from engine.model import build
from engine.parallel import topology

EP2, ETP1, ETP2 = {"parallel__expert": 2}, {"parallel__expert_tensor": 1}, {"parallel__expert_tensor": 2}
TP2 = {"parallel__tensor": 2, "parallel__sequence_parallel": True}

# name: (shape, dispatcher, layout)
CASES = {
    1: {"bias": ("deepseek", "alltoall", {}), "gather": ("gpt_oss", "allgather", {}),
        "recompute": ("switch", "alltoall", {"train__recompute": "full"})},
    2: {"ep2": ("mixtral", "alltoall", EP2), "ep2_gather": ("deepseek", "allgather", EP2),
        "ep2_starved": ("starved", "alltoall", EP2), "ep2_starved_gather": ("starved", "allgather", EP2),
        "etp2": ("deepseek", "alltoall", ETP2), "etp2_gather": ("mixtral", "allgather", ETP2),
        "tp2": ("switch", "alltoall", TP2), "tp2_ep2_etp1": ("gpt_oss", "alltoall", TP2 | EP2 | ETP1)},
    4: {"ep2_etp2": ("mixtral", "alltoall", EP2 | ETP2)},
}


def changes(shape: str, dispatcher: str, layout: dict) -> dict:
    found = moe_runs.SHAPES[shape] | layout
    layers = 1 + found["model__moe"].get("num_dense_layers", 0)  # a single one has experts: the interpreter is slow
    return found | {"model__moe": found["model__moe"] | {"dispatcher": dispatcher}, "model__num_layers": layers}


@pytest.mark.parametrize("world", CASES)
def test_a_step_by_kernels_equals_one_by_megatron(config, tmp_path: Path, monkeypatch, world: int):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    size = {"train__global_batch_size": max(2, world)}
    configs = {name: config(**changes(*case) | size) for name, case in CASES[world].items()}
    (tmp_path / "cases.json").write_text(json.dumps({name: tiny.to_json(cfg) for name, cfg in configs.items()}))
    ranks = tiny.launch(Path(__file__).with_name("moe_dispatchers_worker.py"), world, tmp_path)
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert [code for code, _ in ranks] == [0] * world, outputs
    wrong = {}
    for name in configs:
        found = torch.load(tmp_path / f"{name}.pt")
        wrong[name] = moe_runs.differences(found["triton"], found["torch"] | {"weights": None}, 1e-6)
        assert torch.equal(found["triton"]["counts"], found["torch"]["counts"]), name
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, whats in wrong.items() for what in whats)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU do not reach the kernels there")
@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_with_all_experts_on_one_rank_nothing_is_read_by_the_host(config, kind, impl):
    """Fake tensors have no numbers: Megatron's own path stops at the first that it asks for."""
    cfg = config(**changes("mixtral", kind, {}))
    model = build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]
    mlp = model.decoder.layers[0].mlp
    mlp.token_dispatcher.impl = mlp.router.impl = impl

    def there_and_back():
        dispatcher = mlp.token_dispatcher
        x_sbh = torch.randn(6, 2, 32)
        probs_te, chosen_te = mlp.route(x_sbh)
        rows_ph, probs_p = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x_sbh, chosen_te, probs_te))
        rows_ph, counts_e, probs_p = dispatcher.dispatch_postprocess(rows_ph, probs_p)
        assert rows_ph.shape == (24, 32)
        assert probs_p.shape == (24,)
        assert counts_e.shape == (4,)
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows_ph)))

    with FakeTensorMode(allow_non_fake_inputs=True):
        if impl == "triton":
            assert there_and_back().shape == (6, 2, 32)
        else:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                there_and_back()
