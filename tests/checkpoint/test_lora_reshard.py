"""A checkpoint of adapters continues under any layout, and gives there the same PEFT files and merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import gathered
import lora_runs
import moe_runs
import tiny
import torch

from engine.export import peft
from engine.model import lora_merge

TP2, EP2 = {"parallel__tensor": 2}, {"parallel__expert": 2}
SP = TP2 | {"parallel__sequence_parallel": True}
SHARED = {"parallel__distributed_optimizer": True}
MODELS = {
    "dense": {"model__num_layers": 4},
    "one_group": {"model__num_query_groups": 1},
    "experts": moe_runs.SHAPES["mixtral"],
}
CASES = {
    "tp2_dp2": ("dense", SP | SHARED),
    "tp2_pp2": ("dense", TP2 | {"parallel__pipeline": 2}),
    "pp2_interleaved": ("dense", {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "one_group_tp2": ("one_group", TP2),
    "ep2_dp2": ("experts", EP2 | SHARED),
    "ep2_etp2": ("experts", EP2 | {"parallel__expert_tensor": 2}),
    "tp2_ep2_etp1": ("experts", SP | EP2 | {"parallel__expert_tensor": 1}),
    "ep2_pp2": ("experts", EP2 | {"parallel__pipeline": 2}),
}


def started(corpus, output: Path, model: str, layout: dict | None = None):
    return tiny.config(corpus, output, train__eps=1e-5, **MODELS[model] | (layout or {}))


def test_every_layout_continues_one_ranks_adapters_and_one_rank_every_layouts(corpus, tmp_path: Path):
    known, cases = {}, {}
    for model in MODELS:
        run = tiny.start(lora_runs.with_lora(started(corpus, tmp_path / model, model)))
        lora_runs.randomise(run.chunks)
        run.step()
        source, state = lora_runs.save(run), gathered.state(run)
        peft.save([tiny.unwrapped(run)], run.cfg, run.groups, tmp_path / f"{model}.adapter")
        merged = lora_merge.merge([tiny.unwrapped(run)], run.groups)
        known[model] = source, state, tiny.whole_weights(run), merged
    for name, (model, layout) in CASES.items():
        cases[name] = tiny.to_json(started(corpus, tmp_path / name, model, layout)), {}, str(known[model][0])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    ranks = tiny.launch(Path(__file__).with_name("lora_ranks.py"), 4, tmp_path)
    assert [code for code, _ in ranks] == [0] * 4, ranks[0][1][-3000:]
    for name, (model, _) in CASES.items():
        _, state, weights, merged = known[model]
        found = torch.load(tmp_path / f"{name}.pt")
        assert not gathered.differing(found["state"], state), name
        assert found["merged"] == (merged.changed, merged.total), name
        assert merged.changed == merged.total
        for key, value in weights.items():
            assert (found["weights"][key] - value).abs().max() < 1e-6, (name, key)
        for file in (peft.WEIGHTS, peft.CONFIG, peft.RECORD):
            ours, expected = (tmp_path / f"{folder}.adapter" / file for folder in (name, model))
            assert ours.read_bytes() == expected.read_bytes(), (name, file)
        back = tiny.start(lora_runs.with_lora(started(corpus, tmp_path / f"{name} back", model)))
        lora_runs.load(back, tmp_path / name / "checkpoints/iter_0000001")
        assert not gathered.differing(gathered.state(back), state), name
