"""The stage dpo as a user runs it: from a checkpoint and a file of pairs to a checkpoint; reference; refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pair_runs
import pytest
import tiny
import torch

from engine import dpo, pretrain
from engine.checkpoint import layout, restore
from engine.config import Config
from engine.errors import UserError
from engine.train import reference


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """Two pretrained models and a file of pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    for name, seed in (("base", 1), ("other", 2)):
        pretrain.run(tiny.config(corpus, folder / name, model__seq_length=64, train__max_steps=4, seed=seed))
    pair_runs.write_jsonl(folder / "pairs.jsonl")
    return folder


def stage(runs: Path, output: Path, **changes) -> Config:
    """Four steps of three rows, on what ``runs`` has."""
    return Config(
        stage="dpo", output_dir=output, device="cpu", init_from=str(runs / "base"),
        examples={"train": [{"path": str(runs / "pairs.jsonl")}], "validation_fraction": 0.2, "template": "chatml"},
        train={"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "lr": 1e-3, "precision": "fp32",
               "schedule": "constant"},
        data={"num_workers": 0}, evaluation={"eval_steps": 2}, checkpoint={"save_steps": 2, "keep_last": 9},
        logging={"logging_steps": 1, "tensorboard": False, "progress": "off"},
    ).with_values({name.replace("__", "."): value for name, value in changes.items()})


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def learned(output: Path) -> list[dict]:
    """What of the metrics does not depend on the clock."""
    left_out = ("train/tokens_per_sec", "train/mfu", "train/memory_gb")
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows(output)]


def files(output: Path) -> list[Path]:
    return sorted((output / "reference").glob("*"))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    with restore.model(checkpoint) as restored:
        return {name: p.detach().clone() for name, p in restored.chunks[0].named_parameters()}


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    state = dpo.run(stage(runs, output))
    assert state.step == 4
    return output


def test_it_starts_at_its_reference_and_learns_the_preference(finished):
    first, *_, last = rows(finished)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0.0, abs=1e-6)
    assert first["logps/chosen"] < -1
    assert last["train/loss"] < 0.6
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/margins"] > 0.1
    assert last["rewards/accuracies"] == last["train/accuracy"] == 1.0
    assert {f"val/{name}" for name in ("loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins",
                                       "rewards/accuracies", "logps/chosen", "logps/rejected")} <= last.keys()


def test_the_reference_is_computed_once(runs, finished, tmp_path, monkeypatch):
    """Another run with other settings on the same pairs reads the file; a damaged one is computed anew."""
    scored = []
    score = reference.score

    def counting(chunks, loader, *args, **kwargs):
        scored.append(loader.num_examples)
        return score(chunks, loader, *args, **kwargs)

    monkeypatch.setattr(reference, "score", counting)
    cache = tmp_path / "cache"
    for name, changes in (("one", {"dpo__beta": 0.3}), ("two", {"dpo__loss": "ipo"}),
                          ("three", {"examples__packing": False, "train__micro_batch_size": 2})):
        dpo.run(stage(runs, tmp_path / name, dpo__cache_dir=cache, train__max_steps=1, **changes))
        assert len(scored) == 2, name
    before = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(before) == 2
    for found, own in zip(sorted(cache.iterdir()), files(finished), strict=True):
        assert found.name == own.name
    largest = max(cache.iterdir(), key=lambda path: path.stat().st_size)
    for damage in (largest.read_bytes()[:-1], bytes(b ^ (i == 300) for i, b in enumerate(largest.read_bytes())), b""):
        largest.write_bytes(damage)
        scored.clear()
        dpo.run(stage(runs, tmp_path / f"damaged{len(damage)}{damage[-1:].hex()}", dpo__cache_dir=cache,
                      train__max_steps=1))
        assert len(scored) == 1
        assert largest.read_bytes() == before[largest]


@pytest.mark.parametrize("changes", [
    {"dpo__reference": "other"}, {"init_from": "other"}, {"train__precision": "bf16"},
    {"examples__system": "Be brief."}, {"model__rotary_base": 500.0},
])
def test_what_changes_log_probabilities_changes_the_file(runs, finished, tmp_path, changes):
    changes = {name: str(runs / value) if value == "other" else value for name, value in changes.items()}
    dpo.run(stage(runs, tmp_path / "run", train__max_steps=1, examples__max_bad_fraction=0.5, **changes))
    assert not {path.name for path in files(finished)} & {path.name for path in files(tmp_path / "run")}


def test_another_reference_is_loaded_scored_and_gone(runs, tmp_path):
    """The model trains from its own weights; margins begin where the two models differ."""
    dpo.run(stage(runs, tmp_path / "run", dpo__reference=str(runs / "other"), train__lr=1e-30,
                  train__weight_decay=0.0, train__max_steps=2))
    base, after = weights(runs / "base"), weights(tmp_path / "run")
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert abs(rows(tmp_path / "run")[0]["rewards/chosen"]) > 1e-3
    dpo.run(stage(runs, tmp_path / "swapped", init_from=str(runs / "other"), dpo__reference=str(runs / "base"),
                  train__lr=1e-30, train__max_steps=2))
    for one, other in zip(rows(tmp_path / "run"), rows(tmp_path / "swapped"), strict=True):
        assert one["rewards/chosen"] == pytest.approx(-other["rewards/chosen"], rel=1e-4)


def test_resuming_repeats_every_bit(runs, finished, tmp_path):
    """Within an epoch, and past its end; the second time with the reference's file gone."""
    batch = {"train__global_batch_size": 8, "train__micro_batch_size": 4, "checkpoint__save_steps": 0,
             "evaluation__eval_steps": 3}
    dpo.run(stage(runs, tmp_path / "whole", train__max_steps=6, **batch))
    for name, forget in (("kept", False), ("gone", True)):
        output = tmp_path / name
        dpo.run(stage(runs, output, train__max_steps=3, **batch))
        for path in files(output) if forget else ():
            path.unlink()
        dpo.run(stage(runs, output, train__max_steps=6, **batch))
        # Evaluated and saved at its end, as the whole run at the same step.
        assert learned(output) == learned(tmp_path / "whole"), name
        one, other = weights(output), weights(tmp_path / "whole")
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_every_layout_and_one_cache(runs, finished, tmp_path):
    """The driver on two ranks: with a file that one rank wrote, and with one of its own."""
    given = tmp_path / "given"
    given.mkdir()
    for path in files(finished):
        (given / path.name).write_bytes(path.read_bytes())
    stamps = {path.name: path.stat().st_mtime_ns for path in given.iterdir()}
    layouts = {"pp2": {"parallel__pipeline": 2}, "dp2": {},
               "cp2": {"parallel__context": 2, "dpo__cache_dir": given},
               "tp2_given": {"parallel__tensor": 2, "parallel__sequence_parallel": True, "dpo__cache_dir": given}}
    cases = [tiny.to_json(stage(runs, tmp_path / name, **changes)) for name, changes in layouts.items()]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    ranks = tiny.launch(Path(__file__).with_name("dpo_ranks.py"), 2, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], [output.splitlines()[-15:] for _, output in ranks]
    assert {path.name: path.stat().st_mtime_ns for path in given.iterdir()} == stamps, "a file was written again"
    for name in layouts:
        for one, other in zip(learned(tmp_path / name), learned(finished), strict=True):
            assert one.keys() == other.keys()
            for metric, value in other.items():
                if other["step"] == 1 and metric.endswith(("accuracy", "accuracies")):
                    continue  # where the model is its reference, rounding decides which answer it prefers
                assert one[metric] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, metric)
        for own, expected in zip(files(tmp_path / name), files(finished), strict=False):
            assert own.name == expected.name, "the layout is no part of the key"


def test_adapters_have_their_base_as_reference(runs, finished, tmp_path):
    dpo.run(stage(runs, tmp_path / "run", lora__rank=4, train__max_steps=3, train__lr=1e-2))
    first, *_, last = rows(tmp_path / "run")
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["train/loss"] < first["train/loss"] - 1e-3
    assert [path.name for path in files(tmp_path / "run")] == [path.name for path in files(finished)]


def test_a_file_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dpo\.cache_dir.*cannot be kept"):
        dpo.run(stage(runs, tmp_path / "run", dpo__cache_dir=tmp_path / "file" / "below"))


def test_a_kill_while_writing_leaves_nothing(tmp_path, monkeypatch):
    key, path = {"weights": "w"}, tmp_path / "a.safetensors"
    log_probs = torch.randn(5, 2, dtype=torch.float64)
    monkeypatch.setattr(reference.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        reference.write(path, key, log_probs)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    reference.write(path, key, log_probs)
    assert torch.equal(reference.read(path, key, 5), log_probs)  # type: ignore[arg-type]
    assert reference.read(path, {"weights": "v"}, 5) is None
    assert reference.read(path, key, 6) is None
    assert reference.read(tmp_path / "none", key, 5) is None


@pytest.mark.parametrize(("changes", "words"), [
    ({"init_from": "none", "model__num_layers": 1, "examples__tokenizer": True, "dpo__reference": "other"}, "random"),
    ({"dpo__reference": "nothing"}, "no such folder"),
    ({"model__rotary_base": 500.0, "dpo__reference": "other"}, r"model\.rotary_base 10000.0, the model to train 500.0"),
])
def test_references_that_cannot_be(runs, corpus, tmp_path, changes, words):
    changes = {name: str(runs / value) if value in ("other", "nothing") else
               corpus / "tokenizer" if value is True else value for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        dpo.run(stage(runs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_reference_with_another_tokenizer(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    pretrain.run(tiny.config(tiny.write_corpus(folder, 310), folder / "run", model__seq_length=64, train__max_steps=1))
    with pytest.raises(UserError, match=r"dpo\.reference .* has another tokenizer"):
        dpo.run(stage(runs, folder / "dpo", dpo__reference=str(folder / "run")))


def test_bad_pairs_are_counted_and_past_the_threshold_refused(runs, tmp_path):
    good = (runs / "pairs.jsonl").read_text()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good + '{"prompt": "the hand", "chosen": "same", "rejected": "same"}\n'
                   '{"prompt": "the", "chosen": "a"}\n')
    changes = {"examples__train": [{"path": str(bad)}], "train__max_steps": 1}
    with pytest.raises(UserError, match=r"2 of 42 rows are unusable .*bad\.jsonl.*41"):
        dpo.run(stage(runs, tmp_path / "refused", **changes))
    assert dpo.run(stage(runs, tmp_path / "run", examples__max_bad_fraction=0.1, **changes)).step == 1


def test_checkpoints_go_on_to_the_next_stage(finished):
    assert layout.find(finished).name == "iter_0000004"
    assert not torch.equal(weights(finished)["decoder.final_layernorm.weight"],
                           weights(layout.root(finished) / "iter_0000002")["decoder.final_layernorm.weight"])
