"""Stages after pretraining: what they take over from where they start, the best checkpoint at the end, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from engine import midtrain, pretrain
from engine.checkpoint import layout, restore
from engine.config import Config, load_yaml
from engine.errors import UserError
from engine.stages import origin


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory):
    """A folder with a finished pretraining run in it."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain.run(tiny.config(corpus, folder / "pretrain", train__max_steps=3, model__rotary_base=5000.0))
    return folder


def middle(corpus, parent, **changes) -> Config:
    """A mid-training configuration without a word of the model's shape."""
    base = tiny.config(corpus, parent / changes.pop("name", "mid")).model_dump(exclude_unset=True)
    del base["model"]
    return Config(**base | {"stage": "midtrain"}).with_values(
        {name.replace("__", "."): value for name, value in changes.items()})


def weights(run) -> dict[str, torch.Tensor]:
    with restore.model(run) as restored:
        return {name: p.detach().clone() for name, p in restored.chunks[0].named_parameters()}


def test_midtraining_finds_the_newest_checkpoint_and_its_model(corpus, parent):
    cfg, found = origin.settle(middle(corpus, parent))
    assert found is not None
    assert found.path == parent / "pretrain/checkpoints/iter_0000003"
    assert (cfg.model.hidden_size, cfg.model.rotary_base) == (32, 5000.0)
    assert cfg.model.vocab_size == tiny.VOCAB
    assert cfg.init_from == str(found.path)


def test_midtraining_starts_with_those_weights_and_a_fresh_schedule(corpus, parent):
    state = midtrain.run(middle(corpus, parent, name="still", train__lr=1e-30, train__weight_decay=0.0,
                                train__max_steps=2))
    assert state.step == 2
    before, after = weights(parent / "pretrain"), weights(parent / "still")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = load_yaml(parent / "still/checkpoints/iter_0000002/config.yaml")
    assert saved["stage"] == "midtrain"
    assert saved["model"]["rotary_base"] == 5000.0


def test_a_resumed_run_keeps_its_origin_though_a_newer_one_has_come(corpus, parent):
    cfg = middle(corpus, parent, name="resumed", train__max_steps=2)
    midtrain.run(cfg)
    pretrain.run(tiny.config(corpus, parent / "later", train__max_steps=1))
    assert origin.settle(cfg)[1].path.parent.parent.name == "pretrain"
    assert origin.settle(middle(corpus, parent, name="fresh"))[1].path.parent.parent.name == "later"
    assert origin.settle(cfg.with_values({"init_from": str(parent / "later")}))[1].path.parent.parent.name == "later"
    longer = midtrain.run(cfg.with_values({"train.max_steps": 4}))
    whole = midtrain.run(middle(corpus, parent, name="whole", train__max_steps=4,
                                init_from=str(parent / "pretrain")))
    assert longer.step == whole.step == 4
    one, other = weights(parent / "resumed"), weights(parent / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_keeps_its_origin_though_the_run_that_it_names_went_on(corpus, tmp_path):
    first = tiny.config(corpus, tmp_path / "pretrain", train__max_steps=1)
    pretrain.run(first)
    cfg = middle(corpus, tmp_path, train__max_steps=1, init_from=str(tmp_path / "pretrain"))
    midtrain.run(cfg)
    pretrain.run(first.with_values({"train.max_steps": 2}))
    assert origin.settle(cfg)[1].path.name == "iter_0000001"
    assert origin.settle(cfg.with_values({"output_dir": tmp_path / "other"}))[1].path.name == "iter_0000002"


def test_a_run_ends_with_its_best_weights(corpus, parent):
    """A learning rate that ruins the model after the first steps: the best is not the last."""
    cfg = middle(corpus, parent, name="best", train__max_steps=6, train__lr=0.3, checkpoint__save_steps=1,
                 evaluation__eval_steps=1, checkpoint__load_best_at_end=True, train__clip_grad=0.0,
                 init_from=str(parent / "pretrain"))
    state = midtrain.run(cfg)
    checkpoints = layout.root(parent / "best")
    rows = [json.loads(line) for line in (parent / "best/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    assert state.best_step == min(losses, key=losses.get) != 6
    assert layout.find(parent / "best") == layout.folder(checkpoints, state.best_step)
    assert layout.find(parent / "best", newest=True) == layout.folder(checkpoints, 6)
    assert origin.find(parent / "best").path == layout.folder(checkpoints, state.best_step)
    # Goes on from the newest, not from the best, and is then a run like any other: it ends with what it saved last.
    midtrain.run(cfg.with_values({"train.max_steps": 7, "checkpoint.load_best_at_end": False,
                                  "checkpoint.keep_last": 9}))
    assert layout.find(parent / "best", newest=True) == layout.folder(checkpoints, 7)
    assert layout.find(parent / "best") == layout.folder(checkpoints, 7)


@pytest.mark.parametrize(("changes", "field"), [
    ({"stage": "pretrain", "init_from": "x"}, "init_from"),
    ({"stage": "sft", "data.path": "x"}, "data.path"),
    ({"stage": "sft", "model.backend": "te", "examples.packing": False}, "model.backend"),
    ({"stage": "midtrain", "lora.rank": 4}, "lora"),
    ({"stage": "lora", "train.optimizer": "muon"}, "train.optimizer"),
    ({"stage": "sft", "train.seq_length_schedule": [{"step": 0, "seq_length": 8}]}, "train.seq_length_schedule"),
    ({"stage": "dpo", "train.label_smoothing": 0.1}, "train.label_smoothing"),
    ({"stage": "dpo", "train.z_loss": 0.1}, "train.z_loss"),
    ({"stage": "dpo", "dpo.loss": "robust"}, "dpo.label_smoothing"),
    ({"stage": "dpo", "dpo.loss": "ipo", "dpo.label_smoothing": 0.1}, "dpo.label_smoothing"),
    ({"stage": "lora", "lora.target_modules": ["q_prj"]}, "lora.target_modules.0"),
    ({"stage": "lora", "lora.double_quant": True}, "lora.double_quant"),
    ({"checkpoint.load_best_at_end": True, "checkpoint.keep_best": False}, "checkpoint.load_best_at_end"),
])
def test_contradictions_of_stages(changes, field):
    with pytest.raises(UserError, match=rf"^{field.replace('.', '[.]')}: "):
        Config().with_values(changes)


def test_where_there_is_nothing_to_start_from(corpus, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of an earlier stage"):
        origin.settle(middle(corpus, tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        origin.settle(middle(corpus, tmp_path, init_from=str(tmp_path / "none_here")))
    with pytest.raises(UserError, match="names no shape"):
        origin.settle(middle(corpus, tmp_path, init_from="none"))


def test_another_model_and_another_tokenizer_are_refused(corpus, parent, tmp_path):
    with pytest.raises(UserError, match=r"model\.ffn_hidden_size 64 \(here 96\)"):
        midtrain.run(middle(corpus, parent, name="wider", init_from=str(parent / "pretrain"),
                            model__ffn_hidden_size=96))
    other = tiny.write_corpus(tmp_path, vocab_size=290)
    with pytest.raises(UserError, match="holds another tokenizer than that of"):
        midtrain.run(middle(other, parent, name="other", init_from=str(parent / "pretrain")))


def test_the_layout_is_checked_against_the_model_that_comes(corpus, parent):
    cfg = middle(corpus, parent, init_from=str(parent / "pretrain"), parallel__tensor=3)
    with pytest.raises(UserError, match=r"parallel\.tensor: 3 does not divide model\.num_attention_heads \(4\)"):
        origin.settle(cfg)


def logged(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows] + [rows[-1]["val/loss"]]


EXPERTS = {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32, "aux_loss_coeff": 0.01}}
LAYOUTS = {
    "tp2": (2, {"parallel__tensor": 2}, {}), "pp2": (2, {"parallel__pipeline": 2}, {}), "dp2": (2, {}, {}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}, {}), "ep2": (2, {"parallel__expert": 2}, EXPERTS),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_midtraining_under_a_layout_is_that_of_one_rank(corpus, tmp_path, name):
    """The whole driver: the origin found and read by every rank, whatever layout it was saved under."""
    world, layout_, shape = LAYOUTS[name]
    pretrain.run(tiny.config(corpus, tmp_path / "pretrain", train__max_steps=2, **shape))
    cfg = middle(corpus, tmp_path, name="one", train__max_steps=4, init_from=str(tmp_path / "pretrain"))
    midtrain.run(cfg)
    shared = middle(corpus, tmp_path, name="shared", train__max_steps=4, init_from=str(tmp_path / "pretrain"),
                    **layout_)
    (tmp_path / "case.json").write_text(tiny.to_json(shared))
    ranks = tiny.launch(Path(__file__).with_name("midtrain_ranks.py"), world, tmp_path / "case.json")
    assert [code for code, _ in ranks] == [0] * world, [output[-1500:] for _, output in ranks]
    assert logged(tmp_path / "shared") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)


def test_steps_from_epochs():
    from engine.stages.run import with_epochs

    def steps(epochs: float, rows: int, **train: object) -> int:
        cfg = Config().with_values({"examples.epochs": epochs, "train.global_batch_size": 8} | {
            f"train.{name}": value for name, value in train.items()})
        return with_epochs(cfg, rows).train.max_steps

    assert [steps(1, 16), steps(1, 17), steps(2.5, 16), steps(0.01, 16)] == [2, 3, 5, 1]
    growing = {"kind": "doubling", "start": 2, "every_steps": 3}  # 2 2 2 4 4 4 8 8 …
    for rows in range(1, 60):
        sizes, count = [2, 2, 2, 4, 4, 4, *[8] * 10], steps(1, rows, batch_size_schedule=growing)
        assert sum(sizes[:count]) >= rows > sum(sizes[:count - 1])
    assert with_epochs(Config(), 5).train.max_steps == Config().train.max_steps
