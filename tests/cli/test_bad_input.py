"""What users get wrong: one line that names the place and the way out, exit code 2, nothing half-written.

Most commands run in this process through the console script's own entry; those whose process matters (torchrun, an
exit under a process group, a closed pipe) are real ones.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine.pretrain
from engine import cli
from engine.config import STAGES, Config, dump_yaml, fields, load_yaml
from engine.config.answer import AnswerConfig
from engine.config.code_tasks import CodeTasksConfig
from engine.config.export import ExportConfig, ImportConfig
from engine.config.inference import EvaluateConfig, GenerateConfig, ReportConfig
from engine.config.pipeline import PipelineConfig
from engine.config.prepare import PrepareConfig
from engine.config.prepared_data import ExportDataConfig, MergeDataConfig
from engine.config.tokenizer import TrainTokenizerConfig
from engine.config.verify import VerifyConfig
from engine.runtime import command

PRETRAIN = Path(engine.pretrain.__file__)


@dataclass
class Place:
    """A folder of the test's own: ``data`` (prepared), ``run`` (trained on it for two steps) and its ``config``."""

    tmp: Path

    @property
    def data(self) -> Path:
        return self.tmp / "data"

    @property
    def run(self) -> Path:
        return self.tmp / "run"

    @property
    def config(self) -> Path:
        return self.tmp / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints/iter_0000002"

    def file(self, name: str, content: str | bytes = "text") -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def folder(self, name: str) -> Path:
        (self.tmp / name).mkdir()
        return self.tmp / name

    def train(self, *words: object) -> list[object]:
        return ["pretrain", "--config", self.config, "--train.max_steps", 4, *words]

    def listing(self) -> dict[str, str]:
        """Every file and its content, but for the sample index, which is a cache keyed by content."""
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
                for path in sorted(self.tmp.rglob("*")) if "index_cache" not in path.parts}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    run = tmp_path_factory.mktemp("trained") / "run"
    engine.pretrain.run(tiny.config(corpus, run, train__max_steps=2))
    return run


@pytest.fixture
def place(corpus: Path, trained: Path, tmp_path: Path) -> Place:
    import tiny

    made = Place(tmp_path)
    shutil.copytree(corpus, made.data)
    shutil.copytree(trained, made.run)
    made.file("config.yaml", dump_yaml(tiny.config(made.data, made.run, train__max_steps=2)))
    return made


def call(*argv: object, main: Callable[[list[str]], int] = cli.run) -> int:
    try:
        return command(main, [str(word) for word in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def truncated(place: Place) -> list[object]:
    os.truncate(place.data / "train.bin", 1000)
    return place.train("--output_dir", place.tmp / "new")


def edited_tokenizer(place: Place) -> list[object]:
    """The tokenizer beside the tokens is a valid one, but not the one that made them."""
    path = place.data / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content), encoding="utf-8")
    return place.train("--output_dir", place.tmp / "new")


def foreign_data(place: Place) -> list[object]:
    """Data prepared with another tokenizer: in order in itself, but not the checkpoint's."""
    from engine.data.prepare import prepare

    text = place.file("raw/a.txt", " ".join(f"Other words make other merges of {i} bytes." for i in range(40)))
    more = " ".join(f"And a second document to hold out, of word {i} too." for i in range(40))
    text.with_name("b.txt").write_text(more, encoding="utf-8")
    prepare(PrepareConfig(input=[text.parent], output=place.tmp / "other", vocab_size=300, validation_fraction=0.5))
    return [place.tmp / "other"]


def damaged_checkpoint(place: Place) -> list[object]:
    path = place.checkpoint / "sharded/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return ["generate", "--checkpoint", place.run, "--prompt", "the"]


# name: (the command line, what the line must name, the way out it must name)
CASES: dict[str, tuple[Callable[[Place], list[object]], str, str]] = {
    "prepare: missing folder": (
        lambda p: ["prepare", "--input", p.tmp / "nope", "--output", p.tmp / "o"], "/nope: no such file", "--input"),
    "prepare: empty folder": (
        lambda p: ["prepare", "--input", p.folder("empty"), "--output", p.tmp / "o"],
        "/empty: the folder holds no files", "Read are .txt"),
    "prepare: not text": (
        lambda p: ["prepare", "--input", p.file("bin/a.txt", bytes(range(256))).parent, "--output", p.tmp / "o"],
        "/bin/a.txt (not UTF-8", "UTF-8"),
    "prepare: not JSON": (
        lambda p: ["prepare", "--input", p.file("j/a.jsonl", '{"text": "a"}\n[oops\n'), "--output", p.tmp / "o"],
        "/j/a.jsonl:2", "--max_bad_fraction"),
    "prepare: cut short": (
        lambda p: ["prepare", "--input", p.file("g/a.txt.gz", gzip.compress(b"text")[:-2]), "--output", p.tmp / "o"],
        "/g/a.txt.gz: the .gz data end too early", "Fetch or pack it again"),
    "prepare: no such collector": (
        lambda p: ["prepare", "--input", "python:no_such_module:Pages", "--output", p.tmp / "o"],
        "python:no_such_module:Pages: no module", "python:MODULE:CLASS"),
    "prepare: output is a file": (
        lambda p: ["prepare", "--input", p.file("in/a.txt"), "--output", p.file("o")], "/o: is a file", "--output"),
    "prepare: output inside a file": (
        lambda p: ["prepare", "--input", p.file("in/a.txt"), "--output", p.file("f") / "o"],
        "Not a directory", "choose another --output"),
    "merge-data: another tokenizer": (
        lambda p: ["merge-data", "--input", p.data, "--input", *foreign_data(p), "--output", p.tmp / "o"],
        "/other: is of another tokenizer than", "--tokenizer"),
    "export-data: not prepared": (
        lambda p: ["export-data", "--data", p.folder("raw"), "--output", p.tmp / "o"],
        "/raw: not a prepared directory", "Prepare it again"),
    "unknown command": (lambda p: ["pertrain"], "'pertrain'", "Did you mean pretrain?"),
    "unknown flag": (lambda p: p.train("--train.warm_up_steps", 3), "--train.warm_up_steps", "train.warmup_steps"),
    "unknown key in YAML": (
        lambda p: ["pretrain", "--config", p.file("bad.yaml", "seed: 1\ntrain:\n  max_step: 3\n")],
        "/bad.yaml:3: train.max_step", "Did you mean train.max_steps?"),
    "missing config file": (lambda p: ["pretrain", "--config", p.tmp / "no.yaml"], "/no.yaml", "Check its name"),
    "config file is not text": (
        lambda p: ["pretrain", "--config", p.file("c.yaml", b"\xff\xfe\x00")], "/c.yaml", "UTF-8"),
    "impossible layout": (
        lambda p: p.train("--parallel.tensor", 3), "--parallel.tensor: 3",
        "The nearest layout that works: parallel.te"),
    "world size": (lambda p: p.train("--parallel.tensor", 2), "1 rank does not fit tensor 2", "Start 2 ranks"),
    "no data": (lambda p: ["pretrain", "--output_dir", p.tmp / "new"], "data.path", "mainspring prepare"),
    "missing data": (
        lambda p: p.train("--data.path", p.tmp / "nope"), "/nope: no such folder", "mainspring prepare"),
    "data is not prepared": (
        lambda p: p.train("--data.path", p.file("raw/a.txt").parent), "/raw: is not a prepared", "mainspring prepare"),
    "truncated .bin": (truncated, "/data/train.bin: truncated: 1000 bytes", "Prepare the data again"),
    "tokenizer was changed": (edited_tokenizer, "/data/tokenizer: is not the tokenizer", "prepare the data again"),
    "smaller vocabulary than the tokenizer's": (
        lambda p: p.train("--model.vocab_size", 200), "model.vocab_size: 200 is fewer than the 300", "Set it to 300"),
    "checkpoint of another model": (
        lambda p: p.train("--model.hidden_size", 64, "--model.ffn_hidden_size", 128),
        "iter_0000002: is a checkpoint of another model: model.hidden_size 32 (here 64)", "--output_dir"),
    "checkpoint of another tokenizer": (
        lambda p: p.train("--data.path", *foreign_data(p)), "iter_0000002: is a checkpoint of another vocabulary",
        "iter_0000002/tokenizer"),
    "resume from nowhere": (
        lambda p: p.train("--resume_from_checkpoint", p.tmp / "no"), "/no: no such folder", "output_dir"),
    "fresh start among checkpoints": (
        lambda p: p.train("--resume_from_checkpoint", "none"), "/run/checkpoints", "--output_dir, or resume"),
    "unwritable output_dir": (
        lambda p: p.train("--output_dir", p.file("f") / "run"), "/f/run: Not a directory", "--output_dir"),
    "evaluate: missing checkpoint": (
        lambda p: ["evaluate", "--checkpoint", p.tmp / "no"], "/no: no such folder", "iter_NNNNNNN"),
    "evaluate: empty folder": (
        lambda p: ["evaluate", "--checkpoint", p.folder("e")], "/e: no checkpoint", "iter_NNNNNNN"),
    "evaluate: another tokenizer's data": (
        lambda p: ["evaluate", "--checkpoint", p.run, "--data", *foreign_data(p)],
        "/other: was tokenized by another", "iter_0000002/tokenizer"),
    "evaluate: longer than the context": (
        lambda p: ["evaluate", "--checkpoint", p.run, "--seq_length", 999], "seq_length: 999", "Use at most 16"),
    "evaluate: unwritable result": (
        lambda p: ["evaluate", "--checkpoint", p.run, "--max_sequences", 1, "--output", p.file("f") / "x.json"],
        "/f/x.json: Not a directory", "--output"),
    "generate: damaged checkpoint": (damaged_checkpoint, "__0_0.distcp: does not match its SHA-256", "another check"),
    "generate: empty prompt": (
        lambda p: ["generate", "--checkpoint", p.run, "--prompt="], "prompt: the prompt is empty", "one character"),
    "generate: prompt is not text": (
        lambda p: ["generate", "--checkpoint", p.run, "--prompt", "a\udcff"], "prompt: is not UTF-8", "Convert it"),
    "report: not a run": (
        lambda p: ["report", "--run", p.checkpoint], "iter_0000002: is not the folder of a run", "output_dir"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_half_written(name, place, capsys):
    arguments, where, way_out = CASES[name]
    argv = arguments(place)
    before = place.listing()
    capsys.readouterr()
    assert call(*argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    assert where in said.err
    assert way_out in said.err.replace(where, "", 1)
    assert place.listing() == before
    if "unwritable result" not in name:  # there the result is at least shown
        assert said.out == ""


def test_debug_shows_the_traceback_and_the_line(capsys):
    assert call("pertrain", "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert "engine/cli.py" in said
    assert said.splitlines()[-1].startswith("error: mainspring: there is no command 'pertrain'")


def test_a_bug_keeps_its_traceback():
    def buggy(argv: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command(buggy, [])


MODELS = dict.fromkeys(STAGES, Config) | {
    "prepare": PrepareConfig, "code-tasks": CodeTasksConfig, "train-tokenizer": TrainTokenizerConfig,
    "evaluate": EvaluateConfig, "generate": GenerateConfig,
    "merge-data": MergeDataConfig, "export-data": ExportDataConfig,
    "report": ReportConfig, "verify-layout": VerifyConfig, "answer": AnswerConfig, "pipeline": PipelineConfig,
    "import": ImportConfig, "export": ExportConfig}
REQUIRED = {stage: ["--init_from", "r"] for stage in STAGES} | {
            "import": ["--from", "d", "--output", "o"], "export": ["--checkpoint", "c", "--output", "o"],
            "prepare": ["--input", "a", "--input", "b", "--output", "o"],
            "train-tokenizer": ["--input", "a", "--output", "o"],
            "merge-data": ["--input", "a", "--input", "b", "--output", "o"],
            "export-data": ["--data", "a", "--output", "o"],
            "code-tasks": ["--input", "a", "--output", "o"], "pretrain": ["--seed=7", "data.path=d"],
            "evaluate": ["--checkpoint", "c"], "generate": ["--checkpoint", "c"], "report": ["--run", "r"],
            "verify-layout": ["--shrink", "--max_steps", "9"],
            "answer": ["--model", "m", "--prompt", "a", "--output", "o"],
            "pipeline": ["--config", "configs/pipeline.yaml"]}


def mains() -> list:
    return [pytest.param(cli.run, [name], name, id=name) for name in cli.COMMANDS] + [
        pytest.param(engine.pretrain.main, [], "pretrain", id="engine/pretrain.py")]


@pytest.mark.parametrize(("main", "words", "name"), mains())
def test_help_lists_every_field_with_default_and_unit(main, words, name, capsys):
    assert call(*words, "--help", main=main) == 0
    said = capsys.readouterr()
    assert said.err == ""
    entries = dict(re.findall(r"^  --([\w.]+) .*\n((?:      .*\n?)+)", said.out, re.MULTILINE))
    leaves = [leaf for leaf in fields.walk(MODELS[name]) if fields.submodel(leaf.info.annotation) is None]
    assert len(leaves) >= 4
    for leaf in leaves:
        entry = " ".join(entries[leaf.path].split())
        assert leaf.info.description in entry
        assert "default: " in entry or "required" in entry
        assert not leaf.unit or f"unit: {leaf.unit if leaf.unit != '1' else 'none'}" in entry
    assert name in ("report", "pipeline") or sum(bool(leaf.unit) for leaf in leaves) >= 3


@pytest.mark.parametrize(("main", "words", "name"), mains())
def test_print_config_round_trips(main, words, name, capsys, tmp_path):
    assert call(*words, *REQUIRED[name], "--print-config", main=main) == 0
    first = capsys.readouterr()
    assert first.err == ""
    (tmp_path / "again.yaml").write_text(first.out, encoding="utf-8")
    assert call(*words, "--config", tmp_path / "again.yaml", "--print-config", main=main) == 0
    assert capsys.readouterr().out == first.out
    assert set(load_yaml(tmp_path / "again.yaml")) == set(MODELS[name].model_fields)


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["--version"]])
def test_the_command_itself(words, capsys):
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert said == f"mainspring {engine.__version__}\n" if words == ["--version"] else all(
        name in said for name in cli.COMMANDS)


# Real processes from here on. A rank that says its line and hangs would run into the timeout of a minute.


def start(*argv: object, timeout: float = 60, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *map(str, argv)], env=environment, text=True, timeout=timeout, check=False,
                          **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options))


def test_the_console_and_a_reader_that_leaves(tmp_path):
    said = start("-m", "engine.cli", "prepare", "--input", tmp_path / "no", "--output", tmp_path / "o")
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == f"error: {tmp_path}/no: no such file or folder. Check --input.\n"
    assert not list(tmp_path.iterdir())
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        left = start("-m", "engine.cli", "pretrain", "--help", stdout=closed)
    assert (left.returncode, left.stderr) == (141, "")


def test_training_by_path(place):
    os.truncate(place.data / "train.bin", 1000)
    before = place.listing()
    said = start(PRETRAIN, "--config", place.config, "--output_dir", place.tmp / "new", "--debug")
    assert (said.returncode, said.stdout) == (2, "")
    assert "Traceback (most recent call last):\n" in said.stderr
    assert said.stderr.splitlines()[-1].startswith(f"error: {place.data}/train.bin: truncated: 1000 bytes")
    assert place.listing() == before


def torchrun(place: Place, *argv: object, script: Path = PRETRAIN) -> tuple[list[str], dict[int, int]]:
    """-> (the lines that are errors of ours, the exit code of each rank). Python of ours shows no traceback."""
    said = start("-m", "torch.distributed.run", "--nproc-per-node", 2, script, "--config", place.config,
                 "--train.max_steps", 4, *argv, timeout=100)
    assert said.returncode == 1, said.stderr  # torchrun's own, whatever its workers' codes were
    ranks = re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+) ", said.stderr)
    tracebacks = re.findall(r"Traceback \(most recent call last\):\n +File \"([^\"]+)\"", said.stderr)
    assert [Path(path).name for path in tracebacks] in (["run.py"], ["torchrun"], ["<frozen runpy>"]), said.stderr
    return [line for line in said.stderr.splitlines() if line.startswith("error: ")], {int(r): int(c) for r, c in ranks}


@pytest.mark.parametrize("mistake", ["world size", "truncated .bin"])
def test_all_ranks_fail_alike_and_one_speaks(mistake, place):
    if mistake == "world size":
        argv, words = ["--parallel.tensor", 4], "2 ranks do not fit tensor 4, which takes a multiple of 4. Start 4"
    else:
        os.truncate(place.data / "train.bin", 1000)
        argv, words = ["--output_dir", place.tmp / "new"], "train.bin: truncated: 1000 bytes"
    before = place.listing()
    lines, codes = torchrun(place, *argv)
    assert len(lines) == 1, lines
    assert words in lines[0]
    # 2, or ended by torchrun (-15) where the other rank was two seconds slower to start.
    assert 2 in codes.values()
    assert set(codes.values()) <= {2, -15}
    assert place.listing() == before


ALONE = 'raise engine.UserError("its disk is gone", where="/local/cache", fix="Leave this machine out")'
ELSEWHERE = 'return Path("/elsewhere/iter_0000009")'


@pytest.mark.parametrize(("method", "does", "expected"), [
    ("find_resume", ALONE, "error: rank 1: /local/cache: its disk is gone. Leave this machine out"),
    ("_find_resume", ELSEWHERE, "rank 1 finds /elsewhere/iter_0000009, rank 0 {checkpoint}. Put output_dir on a file"),
], ids=["rank 1 fails while rank 0 waits for it", "ranks see different folders"])
def test_one_rank_differs_and_the_other_does_not_hang(method, does, expected, place):
    script = place.file("uneven.py", f"""
import sys
from pathlib import Path
import engine
from engine.runtime import command
from engine.checkpoint import manager

class Uneven(manager.Checkpointer):
    def {method}(self):
        if self.groups.rank == 1:
            {does}
        return super().{method}()

manager.Checkpointer = Uneven
sys.exit(command(engine.pretrain.main, sys.argv[1:]))
""")
    before = place.listing()
    lines, codes = torchrun(place, script=script)
    assert len(lines) == 1, lines
    assert expected.format(checkpoint=place.checkpoint) in lines[0]
    assert codes[1] == 2
    assert place.listing() == before
