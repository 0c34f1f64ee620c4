"""Gates: which value is read, what passes, and that what cannot be read never does."""

from __future__ import annotations

import json
import math

import pytest

from engine.config.pipeline import Gate, PipelineConfig
from engine.errors import UserError
from engine.evaluation import gates
from engine.evaluation.gates import Place

ROWS = [
    {"step": 2, "val/loss": 3.0, "val/accuracy": 0.1},
    {"step": 3, "train/loss": 2.0},
    {"step": 4, "val/loss": 1.5, "val/accuracy": 0.5},
    {"step": 6, "val/loss": 2.5, "val/accuracy": 0.3},
]


@pytest.fixture
def place(tmp_path):
    """Metrics up to step 6; the promoted checkpoint is of step 5, as a best one is."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 8, "val/lo')
    (tmp_path / "result.json").write_text(json.dumps(
        {"refusal_rate": 0.25, "held_out": {"loss": 1.25, "a.b": 7}, "name": "x", "flag": True}))
    return Place("sft", tmp_path, checkpoint_step=5)


def check(place: Place, **fields):
    return gates.check(Gate(**fields), [place], {place.name: place})


@pytest.mark.parametrize(("take", "value", "at"), [
    ("promoted", 1.5, 4), ("last", 2.5, 6), ("lowest", 1.5, 4), ("highest", 3.0, 2), ("best", 1.5, 4),
    ("mean", 7 / 3, None)])
def test_which_row(place, take, value, at):
    found = check(place, metric="val/loss", at_most=9, take=take)
    assert (found.value, found.at, found.passed) == (pytest.approx(value), at, True)


def test_best_is_the_highest_where_the_bound_is_from_below(place):
    assert check(place, metric="val/accuracy", at_least=0.4, take="best").value == 0.5


def test_without_a_checkpoint_the_last_row_counts(place):
    assert check(Place("sft", place.folder), metric="val/loss", at_most=2).value == 2.5


@pytest.mark.parametrize(("bound", "limit", "passed"), [
    ("at_most", 1.5, True), ("at_most", 1.4999, False), ("at_least", 1.5, True), ("at_least", 1.5001, False),
    ("below", 1.5, False), ("below", 1.5001, True), ("above", 1.5, False), ("above", 1.4999, True)])
def test_bounds_at_their_edges(place, bound, limit, passed):
    found = check(place, metric="val/loss", **{bound: limit})
    assert found.passed is passed
    assert ("keeps" if passed else "misses") in found.reason
    assert "val/loss 1.5 " in found.reason


def test_all_bounds_hold_together(place):
    assert check(place, metric="val/loss", at_least=1, at_most=2).passed
    assert not check(place, metric="val/loss", at_least=1, at_most=1.2).passed


@pytest.mark.parametrize(("fields", "words"), [
    ({"metric": "val/los"}, "val/los is missing in metrics.jsonl"),
    ({"metric": "refusal_rate", "file": "answers.json"}, "refusal_rate is missing: sft left no answers.json"),
    ({"metric": "held_out.accuracy", "file": "result.json"}, "held_out.accuracy is missing in result.json"),
    ({"metric": "name", "file": "result.json"}, "name is missing"),
    ({"metric": "flag", "file": "result.json"}, "flag is missing"),
])
def test_a_missing_metric_fails_unless_it_is_not_required(place, fields, words):
    found = check(place, at_most=1e9, **fields)
    assert not found.passed
    assert found.value is None
    assert words in found.reason
    assert check(place, at_most=1e9, required=False, **fields).passed


def test_not_required_still_fails_what_is_there(place):
    assert not check(place, metric="val/loss", at_most=1, required=False).passed


def test_a_metric_only_after_the_promoted_checkpoint_is_missing(place):
    found = check(Place("sft", place.folder, checkpoint_step=1), metric="val/loss", at_most=9)
    assert not found.passed
    assert "no row up to the promoted checkpoint (step 1)" in found.reason


@pytest.mark.parametrize("take", ["promoted", "last", "best", "lowest", "highest", "mean"])
def test_not_a_number_never_passes(tmp_path, take):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/loss": 1.0}\n{"step": 2, "val/loss": "NaN"}\n')
    found = check(Place("a", tmp_path), metric="val/loss", at_most=9, take=take)
    assert not found.passed
    assert "not a number" in found.reason
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["value"] == "nan"


def test_infinity_is_compared(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/perplexity": "Infinity"}\n')
    assert not check(Place("a", tmp_path), metric="val/perplexity", at_most=1e300).passed
    assert check(Place("a", tmp_path), metric="val/perplexity", at_least=1).value == math.inf


@pytest.mark.parametrize(("name", "value"), [("refusal_rate", 0.25), ("held_out.loss", 1.25), ("held_out.a.b", 7.0)])
def test_json_by_dotted_name(place, name, value):
    assert check(place, metric=name, file="result.json", at_least=value).value == value


def test_damaged_json_fails(place):
    (place.folder / "result.json").write_text('{"refusal_rate": 0.')
    found = check(place, metric="refusal_rate", file="result.json", at_most=1)
    assert not found.passed
    assert "cannot be read: result.json" in found.reason


def test_relative_to_an_earlier_step(place, tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    (before / "metrics.jsonl").write_text('{"step": 1, "val/loss": 1.25}\n{"step": 2, "train/x": -1.0}\n')
    known = {"sft": place, "pretrain": Place("pretrain", before, 1)}
    passes = gates.check(Gate(metric="val/loss", at_most=1.2, relative_to="pretrain"), [place], known)
    assert passes.passed
    assert passes.bounds == {"at_most": 1.5}
    assert not gates.check(Gate(metric="val/loss", at_most=1.19, relative_to="pretrain"), [place], known).passed
    missing = gates.check(Gate(metric="val/accuracy", at_least=1, relative_to="pretrain"), [place], known)
    assert not missing.passed
    assert "pretrain, which it is relative to: val/accuracy is missing" in missing.reason


def test_the_step_whose_file_it_is(place, tmp_path):
    other = tmp_path / "answers"
    other.mkdir()
    (other / "result.json").write_text('{"refusal_rate": 0.5}')
    places = [place, Place("answers", other), Place("last", tmp_path / "none")]
    assert gates.check(Gate(metric="refusal_rate", file="result.json", at_most=1), places, {}).value == 0.5
    named = Gate(metric="refusal_rate", file="result.json", at_most=1, step="sft")
    assert gates.check(named, places, {}).value == 0.25


@pytest.mark.parametrize(("fields", "words"), [
    ({}, "metric: a has no bound. Set one of at_least"),
    ({"at_least": 2, "at_most": 1}, "metric: no value of a is both over 2 and under 1"),
    ({"at_least": 1, "below": 1}, "no value of a"),
    ({"at_least": 1, "at_most": 2, "take": "best"}, "take: best is the highest or the lowest"),
    ({"at_least": "much"}, "at_least: got 'much', expected a number"),
    ({"at_least": float("nan")}, "at_least: got nan"),
    ({"at_most": 1, "file": "../x.json"}, "file: ../x.json is outside"),
    ({"atmost": 1}, "atmost: unknown field. Did you mean at_most?"),
])
def test_contradictions(fields, words):
    with pytest.raises(UserError) as caught:
        Gate(metric="a", **fields)
    assert words in str(caught.value)


def test_one_value_may_be_asked_for():
    assert Gate(metric="a", at_least=1, at_most=1).bounds() == {"at_least": 1, "at_most": 1}


STEP = {"command": "prepare"}


@pytest.mark.parametrize(("stages", "fields", "words"), [
    ([], {}, "stages"),
    ([{"name": "a", "steps": [{}]}], {}, "stages.0.steps.0.command: command and script are both missing"),
    ([{"name": "a", "steps": [STEP | {"script": ["x"]}]}], {}, "both set"),
    ([{"name": "a", "steps": [{"script": ["x"], "overrides": {"b": 1}}]}], {}, "script: takes neither"),
    ([{"name": "a", "steps": [STEP, STEP]}], {}, "stages.0.steps.1.name: there are two steps 'a'"),
    ([{"name": "a", "steps": [STEP]}, {"name": "a", "steps": [STEP]}], {}, "stages.1.name: there are two stages 'a'"),
    ([{"name": "../a", "steps": [STEP]}], {}, "'../a' cannot be a folder's name"),
    ([{"name": "logs", "steps": [STEP]}], {}, "'logs' cannot be"),
    ([{"name": "a", "steps": [STEP | {"name": "here"}]}], {}, "'here' cannot be"),
    ([{"name": "a", "steps": [STEP]}], {"from_stage": "b"}, "from_stage: there is no stage 'b'. There are a"),
    ([{"name": "a", "steps": [STEP]}, {"name": "b", "steps": [STEP]}], {"from_stage": "b", "until_stage": "a"},
     "until_stage: a comes before from_stage b"),
    ([{"name": "a", "steps": [STEP], "gates": [{"metric": "m", "at_most": 1, "step": "b"}]}], {},
     "stages.0.gates.0.step: a has no step 'b'. It has a"),
    ([{"name": "a", "steps": [STEP], "gates": [{"metric": "m", "at_most": 1, "relative_to": "b"}]},
      {"name": "b", "steps": [STEP]}], {}, "stages.0.gates.0.relative_to: 'b' is no step before this gate"),
    ([{"name": "a", "steps": [STEP | {"processes": 0}]}], {}, "stages.0.steps.0.processes: got 0"),
])
def test_pipelines_that_contradict_themselves(stages, fields, words):
    with pytest.raises(UserError) as caught:
        PipelineConfig(stages=stages, **fields)
    assert words in str(caught.value)
