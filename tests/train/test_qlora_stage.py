"""Every stage in bf16, and the stages with adapters on a base of four bits: they learn, and resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from qlora_runs import WIDTHS

from engine import dpo, lora, midtrain, pretrain, sft
from engine.checkpoint import restore
from engine.config import Config
from engine.errors import UserError
from engine.stages import origin

STEPS = 4
NF4 = {"lora__base": "nf4", "lora__double_quant": True}


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory) -> Path:
    """A folder with a finished pretraining run in bf16, examples and preferences in it."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain.run(tiny.config(corpus, folder / "base", train__max_steps=2, model__seq_length=96, train__precision="bf16",
                             **WIDTHS))
    rows = [{"instruction": f"the spring {i}", "response": f"stores what the hand gives {i * 7}"} for i in range(40)]
    pairs = [{"prompt": row["instruction"], "chosen": row["response"], "rejected": f"wheels of {i}"}
             for i, row in enumerate(rows)]
    for name, values in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder


def config(parent: Path, stage: str, name: str, **changes) -> Config:
    base = {"stage": stage, "output_dir": parent / name, "device": "cpu", "init_from": str(parent / "base"),
            "examples": {"train": [{"path": str(parent / ("pairs.jsonl" if stage == "dpo" else "rows.jsonl"))}],
                         "template": "chatml", "audit_samples": 0},
            "train": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-2,
                      "precision": "bf16", "schedule": "constant"},
            "checkpoint": {"save_steps": 2}, "evaluation": {"eval_steps": 0},
            "logging": {"logging_steps": 1, "tensorboard": False, "progress": "off"}}
    if stage == "midtrain":
        del base["examples"]
    if stage == "lora":
        base["lora"] = {"rank": 4, "alpha": 8.0}
    return Config(**base).with_values({key.replace("__", "."): value for key, value in changes.items()})


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize(("driver", "stage", "changes"), [
    (midtrain, "midtrain", {}), (sft, "sft", {}), (dpo, "dpo", {}), (lora, "lora", {}), (lora, "lora", NF4),
    (dpo, "dpo", {"lora__rank": 4, "lora__base": "nf4"}),
], ids=["midtrain", "sft", "dpo", "lora", "qlora", "dpo qlora"])
def test_every_stage_learns_in_bf16(corpus, parent, driver, stage, changes, request):
    name = f"bf16 {request.node.callspec.id}"
    if stage == "midtrain":
        changes = {"data__path": corpus}
    driver.run(config(parent, stage, name, **changes))
    found = losses(parent / name)
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.05, found
    with restore.model(parent / name, load_base=origin.load_base) as restored:
        assert {p.dtype for p in restored.chunks[0].parameters()} == {torch.bfloat16}


def test_resuming_on_four_bits_repeats_every_bit(parent):
    from engine.model import quantized, whole

    driver = lora.run
    driver(config(parent, "lora", "whole", **NF4))
    driver(config(parent, "lora", "halves", **NF4, train__max_steps=2))
    driver(config(parent, "lora", "halves", **NF4))
    assert losses(parent / "whole") == losses(parent / "halves")
    found = []
    for name in ("whole", "halves"):
        with restore.model(parent / name, load_base=origin.load_base) as restored:
            chunk = restored.chunks[0]
            found.append({name: p.detach().clone() for name, p in whole.global_names(chunk).items()}
                         | {name: weight.dense() for name, weight in quantized.weights(chunk).items()})
            assert quantized.weights(chunk)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_widths_that_do_not_fit_are_refused_once_the_model_is_known(parent, monkeypatch):
    """The configuration says nothing of the model's shape: what ``init_from`` says is checked."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"lora\.base: nf4 has blocks of 64 input features, which 32 on a rank"):
        origin.settle(config(parent, "lora", "narrow", **NF4, parallel__tensor=4))


def test_fp8_is_refused(parent):
    with pytest.raises(UserError, match=r"train\.fp8: multiplies weights in 8 bits, but lora holds frozen ones in 4"):
        config(parent, "lora", "fp8", **NF4, train__fp8=True)
