"""The driver of supervised fine-tuning: from a pretrained run to a better one, resumed bit for bit; its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sft_runs
import tiny
import torch

from engine import evaluate, pretrain, report, sft
from engine.checkpoint import layout, restore
from engine.config import Config
from engine.errors import UserError

SEQ = 160


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory):
    """A folder with a finished pretraining run and a file of instructions in it."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.forget_layout()
    pretrain.run(tiny.config(corpus, folder / "pretrain", train__max_steps=3, model__seq_length=SEQ))
    sft_runs.write_jsonl(folder / "a.jsonl", 60)
    (folder / "data").symlink_to(corpus)
    return folder


def tuned(parent: Path, name: str, **changes) -> Config:
    base = {
        "stage": "sft", "output_dir": parent / name, "device": "cpu", "init_from": str(parent / "pretrain"),
        "data": {"num_workers": 0},
        "examples": {"train": [{"path": str(parent / "a.jsonl")}], "template": "alpaca", "validation_fraction": 0.2,
                     "cache_dir": parent / "cache"},
        "train": {"max_steps": 6, "global_batch_size": 4, "lr": 5e-3, "precision": "fp32", "schedule": "constant"},
        "checkpoint": {"save_steps": 0}, "evaluation": {"eval_steps": 0},
        "logging": {"logging_steps": 1, "tensorboard": False, "progress": "off"},
    }
    tiny.forget_layout()
    return Config(**base).with_values({name.replace("__", "."): value for name, value in changes.items()})


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    tiny.forget_layout()
    with restore.model(run) as restored:
        return {name: p.detach().clone() for name, p in restored.chunks[0].named_parameters()}


def test_answers_are_learned_and_the_best_weights_kept(parent, capsys):
    cfg = tuned(parent, "learned", train__max_steps=60, train__lr=1e-2, checkpoint__save_steps=20,
                evaluation__eval_steps=20, checkpoint__load_best_at_end=True)
    assert sft.run(cfg).step == 60
    rows = metrics(parent / "learned")
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    evaluated = [row for row in rows if "val/loss" in row]
    for row in evaluated:
        assert 0 <= row["val/sequence_accuracy"] <= row["val/accuracy"] <= 1
        assert row["val/perplexity"] == pytest.approx(2.718281828 ** row["val/loss"], rel=1e-6)
    assert evaluated[-1]["val/accuracy"] > 0.3
    best = min(evaluated, key=lambda row: row["val/loss"])
    assert layout.find(parent / "learned").name == f"iter_{best['step']:07d}"
    output = capsys.readouterr().err
    assert "mask audit of" in output
    assert "### Response:\n⟦" in output, "samples are not shown"
    assert "<|endoftext|>⟧" in output
    assert "more held out" in output
    assert "epochs" in output


def test_a_run_resumed_in_mid_epoch_is_bit_for_bit_the_uninterrupted_one(parent):
    """Four rows a step of an epoch of about 25, so the second half begins within it and ends in the second."""
    sft.run(tuned(parent, "whole", train__max_steps=12))
    sft.run(tuned(parent, "halves", train__max_steps=5))
    sft.run(tuned(parent, "halves", train__max_steps=12))
    whole, halves = metrics(parent / "whole"), metrics(parent / "halves")
    for name in ("train/loss", "train/accuracy", "train/sequence_accuracy", "train/grad_norm", "train/consumed_tokens"):
        assert [row[name] for row in whole] == [row[name] for row in halves], name
    one, other = weights(parent / "whole"), weights(parent / "halves")
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = weights(parent / "pretrain")
    assert not torch.equal(start["decoder.final_layernorm.weight"], one["decoder.final_layernorm.weight"])


def test_rows_of_another_length_are_no_place_to_go_on_from(parent):
    """What was read is known as positions: rows twice as long would go on at another place in the data."""
    sft.run(tuned(parent, "longer_rows", train__max_steps=1))
    with pytest.raises(UserError, match=rf"rows of {SEQ} positions \(here model.seq_length {2 * SEQ}\)"):
        sft.run(tuned(parent, "longer_rows", train__max_steps=2, model__seq_length=2 * SEQ))


@pytest.mark.parametrize("change", [{"data__shuffle_seed": 5}, {"examples__packing": False},
                                    {"examples__supervise": "all"}, {"seed": 7}])
def test_other_rows_are_no_place_to_go_on_from(parent, change):
    name = f"other_rows_{next(iter(change))}"
    sft.run(tuned(parent, name, train__max_steps=1))
    with pytest.raises(UserError, match=r"was trained on other rows: .*--init_from"):
        sft.run(tuned(parent, name, train__max_steps=2, **change))


def test_what_reads_prepared_tokens_says_so(parent, capsys):
    sft.run(tuned(parent, "no_tokens", train__max_steps=1, examples__validation_fraction=0.0))
    assert "no examples are held out (examples.validation, examples.validation_fraction)" in capsys.readouterr().err
    tiny.forget_layout()
    with pytest.raises(UserError, match=r"stage sft.*--data"):
        evaluate.main(["--checkpoint", str(parent / "no_tokens")])
    tiny.forget_layout()
    with pytest.raises(UserError, match=r"stage sft.*prepared tokens"):
        report.main(["--run", str(parent / "no_tokens")])
    tiny.forget_layout()
    assert evaluate.main(["--checkpoint", str(parent / "no_tokens"), "--data", str(parent / "data")]) == 0


def test_epochs_count_steps(parent):
    cfg = tuned(parent, "epochs", examples__epochs=1.5, examples__packing=False, train__max_steps=999)
    state = sft.run(cfg)
    from engine.data.examples import build

    tokenizer = parent / "pretrain/checkpoints/iter_0000003/tokenizer"
    loader = build.build(cfg.with_values({"model.seq_length": SEQ}), tokenizer, "train", dp_rank=0, dp_size=1)
    assert loader.rows_per_epoch == loader.num_examples
    assert state.step == -(-3 * loader.num_examples // 8)  # 1.5 epochs of rows, 4 a step


def test_sources_are_mixed_by_weight(parent, capsys):
    sft_runs.write_jsonl(parent / "b.jsonl", 12)
    cfg = tuned(parent, "mixed", train__max_steps=5)
    sources = [{"path": str(parent / "a.jsonl"), "weight": 3}, {"path": str(parent / "b.jsonl"), "weight": 1}]
    sft.run(cfg.with_values({"examples.train": sources}))
    output = capsys.readouterr().err
    assert f"{parent / 'a.jsonl'}: 15 rows" in output
    assert f"{parent / 'b.jsonl'}: 5 rows" in output


def test_a_template_that_leaves_the_end_token_out_fails_the_audit(parent):
    (parent / "open.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A: {% else %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}")
    cfg = tuned(parent, "audited", examples__template=str(parent / "open.jinja"))
    with pytest.raises(UserError, match=r"mask audit.*do not learn the end token"):
        sft.run(cfg)
    assert not (parent / "audited/checkpoints").exists()


def run_command(parent: Path, *words: str) -> subprocess.CompletedProcess:
    """As a user starts it: by path, with a configuration file."""
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, str(root / "engine/sft.py"), *words], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=parent)


def test_too_many_bad_rows_are_one_line_and_exit_code_2(parent):
    text = (parent / "a.jsonl").read_text() + '{"instruction": "the hand"}\n' * 3
    (parent / "bad.jsonl").write_text(text)
    done = run_command(parent, "--init_from", str(parent / "pretrain"), "--output_dir", str(parent / "bad"), "--device",
                       "cpu", "examples.template=alpaca", f"examples.train=[{{path: {parent / 'bad.jsonl'}}}]")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "bad.jsonl: 3 of 63 rows are unusable (missing_response 3), allowed 1.00%" in done.stderr
    assert f"; the first is {parent}/bad.jsonl:61: " in done.stderr
    assert "Traceback" not in done.stderr
