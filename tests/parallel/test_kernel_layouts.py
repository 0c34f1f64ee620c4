"""Models train to the reference backend's losses with every set of kernels, under every kind of layout.

Triton's kernels run in its interpreter here, on the ranks of a CPU layout: the same code that a GPU compiles.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from kernel_runs import STEPS, losses

LAYOUTS = {
    "tp2": {"parallel__tensor": 2},
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "pp2": {"parallel__pipeline": 2},
    "cp2": {"parallel__context": 2},
    "ep2": {"parallel__expert": 2},
    "ep2_allgather": {"parallel__expert": 2, "model__moe__dispatcher": "allgather"},
}
MODELS = {
    "dense": {},
    "qk_norm": {"model__qk_norm": True, "model__tie_embeddings": False},
    "moe": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "z_loss_coeff": 1e-2,
                           "aux_loss_coeff": 0.1}},
    # biases, sinks, windows and the clamped activation
    "gpt_oss": {"model__moe": {"num_experts": 4, "top_k": 3, "ffn_hidden_size": 48, "aux_loss_coeff": 0.1},
                "model__linear_bias": True, "model__activation": "clamped_swiglu", "model__attention_sinks": True,
                "model__window_size": 6},
}
DENSE = [("dense", layout) for layout in ("tp2", "tp2_sp", "pp2", "cp2")]
CASES = {"auto": DENSE + [("qk_norm", "tp2_sp")] + [
             (model, layout) for model in ("moe", "gpt_oss") for layout in ("ep2", "ep2_allgather", "cp2")],
         "triton": [*DENSE, ("moe", "ep2"), ("gpt_oss", "ep2_allgather")]}  # the interpreter is slow
# Weights differ where Adam divides a gradient of nothing but rounding by its own size; this eps is above those.
COMMON = {"train__eps": 1e-5, "train__micro_batch_size": 2}


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory) -> dict[str, list[float]]:
    """Every model on one rank, through plain PyTorch."""
    folder = tmp_path_factory.mktemp("reference")
    return {name: losses(tiny.config(corpus, folder, model__backend="reference", **COMMON, **model))
            for name, model in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_one_rank_trains_as_the_reference(config, expected, model, kernels):
    found = losses(config(model__kernels=kernels, **COMMON, **MODELS[model]))
    assert found == pytest.approx(expected[model], rel=1e-5)
    assert found[-1] < 0.95 * found[0], "nothing was learnt"


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_layouts_train_as_the_reference(config, expected, tmp_path, kernels):
    cases = {f"{model}-{layout}": (model, config(model__kernels=kernels, **COMMON, **MODELS[model], **LAYOUTS[layout]))
             for model, layout in CASES[kernels]}
    (tmp_path / "cases.json").write_text(json.dumps({name: tiny.to_json(cfg) for name, (_, cfg) in cases.items()}))
    ranks = tiny.launch(Path(__file__).with_name("kernels_worker.py"), 2, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], [output.strip().splitlines()[-15:] for _, output in ranks]
    for name, (model, _) in cases.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(found) == STEPS
        assert found == pytest.approx(expected[model], rel=1e-5), name
