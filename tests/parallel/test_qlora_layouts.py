"""A quantised base under every layout: the same codes, the same training, the same refusal on all ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lora_runs
import pytest
import qlora_runs
import tiny
import torch
from qlora_runs import COMMON, SHAPES, assert_quantised, qlora

TP2, PP2, EP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}, {"parallel__expert": 2}
SP, ETP1 = TP2 | {"parallel__sequence_parallel": True}, {"parallel__expert_tensor": 1}
DOUBLE = {"double_quant": True}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """An ordinary checkpoint of each shape, saved by one rank, and its unsplit weights."""
    return functools.cache(lambda shape: qlora_runs.trained(corpus, tmp_path_factory.mktemp(shape), shape))


# name: (shape, adapters, layout)
TWO_RANKS = {
    "dp2": ("dense", {}, {}),
    "tp2": ("dense", DOUBLE, TP2),
    "tp2_sp": ("biases", DOUBLE, SP),
    "tp2_sp_recompute": ("dense", {}, SP | {"train__recompute": "full"}),
    "pp2": ("dense", DOUBLE, PP2),
    "ep2": ("mixtral", DOUBLE, EP2),
    "etp2": ("deepseek", DOUBLE, SP),
    "tp2_ep2_etp1": ("gpt_oss", {}, SP | EP2 | ETP1),
    "cp2": ("dense", {}, {"parallel__context": 2}),
}
FOUR_RANKS = {
    "tp2_pp2": ("dense", DOUBLE, TP2 | PP2),
    "ep2_tp2": ("mixtral", DOUBLE, EP2 | SP),
}


def write_cases(folder: Path, config, trained, cases: dict) -> None:
    written = {name: {"config": tiny.to_json(config(**COMMON | SHAPES[shape] | layout)), "lora": lora,
                      "checkpoint": str(trained(shape)[0]), "trains": True}
               for name, (shape, lora, layout) in cases.items()}
    (folder / "cases.json").write_text(json.dumps(written))


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_every_layout_holds_and_trains_the_same_model(config, corpus, trained, tmp_path: Path, world: int, cases: dict):
    write_cases(tmp_path, config, trained, cases)
    ranks = tiny.launch(Path(__file__).with_name("qlora_ranks.py"), world, tmp_path)
    outputs = [output.strip().splitlines()[-15:] for _, output in ranks]
    assert [code for code, _ in ranks] == [0] * world, outputs
    known: dict = {}
    for name, (shape, lora, layout) in cases.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert_quantised(found["loaded"], trained(shape)[1], bool(lora))
        key = shape, bool(lora), "train__recompute" in layout
        if key not in known:
            kept = {k: v for k, v in layout.items() if k.startswith("train")}
            known[key] = lora_runs.three_steps(qlora(config(**COMMON | SHAPES[shape] | kept), **lora))
        assert not differences(found, known[key]), (name, differences(found, known[key]))


def differences(found: dict, expected: dict, bound: float = 1e-5) -> list[str]:
    wrong = [f"{kind} {found[kind]} for {expected[kind]}" for kind in ("losses", "norms")
             if found[kind] != pytest.approx(expected[kind], rel=bound)]
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            error = ((found[kind][name] - value).norm() / (value.norm() + 1e-30)).item()
            if not error <= bound:
                wrong.append(f"{kind}: {name} is off by {error:.1e}")
    return wrong


def test_numbers_that_are_not_finite_are_refused_on_all_ranks(config, corpus, trained, tmp_path: Path):
    """Of a weight that one of two pipeline ranks holds: the other one does not wait for it."""
    run = tiny.start(config(**COMMON))
    with torch.no_grad():
        layer: Any = tiny.unwrapped(run).decoder.layers[0]
        layer.mlp.linear_fc2.weight[3, 70] = torch.nan
    broken = run.save()
    written = {"config": tiny.to_json(config(**COMMON | PP2)), "lora": {}, "checkpoint": str(broken), "trains": False}
    (tmp_path / "cases.json").write_text(json.dumps({"nan": written}))
    ranks = tiny.launch(Path(__file__).with_name("qlora_ranks.py"), 2, tmp_path, timeout=120)
    assert [code for code, _ in ranks] == [0, 0], ranks
    for rank in range(2):
        assert (tmp_path / f"nan.{rank}.txt").read_text() == (
            "decoder.layers.0.mlp.linear_fc2.weight: holds NaN or infinity, which cannot be quantised. Start from a "
            "sound checkpoint, or use lora.base none")
