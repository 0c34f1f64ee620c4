"""YAML files: reading with line numbers, writing that reads back the same, and the files in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import STAGES, Config, dump_yaml, load_yaml, parse
from engine.config.pipeline import PipelineConfig
from engine.errors import UserError

ROOT = Path(__file__).parents[2]
# Those of configs/data are of `prepare`, or parts: tests/data/test_recipes.py.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "data")


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def write(tmp_path, text) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        parse(Config, ["--config", str(path)], prog="mainspring pretrain")
    return str(caught.value)


def test_there_is_a_file_for_every_preset():
    presets = {load_yaml(path).get("model", {}).get("preset") for path in CONFIGS}
    assert presets >= {"small", "medium", "large", "xl", "1b", "3b", "7b", "8b", "20b_moe", "70b", "mixtral_8x7b",
                       "qwen3_30b_a3b"}


def is_pipeline(path: Path) -> bool:
    return path.parent.name == "configs" or (path.parent.name == "pipeline" and path.stem not in STAGES)


@pytest.mark.parametrize("path", [path for path in CONFIGS if not is_pipeline(path)], ids=named)
def test_every_file_in_configs(path):
    data = load_yaml(path)
    cfg = Config.model_validate(data)
    assert cfg.stage == (path.stem if path.parent.name == "pipeline" else path.parent.name)
    gpus = path.stem.rpartition("_")[2]
    ranks = int(gpus.removesuffix("gpu")) if gpus.endswith("gpu") else 1
    if cfg.awaits_model():  # its shape comes with the weights: that of the file's name
        presets = {"7b": "7b", "20b": "20b_moe", "demo": "small"}
        whole = cfg.with_values({"model.preset": presets.get(path.stem.partition("_")[0], "small")})
        assert whole.data_parallel_size(ranks) >= 1
    else:
        assert cfg.data_parallel_size(ranks) >= 1
    assert parse(Config, ["--config", str(path)], prog="p") == cfg


def test_there_is_a_file_for_every_stage_at_7b():
    assert {path.parent.name for path in CONFIGS if path.stem == "7b_8gpu"} == {*STAGES, "pipeline"}


@pytest.mark.parametrize("path", [path for path in CONFIGS if is_pipeline(path)], ids=named)
def test_every_pipeline_in_configs(path):
    cfg = PipelineConfig.model_validate(load_yaml(path))
    trained = [step.command for stage in cfg.stages for step in stage.steps if step.command in STAGES]
    assert trained == ["pretrain", "midtrain", "sft", "dpo", "lora"]
    for stage in cfg.stages:
        for step in stage.steps:
            assert step.config is None or (ROOT / step.config).is_file(), step.config
            assert stage.gates or step.command not in STAGES, f"{stage.name} has no gate"


def test_the_demo_trains_on_two_processes_too():
    cfg = Config(**load_yaml(ROOT / "configs/pretrain/demo_cpu.yaml"))
    assert cfg.data_parallel_size(2) == 2


def test_scalars(tmp_path):
    path = write(
        tmp_path,
        "\n".join(
            [
                "a: 3e-4",
                "b: 1e6",
                "c: 3.",
                "d: .5",
                "e: 1_000",
                "f: -7",
                "g: 010",
                "h: true",
                "i: off",
                "j: 'true'",
                "k: ~",
                "l:",
                "m: 1:30",
                "n: 2024-01-01",
                "o: 0x10",
                "p: -.inf",
                'q: "3"',
                "r: [1, x, null]",
                "s: +1.5E+3",
                "t: e5",
                "u: yes",
            ]
        ),
    )
    assert load_yaml(path) == {
        "a": 0.0003,
        "b": 1e6,
        "c": 3.0,
        "d": 0.5,
        "e": 1000,
        "f": -7,
        "g": 10,
        "h": True,
        "i": "off",
        "j": "true",
        "k": None,
        "l": None,
        "m": "1:30",
        "n": "2024-01-01",
        "o": "0x10",
        "p": float("-inf"),
        "q": "3",
        "r": [1, "x", None],
        "s": 1500.0,
        "t": "e5",
        "u": "yes",
    }


def test_values_of_a_file(tmp_path):
    path = write(
        tmp_path,
        "train: {lr: 3e-4, max_steps: 1e3}\nlogging: {wandb: off, progress: on}\nmodel: {num_query_groups: null}",
    )
    cfg = Config(**load_yaml(path))
    assert (cfg.train.lr, cfg.train.max_steps, cfg.logging.wandb, cfg.logging.progress) == (3e-4, 1000, "off", "on")


@pytest.mark.parametrize(("text", "message"), [
    ("train:\n  lr: 1\n  max_steps: 3\n  lr: 2\n", "{path}:4: train.lr is set twice, first on line 2. Keep one"),
    ("seed: 1\nseed: 1\n", "{path}:2: seed is set twice, first on line 1. Keep one"),
    ("- a\n- b\n", "{path}:1: expected a mapping of fields. Write `train:` and under it ` lr: 3e-4`"),
    ("# only this\n\nhello\n", "{path}:3: expected a mapping of fields. Write `train:` and under it ` lr: 3e-4`"),
    ("", "{path}: the file is empty; expected a mapping of fields"),
    ("train:\n  lr: [1\nseed: 2\n", None),
    ("a: 1\n---\nb: 2\n", None),
    ("seed: 1\ntrain:\n  lrr: 3\n", "{path}:3: train.lrr: unknown field. Did you mean train.lr?"),
    ("seed: 1\ntrain:\n\n  lr: quick\n", "{path}:4: train.lr: got 'quick', expected a number above 0 and at most "
     "1,000"),
    ("parallel:\n  tensor: 4\n",
     "{path}:2: parallel.tensor: 4 does not divide model.num_attention_heads (6). The nearest layout that works: "
     "parallel.tensor 2"),
    ("data:\n  blend:\n    - path: a\n    - {path: b, weight: -1}\n", "{path}:4: data.blend.1.weight: got -1, "
     "expected a number at least 0, or null"),
    ("train:\n  batch_size_schedule:\n    start: 4\n", "{path}:2: train.batch_size_schedule.every_steps: is required: "
     "a whole number from 1 to 1,000,000,000,000"),
    ("logging:\n", "{path}:1: logging: got null, expected a mapping with the fields logging_steps, tensorboard, wandb, "
     "wandb_project, progress"),
    ("[a, b]: 1\n", "{path}:1: a field's name must be a word"),
    ("seed: !!python/object/apply:os.system ['touch canary']\n",
     "{path}:1: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed. Write the value without a tag"),
    ("seed: !!int 3\n", "{path}:1: the tag tag:yaml.org,2002:int is not allowed. Write the value without a tag"),
    ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*c]\n", "{path}: nested too deeply"),
    (b"seed: \xff\xfe\n", "{path}: the file is not UTF-8 text"),
    ("seed: 1\x00\n", None),
    ("x: " + "[" * 3000, "{path}: nested too deeply"),
])  # fmt: skip
def test_bad_files(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    got = refusal(path)
    assert "\n" not in got
    if message is None:
        assert got.startswith(f"{path}") and "not valid YAML" in got  # noqa: PT018
    else:
        assert got == message.format(path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_an_expanding_file_is_stopped(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 100,000 values" in refusal(write(tmp_path, "\n".join(lines)))


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "none.yaml"
    assert refusal(missing) == f"{missing}: cannot read the file: No such file or directory. Check its name"
    assert refusal(tmp_path) == f"{tmp_path}: cannot read the file: Is a directory. Check its name"
    with pytest.raises(UserError, match="not the name of a file"):
        load_yaml("a\0b")


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"preset": "7b"}, "train": {"lr": 1e-8, "eps": 1e-12, "max_steps": 10**9}},
        {"output_dir": "off", "resume_from_checkpoint": "3e-4", "logging": {"wandb_project": "null"}},
        {
            "output_dir": "a: b #c",
            "resume_from_checkpoint": "1_000",
            "logging": {"wandb_project": "é\t'\"\n x " + "long " * 100},
        },
        {"data": {"blend": [{"path": "1:30", "weight": 0.1}, {"path": "~", "weight": 1 / 3}]}},
        {
            "train": {
                "batch_size_schedule": {"kind": "ramp", "start": 2, "increment": 2, "every_steps": 10},
                "seq_length_schedule": [{"step": 0, "seq_length": 512}, {"step": 9, "seq_length": 1024}],
            }
        },
    ],
)
def test_writing_and_reading_gives_the_same(tmp_path, sections):
    cfg = Config(**sections)
    path = write(tmp_path, dump_yaml(cfg))
    assert Config(**load_yaml(path)) == cfg
    assert dump_yaml(Config(**load_yaml(path))) == path.read_text()
