"""A blend in a whole stage: its ledger, its metrics, resumes under other weights, and checkpoints of another order."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from engine import pretrain
from engine.checkpoint.manager import read_state
from engine.data import loader
from engine.errors import UserError
from engine.stages.run import _check_order
from engine.train.state import TrainState


@pytest.fixture(scope="module")
def both(corpus, tmp_path_factory):
    """The corpus, and one whose training split is the first one's validation split."""
    other = tmp_path_factory.mktemp("other") / "held"
    shutil.copytree(corpus, other)
    for end in ("bin", "idx"):
        shutil.copyfile(other / f"validation.{end}", other / f"train.{end}")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"splits": {}}))
    return [corpus, other]


def blend_config(both, folder, weights=(3, 1), **changes):
    cfg = tiny.config(both[0], folder, **changes)
    entries = [{"path": path, "weight": weight} for path, weight in zip(both, weights, strict=True)]
    return cfg.with_values({"data.path": None, "data.blend": entries})


def found(folder):
    """The ledger's tokens, and the rows of metrics.jsonl."""
    book = json.loads((folder / "data_ledger.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return book, rows


def test_the_ledger_of_a_resumed_run_is_that_of_one_that_never_stopped(both, tmp_path, capfd):
    pretrain.run(blend_config(both, tmp_path / "whole", train__max_steps=5))
    pretrain.run(blend_config(both, tmp_path / "parts", train__max_steps=2))
    half = found(tmp_path / "parts")[0]
    pretrain.run(blend_config(both, tmp_path / "parts", train__max_steps=5))
    book, rows = found(tmp_path / "whole")
    assert found(tmp_path / "parts")[0] == book
    assert (half["step"], half["tokens"], book["step"], book["tokens"]) == (2, 128, 5, 320)
    assert [one["tokens"] for one in book["sources"]] == [15 * 16, 5 * 16]
    assert [one["source"] for one in book["sources"]] == [str(path) for path in both]
    names = [path.name for path in both]
    assert [rows[-1][f"data/{name}/tokens"] for name in names] == [240, 80]
    assert rows[-1][f"data/{names[1]}/epochs"] == book["sources"][1]["epochs"] > 0
    assert f"data: {names[0]} 240 tokens (75.0%, " in capfd.readouterr().err
    losses = [[row["train/loss"] for row in found(tmp_path / name)[1]] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_other_weights_hold_from_the_checkpoint_on_and_are_kept_for_later_starts(both, tmp_path, capfd):
    pretrain.run(blend_config(both, tmp_path, train__max_steps=2))
    pretrain.run(blend_config(both, tmp_path, (0, 1), train__max_steps=4))
    assert f"the blend changes here, at 128 tokens: {both[1]} 100.00%" in capfd.readouterr().err
    state = pretrain.run(blend_config(both, tmp_path, (3, 1), train__max_steps=6))
    book, _ = found(tmp_path)
    assert [one["blocks"] for one in book["sources"]] == [6 + 6, 2 + 8 + 2]
    assert state.blend is not None
    assert [one["start"] for one in state.blend["segments"]] == [0, 8, 16]
    saved = read_state(tmp_path / "checkpoints/iter_0000006")["train"]
    assert TrainState.from_dict(saved) == state


def test_a_cap_that_ends_the_data_is_told_before_the_model_is_built(both, tmp_path, monkeypatch):
    from engine.model import build

    monkeypatch.setattr(build, "model", lambda *_: pytest.fail("a model was built"))
    cfg = blend_config(both, tmp_path, train__max_steps=1000)
    entries = [{"path": path, "max_epochs": 1} for path in both]
    with pytest.raises(UserError, match=r"^data\.blend: its sources are used up \(max_epochs\) after [0-9,]+ tokens, "
                       r"but 1000 steps"):
        pretrain.run(cfg.with_values({"data.blend": entries}))


def test_a_checkpoint_of_another_order_is_refused(corpus, tmp_path, monkeypatch):
    cfg = tiny.config(corpus, tmp_path, train__max_steps=1)
    with monkeypatch.context() as before:
        before.setattr(loader, "TOKENS", "tokens-1")
        pretrain.run(cfg)
    with pytest.raises(UserError, match=r"iter_0000001: was trained in another order of samples \(tokens-1; this "
                       r"version's is tokens-2\)\. Resume with the version that wrote it, or start a new stage"):
        pretrain.run(cfg.with_values({"train.max_steps": 2}))


def test_orders_of_checkpoints_from_before_they_had_names():
    class Data:
        order = "tokens-2"

    with pytest.raises(UserError, match="another order of samples \\(of an earlier version; "):
        _check_order(Data, TrainState(step=1, consumed_tokens=64), None)
    fresh = TrainState()
    _check_order(Data, fresh, None)  # weights alone: nothing was read in any order
    assert fresh.order == "tokens-2"
    Data.order = "rows-1"
    _check_order(Data, TrainState(step=1, consumed_tokens=64), None)  # rows of one source are as they were
    Data.order = "rows-2"
    with pytest.raises(UserError, match="another order of samples"):
        _check_order(Data, TrainState(step=1, consumed_tokens=64), None)
