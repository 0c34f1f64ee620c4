"""The stage lora: adapters beside a frozen base, their checkpoints, what they resume beside, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lora_runs
import pytest
import tiny
import torch

from engine import lora as driver
from engine import pretrain
from engine.checkpoint import layout, restore, sharded
from engine.config import Config
from engine.errors import UserError
from engine.model import lora, lora_merge, lora_report, whole
from engine.stages import origin

STEPS = 6


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory) -> Path:
    """A folder with two finished pretraining runs and two files of examples in it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("base", 1), ("other", 2)):
        pretrain.run(tiny.config(corpus, folder / name, train__max_steps=2, model__seq_length=96, seed=seed))
    for name, start in (("domain", 0), ("general", 100)):
        rows = [{"instruction": f"the spring {i}", "response": f"stores what the hand gives {i * 7}"}
                for i in range(start, start + 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(parent: Path, name: str, **changes) -> Config:
    base = {"stage": "lora", "output_dir": parent / name, "device": "cpu", "init_from": str(parent / "base"),
            "examples": {"train": [{"path": str(parent / "domain.jsonl"), "weight": 3.0},
                                   {"path": str(parent / "general.jsonl")}],
                         "validation_fraction": 0.1, "template": "chatml", "audit_samples": 0},
            "lora": {"rank": 4, "alpha": 8.0},
            "train": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-2,
                      "precision": "fp32", "schedule": "constant"},
            "checkpoint": {"save_steps": 3}, "evaluation": {"eval_steps": 3},
            "logging": {"logging_steps": 1, "tensorboard": False, "progress": "off"}}
    return Config(**base).with_values({key.replace("__", "."): value for key, value in changes.items()})


def weights(run: Path) -> dict[str, torch.Tensor]:
    with restore.model(run, load_base=origin.load_base) as restored:
        return {name: p.detach().clone() for name, p in whole.global_names(restored.chunks[0]).items()}


def rows_of(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("train/tokens_per_sec", "train/mfu", "train/memory_gb", "time", "timestamp")
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def test_adapters_learn_beside_a_base_that_stays(parent, capsys):
    driver.run(config(parent, "learns"))
    printed = capsys.readouterr().err
    assert "q_proj" in printed
    assert "trained beside" in printed
    losses = [row["train/loss"] for row in rows_of(parent / "learns") if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.5
    found, base = weights(parent / "learns"), weights(parent / "base")
    assert {name for name in found if not lora.is_adapter(name)} == base.keys()
    assert all(torch.equal(found[name], value) for name, value in base.items())
    assert all(value.any() for name, value in found.items() if lora.is_adapter(name))


def test_a_checkpoint_holds_the_adapters_and_names_their_base(parent):
    driver.run(config(parent, "holds", train__max_steps=1))
    checkpoint = layout.find(parent / "holds")
    keys = set(sharded._stored_types(checkpoint / "sharded"))
    assert not [key for key in keys if not lora.is_adapter(key) and "optimizer" not in key]
    assert {key.split(".adapter.")[1] for key in keys if lora.is_adapter(key)} == {
        f"{part}_{which}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        for which in "ab"}
    record = json.loads((checkpoint / "state.json").read_text())["base"]
    assert Path(record["path"]) == layout.find(parent / "base")
    assert record["sha256"] == origin.find(parent / "base").fingerprint()


@pytest.mark.parametrize("changes", [{"lora__dropout": 0.2}, {"train__precision": "bf16"}], ids=["dropout", "bf16"])
def test_resuming_repeats_every_bit(parent, changes, request):
    name = request.node.callspec.id
    driver.run(config(parent, f"whole {name}", **changes))
    driver.run(config(parent, f"halves {name}", **changes | {"train__max_steps": 3}))
    driver.run(config(parent, f"halves {name}", **changes))
    one, other = rows_of(parent / f"whole {name}"), rows_of(parent / f"halves {name}")
    steps = [row for row in one if "train/loss" in row]
    assert steps == [row for row in other if "train/loss" in row]
    assert len({row["train/loss"] for row in steps}) == STEPS
    one, other = weights(parent / f"whole {name}"), weights(parent / f"halves {name}")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_another_base_is_refused(parent):
    cfg = config(parent, "beside", train__max_steps=1)
    driver.run(cfg)
    longer = cfg.with_values({"train.max_steps": 2})
    with pytest.raises(UserError, match="is an adapter for another base"):
        driver.run(longer.with_values({"init_from": str(parent / "other")}))
    with pytest.raises(UserError, match=r"other adapters: lora.rank 4 \(here 8\)"):
        driver.run(longer.with_values({"lora.rank": 8}))
    with pytest.raises(UserError, match="target_modules"):
        driver.run(longer.with_values({"lora.target_modules": ["attention"]}))
    driver.run(longer)


def test_a_base_that_moved_with_its_run_is_found_and_one_that_is_gone_is_missed(parent, tmp_path):
    driver.run(config(parent, "moves", train__max_steps=1))
    for name in ("base", "moves"):
        shutil.copytree(parent / name, tmp_path / name)
    record = tmp_path / "moves/checkpoints/iter_0000001/state.json"
    gone = json.loads(record.read_text())
    gone["base"]["path"] = str(tmp_path / "nowhere/iter_0000002")
    record.write_text(json.dumps(gone))
    found = restore.model(tmp_path / "moves", load_base=origin.load_base, verify=False)
    with found as restored:
        assert restored.chunks
    weight = next((tmp_path / "base/checkpoints/iter_0000002/sharded").glob("*.distcp"))
    (tmp_path / "base/checkpoints/iter_0000002/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not the base that these adapters were trained beside"):
        restore.model(tmp_path / "moves", load_base=origin.load_base, verify=False)
    restore.topology.shutdown()
    assert weight.exists()
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="is gone"):
        restore.model(tmp_path / "moves", load_base=origin.load_base, verify=False)
    restore.topology.shutdown()


def test_a_whole_model_and_adapters_are_not_taken_for_each_other(parent):
    driver.run(config(parent, "kinds", train__max_steps=1))
    with pytest.raises(UserError, match="holds adapters, not a model"):
        driver.run(config(parent, "on adapters", init_from=str(parent / "kinds")))
    with pytest.raises(UserError, match="is a checkpoint of adapters"):
        restore.model(parent / "kinds")
    restore.topology.shutdown()
    with pytest.raises(UserError, match="init_from is none"):
        driver.run(config(parent, "on nothing", init_from="none", model__num_layers=2,
                          examples__tokenizer=str(layout.find(parent / "base") / "tokenizer")))


@pytest.mark.parametrize(("values", "changes", "words"), [
    ({"target_modules": ["q_proj", "experts.down_proj"]}, {},
     r"lora.target_modules.1: 'experts.down_proj' matched nothing .* It has q_proj, k_proj"),
    ({"target_modules": ["mlp"]}, {"model__moe": {"num_experts": 4, "top_k": 2}},
     r"'mlp' matched nothing .* experts.gate_up_proj"),
    ({"dropout": 0.1}, {"model__moe": {"num_experts": 4, "top_k": 2}}, "adapters of experts have none"),
], ids=["no experts", "no dense", "dropout"])
def test_what_adapts_nothing_is_refused_with_the_names_there_are(corpus, tmp_path, values, changes, words):
    cfg = lora_runs.with_lora(tiny.config(corpus, tmp_path, **changes), **values)

    def start() -> None:
        run = tiny.start(cfg)
        lora_report.check(run.chunks, cfg, run.groups)

    with pytest.raises(UserError, match=words):
        start()


def test_an_untrained_adapter_is_the_base_and_merging_it_changes_nothing(corpus, tmp_path):
    from engine.model import build
    from engine.parallel import topology

    cfg = lora_runs.with_lora(tiny.config(corpus, tmp_path, model__moe={"num_experts": 4, "top_k": 2}))
    groups = topology.build(cfg)
    model = build.model(cfg, groups, tiny.VOCAB)[0].eval()
    tokens = torch.arange(tiny.SEQ)[None] % tiny.VOCAB
    with torch.no_grad():
        with lora.detached([model]):
            base = model(tokens, torch.arange(tiny.SEQ)[None], None)
        assert torch.equal(model(tokens, torch.arange(tiny.SEQ)[None], None), base)
        first = model.decoder.layers[0].mlp.experts.local_experts[1].linear_fc2.adapter
        first.get_parameter("down_proj_b").fill_(0.5)
        found = model(tokens, torch.arange(tiny.SEQ)[None], None)
        assert not torch.equal(found, base)
        merged = lora_merge.merge([model], groups)
        assert (merged.changed, merged.total) == (1, 2 * (4 + 4 * 2))
        assert (model(tokens, torch.arange(tiny.SEQ)[None], None) - found).abs().max() < 1e-5


def test_factors_start_as_pefts_whatever_they_are_beside(corpus, tmp_path):
    """A uniform in ±1/sqrt(inputs), B zero; with other adapters beside it a factor is the same."""
    from engine.model import build
    from engine.parallel import topology

    found = []
    for targets in (["all-linear"], ["down_proj"]):
        cfg = lora_runs.with_lora(tiny.config(corpus, tmp_path), target_modules=targets, rank=32)
        model = build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]
        found.append({name: p.detach() for name, p in whole.global_names(model).items() if lora.is_adapter(name)})
    every, few = found
    assert all(torch.equal(value, every[name]) for name, value in few.items())
    for name, value in every.items():
        if name.endswith("_b"):
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_merging_into_a_quantised_base_gives_what_it_computed(corpus, tmp_path):
    """Also of the layers without an adapter: nothing is left in four bits."""
    from engine.model import build, quantized
    from engine.parallel import topology

    cfg = tiny.config(corpus, tmp_path, model__hidden_size=64, model__ffn_hidden_size=128,
                      model__moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64})
    cfg = lora_runs.with_lora(cfg, base="nf4", target_modules=["q_proj", "experts.down_proj"])
    groups = topology.build(cfg)
    model = build.model(cfg, groups, tiny.VOCAB)[0].eval()
    lora_runs.randomise([model])
    tokens, places = torch.arange(tiny.SEQ)[None] * 7 % tiny.VOCAB, torch.arange(tiny.SEQ)[None]
    with torch.no_grad():
        found = model(tokens, places, None)
        with lora.detached([model]):
            assert (model(tokens, places, None) - found).abs().max() > 1e-3
        assert len(quantized.weights(model)) == 2 * (2 + 4 * 2)
        merged = lora_merge.merge([model], groups)
        assert not quantized.weights(model)
        assert (merged.changed, merged.total) == (10, 10)
        assert (model(tokens, places, None) - found).abs().max() < 1e-5
