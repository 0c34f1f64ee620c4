"""Overrides, flags, --help and --print-config, for Config and for any other model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from engine.config import Config, fields, load_yaml, parse
from engine.errors import UserError


def read(*argv: str) -> Config:
    return parse(Config, argv, prog="mainspring pretrain")


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    return str(caught.value)


@pytest.mark.parametrize(
    "argv", [("--train.lr", "3e-3"), ("--train.lr=3e-3",), ("train.lr=3e-3",), ("--train.lr", "1", "--train.lr=0.003")]
)
def test_three_ways_to_override(argv):
    assert read(*argv).train.lr == 0.003


def test_common_flags():
    cfg = read(
        "--max_steps",
        "7",
        "--save-steps",
        "3",
        "--eval_steps=4",
        "--logging-steps=5",
        "--output-dir",
        "12",
        "--seed",
        "9",
        "--resume_from_checkpoint",
        "none",
        "--no-fp8",
        "--enable-oom-recovery",
        "--device=cpu",
    )
    assert (cfg.train.max_steps, cfg.checkpoint.save_steps, cfg.evaluation.eval_steps, cfg.logging.logging_steps) == (
        7,
        3,
        4,
        5,
    )
    assert (cfg.output_dir, cfg.resume_from_checkpoint, cfg.seed, cfg.device) == (Path("12"), "none", 9, "cpu")
    assert (cfg.train.fp8, cfg.train.enable_oom_recovery) == (False, True)


@pytest.mark.parametrize(("argv", "value"), [
    (["--enable_oom_recovery"], True), (["--enable-oom-recovery", "true"], True),
    (["--enable-oom-recovery=false"], False),
    (["--no-enable-oom-recovery"], False), (["--no_enable_oom_recovery"], False),
    (["--train.enable_oom_recovery"], True),
    (["--no-train.enable-oom-recovery"], False), (["--enable-oom-recovery", "--max_steps", "3"], True),
    (["--enable-oom-recovery", "train.max_steps=3"], True), (["train.enable_oom_recovery=true"], True),
    (["--enable-oom-recovery", "--no-enable-oom-recovery"], False)])  # fmt: skip
def test_true_and_false(argv, value):
    assert read(*argv).train.enable_oom_recovery is value


@pytest.mark.parametrize("word", ["null", "None", "none", "~"])
def test_null(word):
    assert read("--model.preset", "large", "--model.num_query_groups", word).model.num_query_groups == 12
    assert read(f"--data.path={word}").data.path is None
    assert read("--train.recompute", "none").train.recompute == "none"


def test_command_line_wins_over_files(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("train: {lr: 1e-3, max_steps: 10, eps: 1e-6}\ndata: {blend: [{path: x}]}\n")
    b.write_text("train: {max_steps: 20}\n")
    cfg = read("--max_steps", "30", "--config", str(a), f"--config={b}", "--data.blend", "[]")
    assert (cfg.train.lr, cfg.train.eps, cfg.train.max_steps, cfg.data.blend) == (1e-3, 1e-6, 30, [])


def test_lists_and_mappings():
    cfg = read(
        "--data.blend",
        "{path: a, weight: 2}",
        "--data.blend",
        "{path: b}",
        "--train.seq_length_schedule=[{step: 0, seq_length: 64}, {step: 1e1, seq_length: 128}]",
        "--train.batch_size_schedule",
        "{start: 4, every_steps: 10}",
        "--train.batch_size_schedule.start=8",
    )
    assert [(str(e.path), e.weight) for e in cfg.data.blend] == [("a", 2.0), ("b", 1.0)]
    assert [(s.step, s.seq_length) for s in cfg.train.seq_length_schedule] == [(0, 64), (10, 128)]
    assert cfg.train.batch_size_schedule is not None
    assert (cfg.train.batch_size_schedule.start, cfg.train.batch_size_schedule.every_steps) == (8, 10)
    assert (
        read("--train.batch_size_schedule.start=8", "--train.batch_size_schedule", "null").train.batch_size_schedule
        is None
    )


def test_a_section_that_was_null_can_be_filled(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {batch_size_schedule: null}\n")
    cfg = read(
        "--config", str(file), "--train.batch_size_schedule.start", "2", "--train.batch_size_schedule.every_steps", "3"
    )
    assert cfg.train.batch_size_at(3) == 4


@pytest.mark.parametrize(("argv", "message"), [
    (["--train.lrr", "3"], "--train.lrr: unknown option. Did you mean --train.lr?"),
    (["train.lrr=3"], "train.lrr: unknown option. Did you mean train.lr?"),
    (["--lr", "3"], "--lr: unknown option. Did you mean --train.lr?"),
    (["--max_step", "3"], "--max_step: unknown option. Did you mean --max_steps?"),
    (["--tensor_model_parallel_size=2"], "--tensor_model_parallel_size: unknown option. Did you mean "
     "--parallel.tensor?"),
    (["--qqq"], "--qqq: unknown option. `--help` lists every option"),
    (["--no-lr"], "--no-lr: unknown option. `--help` lists every option"),
    (["--no-fp8=true"], "--no-fp8: takes no value. Use --no-fp8, or --fp8=true"),
    (["--train.lr"], "--train.lr: needs a value: a number above 0 and at most 1,000"),
    (["--train.lr", "--fp8"], "--train.lr: needs a value: a number above 0 and at most 1,000"),
    (["--config"], "--config: needs a value: a file"),
    (["7b"], "unexpected word '7b'. Write --section.field value, or section.field=value"),
    (["-x"], "unexpected word '-x'. Write --section.field value, or section.field=value"),
    (["--max_steps", "-1"], "--max_steps: train.max_steps: got -1, expected a whole number from 1 to "
     "1,000,000,000,000"),
    (["--max_steps="], "--max_steps: train.max_steps: got null, expected a whole number from 1 to 1,000,000,000,000"),
    (["--train.lr=fast"], "--train.lr: got 'fast', expected a number above 0 and at most 1,000"),
    (["--train", "3"], None),
    (["--data.blend", "[{path"], "--data.blend: not a valid YAML value: '[{path'"),
    (["--data.blend", "{path: a, wieght: 1}"], "--data.blend: data.blend.0.wieght: unknown field. Did you mean "
     "data.blend.0.weight?"),
    (["--enable-oom-recovery", "--parallel.tensor=2"], "--enable-oom-recovery: train.enable_oom_recovery: only "
     "data-parallel ranks can "
     "agree on a retry, but parallel.tensor 2 is set. Set it to false (--no-enable-oom-recovery), or those sizes to 1"),
])  # fmt: skip
def test_bad_command_lines(argv, message):
    got = refusal(*argv)
    assert (
        got == message if message else got.startswith("--train: got 3, expected a mapping with the fields max_steps,")
    )


def test_an_error_names_where_the_value_came_from(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  lr: 1e-4\n  max_steps: 10\n")
    assert refusal("--config", str(file), "--train.min_lr", "1").startswith(
        "--train.min_lr: 1.0 is above train.lr (0.0001)"
    )
    file.write_text("train:\n  warmup_steps: 40\n")
    assert refusal("--config", str(file), "--max_steps", "10").startswith(
        f"{file}:2: train.warmup_steps: 40 warmup steps in a run of 10"
    )


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        read("--help", "--max_steps", "what")
    assert done.value.code == 0
    text = capsys.readouterr().out
    flags = {line.split()[0] for line in text.splitlines() if line.strip().startswith("--")}
    leaves = [
        leaf
        for leaf in fields.walk(Config)
        if fields.submodel(leaf.info.annotation) is None or fields.list_item(leaf.info.annotation)
    ]
    assert len(leaves) > 80
    assert {f"--{leaf.path}" for leaf in leaves} <= flags
    assert {"--config", "--max_steps", "--fp8", "--enable-oom-recovery", "--print-config"} <= flags
    flat = " ".join(text.split())
    assert "--model.num_layers INT transformer layers [default: 6; unit: layers]" in flat
    assert "--train.schedule linear|cosine|wsd|constant learning rate after warmup" in flat
    assert (
        "--parallel.timeout_minutes FLOAT how long a rank waits for the others before the run ends [default: 10; "
        "unit: minutes]"
        in flat
    )
    assert max(len(line) for line in text.splitlines()) <= 130


def test_print_config_reads_back(capsys, tmp_path):
    argv = ["--model.preset", "medium", "--train.lr", "1e-5", "--data.path", "x y"]
    with pytest.raises(SystemExit) as done:
        read(*argv, "--print-config", "--debug")
    assert done.value.code == 0
    file = tmp_path / "resolved.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_yaml(file)["model"]["hidden_size"] == 512
    assert parse(Config, ["--config", str(file)], prog="p") == read(*argv)


class Inner(BaseModel):
    size: int = Field(default=3, ge=1, description="a size", json_schema_extra={"unit": "MB"})


class Command(BaseModel):
    """A command of another room.

    With details.
    """

    input: list[Path] = Field(description="files to read")
    counts: list[int] = Field(default_factory=list, description="counts")
    kind: Literal["a", "b"] = Field(default="a", description="a kind")
    name: str | None = Field(default=None, description="a name")
    quiet: bool = Field(default=False, description="say nothing")
    inner: Inner = Field(default_factory=Inner, description="more")


def test_any_model():
    got = parse(
        Command,
        ["--input", "A", "--input=3", "--counts", "1", "--counts=[2, 3]", "--quiet", "--size", "9", "--name", "1e3"],
        prog="mainspring x",
        aliases={"--size": "inner.size"},
    )
    assert got == Command(input=[Path("A"), Path("3")], counts=[1, 2, 3], quiet=True, name="1e3", inner=Inner(size=9))
    assert parse(Command, ["--input", "[A, B]", "--name", "null"], prog="x").input == [Path("A"), Path("B")]


def test_any_model_repeated_flags_replace_the_files_list(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("input: [x, y]\n")
    assert parse(Command, ["--config", str(file)], prog="x").input == [Path("x"), Path("y")]
    assert parse(Command, ["--config", str(file), "--input", "A", "--input", "B"], prog="x").input == [
        Path("A"),
        Path("B"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "input: is required: a list, each item a path (text; quote it if it looks like a number)"),
        (["--input", "a", "--counts", "x"], "--counts: counts.0: got 'x', expected a whole number"),
        (["--input", "a", "--inner.size", "0"], "--inner.size: got 0, expected a whole number at least 1"),
        (["--input", "a", "--inner.sizes", "2"], "--inner.sizes: unknown option. Did you mean --inner.size?"),
    ],
)
def test_any_model_refusals(argv, message):
    with pytest.raises(UserError) as caught:
        parse(Command, argv, prog="x")
    assert str(caught.value) == message


def test_any_model_help(capsys):
    with pytest.raises(SystemExit):
        parse(Command, ["-h"], prog="mainspring x")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: mainspring x ")
    assert "A command of another room. Values" in text
    assert "--input LIST of PATH files to read [required]" in text
    assert "--inner.size INT a size [default: 3; unit: MB]" in text
