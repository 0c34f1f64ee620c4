"""The optimizer's state in a checkpoint: what is refused, resuming in another precision, the loss scale."""

from __future__ import annotations

import json
from pathlib import Path

import gathered
import pytest
import tiny
import torch

from engine import disk
from engine.checkpoint import optimizer_state, sharded
from engine.errors import UserError
from engine.model import build


def trained(cfg, steps: int = 2) -> tiny.Run:
    run = tiny.start(cfg)
    for _ in range(steps):
        run.step()
    return run


@pytest.fixture
def run(config) -> tiny.Run:
    return trained(config(train__max_steps=8))


@pytest.mark.parametrize(("saved", "here"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_refused(config, saved, here):
    path = trained(config(train__optimizer=saved)).save()
    with pytest.raises(UserError, match=f"saved with train.optimizer {saved} .here {here}.*Set it as it was") as caught:
        tiny.start(config(train__optimizer=here)).load(path)
    assert "\n" not in str(caught.value)


def changed(monkeypatch, run: tiny.Run, change) -> Path:
    """A checkpoint whose optimizer tensors ``change`` has had before they were written."""
    to_save = optimizer_state.to_save

    def changing(*args):
        state = to_save(*args)
        change(state["optimizer"])
        return state

    with monkeypatch.context() as patch:
        patch.setattr(sharded.optimizer_state, "to_save", changing)
        return run.save()


def test_a_missing_tensor_is_refused_by_name_before_anything_changes(run, config, monkeypatch):
    path = changed(monkeypatch, run, lambda tensors: [tensors.pop(name) for name in list(tensors) if tensors[
        name].key == "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"])
    other = tiny.start(config())
    before = gathered.state(other)
    with pytest.raises(UserError, match=r"holds no optimizer\.state\.exp_avg_sq\.decoder\.final_layernorm") as caught:
        other.load(path)
    assert "\n" not in str(caught.value)
    after = gathered.state(other)
    assert not gathered.differing({"weights": after["weights"]}, {"weights": before["weights"]})


def test_a_tensor_too_many_is_refused_by_name(run, config, monkeypatch):
    def add(tensors: dict) -> None:
        like = next(value for value in tensors.values() if value.key.endswith("final_layernorm.weight"))
        tensors["more"] = optimizer_state._sharded(like, "optimizer.state.momentum.decoder.more", like.data, saves=True)

    path = changed(monkeypatch, run, add)
    with pytest.raises(UserError, match=r"holds a optimizer\.state\.momentum\.decoder\.more that is not here"):
        tiny.start(config()).load(path)


def test_a_tensor_of_another_shape_is_refused(run, config, monkeypatch):
    def shorten(tensors: dict) -> None:
        for name, value in tensors.items():
            if value.key == "optimizer.state.exp_avg.decoder.final_layernorm.weight":
                short = value.data[:-1].clone()
                tensors[name] = type(value).from_rank_offsets(value.key, short, replica_id=value.replica_id)

    path = changed(monkeypatch, run, shorten)
    with pytest.raises(UserError, match=r"does not fit this model: .*exp_avg\.decoder\.final_layernorm"):
        tiny.start(config()).load(path)


def test_state_of_an_earlier_version_is_refused(run, config):
    path = run.save()
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | {"version": 1}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = disk.sha256(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    with pytest.raises(UserError, match="saved by another version of the engine"):
        tiny.start(config()).load(path)


def test_a_run_can_be_saved_before_its_first_update(config):
    run = trained(config(data__shuffle_seed=3), steps=0)
    path = run.save()
    before = gathered.state(run)
    assert before["step"]["of every group"].tolist() == [0]
    resumed = trained(config(data__shuffle_seed=3, seed=9))
    resumed.load(path)
    found = gathered.state(resumed)
    assert not any(value.any() for kind in ("exp_avg", "exp_avg_sq") for value in found[kind].values())
    assert not gathered.differing({"weights": found["weights"]}, {"weights": before["weights"]})
    assert resumed.step().sums.loss == run.step().sums.loss


def test_what_is_loaded_depends_on_nothing_before(run, config):
    """Loading over a run that has gone on gives what loading into a fresh one gives."""
    path = run.save()
    fresh = tiny.start(config(seed=5))
    fresh.load(path)
    expected = gathered.state(run)
    run.step()
    run.load(path)
    assert not gathered.differing(gathered.state(run), expected)
    assert not gathered.differing(gathered.state(fresh), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("distributed", [False, True])
def test_precision_may_change(config, optimizer, distributed):
    """From 16 bits to fp32 the weights become the fp32 ones behind them; back, those are exactly the weights."""
    shape = {"train__optimizer": optimizer, "model__tie_embeddings": False, "data__shuffle_seed": 3}
    half = trained(config(train__precision="bf16", **shape))
    from_half, saved = half.save(), gathered.state(half)
    options = shape | {"parallel__distributed_optimizer": distributed, "seed": 5}
    full = tiny.start(config(**options))
    full.load(from_half)
    found = gathered.state(full)
    assert any(not torch.equal(value, saved["weights"][name].float()) for name, value in found["weights"].items())
    saved["weights"] = saved.pop("param")
    assert not gathered.differing(found, saved)
    assert full.step().sums.loss == pytest.approx(half.step().sums.loss, rel=2e-2)

    from_full, saved = full.save(), gathered.state(full)
    again = tiny.start(config(train__precision="bf16", **options))
    again.load(from_full)
    found = gathered.state(again)
    rounded = {name: value.bfloat16() for name, value in saved["weights"].items()}
    assert not gathered.differing(found, {**saved, "param": saved["weights"], "weights": rounded})
    assert again.step().sums.loss == pytest.approx(full.step().sums.loss, rel=2e-2)


def test_the_loss_scale_goes_on_where_it_was(config, monkeypatch):
    """fp16 needs a GPU by the configuration; its arithmetic is the same on a CPU."""
    monkeypatch.setattr(build.model_config, "resolve_precision", lambda precision, device: torch.float16)
    run = trained(config())
    scaler = run.optimizer.chained_optimizers[0].grad_scaler
    scaler._scale.fill_(2.0**40)  # far above what fp16 holds
    run.step()
    path, expected = run.save(), scaler.state_dict()
    assert expected["hysteresis_tracker"] == 1
    assert expected["growth_tracker"] == 0
    resumed = tiny.start(config())
    resumed.load(path)
    assert resumed.optimizer.chained_optimizers[0].grad_scaler.state_dict() == expected
    assert not gathered.differing(gathered.state(resumed), gathered.state(run))
    for one in (run, resumed):
        one.step()
        assert one.optimizer.get_loss_scale().item() == 2.0**39
    monkeypatch.undo()
    full = tiny.start(config())  # has no loss scale, and goes on from the fp32 weights
    full.load(path)
    assert full.step().stepped
