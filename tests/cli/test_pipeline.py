"""`mainspring pipeline`: order, gates, what is kept and what runs again, failures, interruptions, manifest, report."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
import yaml

from engine import cli
from engine.config import dump_yaml
from engine.errors import UserError

STUB = Path(__file__).with_name("pipeline_stub.py")


class Chain:
    """A pipeline of stub stages a, b, c in a folder of its own; ``options`` are what each stage's stub is told."""

    def __init__(self, tmp: Path, names: str = "abc"):
        self.tmp, self.runs, self.out = tmp, tmp / "runs.txt", tmp / "out"
        self.options: dict[str, list[str]] = {name: [] for name in names}
        self.gates: dict[str, list[dict]] = {name: [] for name in names}
        self.fields: dict[str, dict] = {name: {} for name in names}
        self.top: dict = {}

    def file(self) -> Path:
        stages, before = [], []
        for name, options in self.options.items():
            script = [str(STUB), "${here}", str(self.runs), *options, *before]
            stages.append({"name": name, "gates": self.gates[name], "steps": [{"script": script} | self.fields[name]]})
            before = [f"init=${{{name}}}"]
        path = self.tmp / "pipeline.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(self.out), "stages": stages} | self.top))
        return path

    def run(self, *words: object) -> list[str]:
        """-> the steps that were run by this call."""
        self.runs.write_text("")
        cli.run(["pipeline", "--config", str(self.file()), *map(str, words)])
        return self.ran()

    def fails(self, *words: object) -> tuple[str, list[str]]:
        with pytest.raises(UserError) as caught:
            self.run(*words)
        return str(caught.value), self.ran()

    def ran(self) -> list[str]:
        return [line.split()[0] for line in self.runs.read_text().splitlines()]

    def promotions(self) -> dict:
        return json.loads((self.out / "promotions.json").read_text())

    def statuses(self) -> dict[str, str]:
        return {name: entry["status"] for name, entry in self.promotions()["stages"].items()}


@pytest.fixture
def chain(tmp_path):
    return Chain(tmp_path)


def test_stages_in_order_and_a_second_run_runs_nothing(chain):
    chain.gates["b"] = [{"metric": "val/loss", "at_most": 2.1}]
    assert chain.run() == ["a", "b", "c"]
    first = chain.promotions()
    stages = first["stages"]
    assert list(stages) == ["a", "b", "c"]
    assert set(chain.statuses().values()) == {"promoted"}
    for name, entry in stages.items():
        manifest = chain.out / name / "checkpoints/iter_0000010/manifest.json"
        result = entry["steps"][name]["result"]
        assert result == {"kind": "checkpoint", "path": "checkpoints/iter_0000010", "step": 10,
                          "sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    assert stages["b"]["steps"]["b"]["inputs"] == {"a": stages["a"]["steps"]["a"]["result"]["sha256"]}
    assert [stages[name]["previous"] for name in "abc"] == [None, stages["a"]["sha256"], stages["b"]["sha256"]]
    assert stages["b"]["gates"][0]["value"] == 2.1
    assert "a is done" in (chain.out / "logs/a.log").read_text()
    assert chain.run() == []
    assert chain.promotions() == first


def test_what_changed_runs_again_and_so_does_what_is_made_of_it(chain):
    chain.run()
    old = chain.promotions()["stages"]["b"]["sha256"]
    chain.options["b"] = ["content=other"]
    assert chain.run() == ["b", "c"]
    assert (chain.out / "set_aside/b.1/checkpoints/iter_0000010/weights").read_bytes() == b"b"
    assert chain.promotions()["stages"]["b"]["sha256"] != old
    chain.options["b"] = ["content=other", "loss=2"]  # other words, the same result: c is made of the same
    assert chain.run() == ["b"]
    assert set(chain.statuses().values()) == {"promoted"}


def test_nesting_and_comments_are_no_change_and_a_configuration_is(tmp_path):
    from engine.config.pipeline import PipelineConfig
    from engine.pipeline_steps import commands

    config = tmp_path / "c.yaml"

    def fingerprint(text: str, overrides: dict, **fields) -> str:
        config.write_text(text)
        cfg = PipelineConfig(stages=[{"name": "a", "steps": [
            {"command": "sft", "config": config, "overrides": overrides} | fields]}])
        return commands.resolve(cfg, cfg.stages[0].steps[0], "a", ["sft"], {"x": "1"}, []).fingerprint

    base = fingerprint("train:\n  lr: 1e-3\n", {"data.path": "${x}"})
    assert fingerprint("# a comment\ntrain: {lr: 0.001}\n", {"data": {"path": "${x}"}}) == base
    assert fingerprint("train: {lr: 1e-3}\n", {"data.path": "${x}"}, processes=2, timeout_minutes=3) == base
    assert fingerprint("train: {lr: 2e-3}\n", {"data.path": "${x}"}) != base
    assert fingerprint("train: {lr: 1e-3}\n", {"data.path": "${here}"}) != base
    (tmp_path / "rows.jsonl").write_text("1")
    outside = [fingerprint("train: {lr: 1e-3}\n", {"data.path": str(tmp_path / "rows.jsonl")})]
    (tmp_path / "rows.jsonl").write_text("2")
    outside.append(fingerprint("train: {lr: 1e-3}\n", {"data.path": str(tmp_path / "rows.jsonl")}))
    assert outside[0] != outside[1]


def test_a_stage_that_does_not_say_so_starts_from_the_one_before(tmp_path):
    from engine.config.pipeline import PipelineConfig
    from engine.pipeline_steps import commands

    def inputs(overrides: dict) -> dict:
        cfg = PipelineConfig(stages=[{"name": "dpo", "steps": [{"command": "dpo", "overrides": overrides}]}])
        return commands.resolve(cfg, cfg.stages[0].steps[0], "dpo", ["dpo"],
                                {"pretrain": "1", "sft": "2", "export": "3"}, ["pretrain", "sft"]).inputs

    assert inputs({}) == {"sft": "2"}
    assert inputs({"init_from": "${pretrain}"}) == {"pretrain": "1"}
    assert inputs({"init_from": "auto"}) == {"sft": "2"}
    assert inputs({"init_from": "/some/where"}) == {}


def test_the_words_of_a_command(tmp_path):
    from engine.config.pipeline import PipelineConfig
    from engine.pipeline_steps import commands

    cfg = PipelineConfig(output_dir=tmp_path, stages=[{"name": "sft", "steps": [{
        "command": "sft", "processes": 2, "config": "configs/pretrain/demo_cpu.yaml", "overrides": {
            "train": {"lr": 1e-6, "fp8": False}, "init_from": "${base}", "data.path": None,
            "examples.train": [{"path": "${base}/a b.jsonl", "weight": 2}]}}]}])
    work = commands.resolve(cfg, cfg.stages[0].steps[0], "sft", ["sft"], {"base": "1"}, ["base"])
    assert work.words == [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "engine.cli", "sft", "--config", "configs/pretrain/demo_cpu.yaml", "--output_dir", f"{tmp_path}/sft",
        "--train.lr=1e-06", "--train.fp8=false", f"--init_from={tmp_path}/base", "--data.path=null",
        f'--examples.train=[{{"path": "{tmp_path}/base/a b.jsonl", "weight": 2}}]']


def test_a_gate_stops_the_chain_with_the_reason(chain, capsys):
    chain.gates["b"] = [{"metric": "val/loss", "at_most": 2.0}, {"metric": "val/loss", "at_least": 0}]
    said, ran = chain.fails()
    assert ran == ["a", "b"]
    assert said.startswith("stage b: not promoted: val/loss 2.1 misses ≤ 2. ")
    assert chain.statuses() == {"a": "promoted", "b": "refused"}
    assert "sha256" not in chain.promotions()["stages"]["b"]
    page = (chain.out / "report.html").read_text()
    assert "b refused by a gate: val/loss 2.1 misses ≤ 2" in page
    chain.gates["b"] = [{"metric": "val/loss", "at_most": 2.2}]
    assert chain.run() == ["c"]
    chain.gates["a"] = [{"metric": "val/perplexity", "at_most": 100}]  # asked for afterwards, and missing
    said, ran = chain.fails()
    assert ran == []
    assert "val/perplexity is missing in metrics.jsonl" in said
    assert chain.statuses() == {"a": "refused", "b": "waiting", "c": "waiting"}
    chain.gates["a"] = []
    assert chain.run() == []
    assert set(chain.statuses().values()) == {"promoted"}


def test_the_last_hash_stands_for_the_whole_chain(chain):
    chain.run()
    last = chain.promotions()["stages"]["c"]
    chain.gates["a"] = [{"metric": "val/loss", "at_most": 3}]
    assert chain.run() == []
    found = chain.promotions()["stages"]["c"]
    assert found["steps"] == last["steps"]
    assert found["sha256"] != last["sha256"]


def test_exit_code_and_one_line(chain):
    chain.gates["a"] = [{"metric": "val/loss", "at_most": 1}]
    chain.runs.write_text("")
    done = subprocess.run([sys.executable, "-m", "engine.cli", "pipeline", "--config", str(chain.file())], text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: stage a: not promoted: val/loss 2.1 misses ≤ 1")
    assert "Traceback" not in done.stderr


def test_a_step_that_fails(chain):
    chain.options["b"] = ["code=1"]
    said, ran = chain.fails()
    assert ran == ["a", "b"]
    assert said.startswith("step b: failed with exit code 1: the cat sat on <the> keyboard. ")
    assert f"{chain.out}/logs/b.log" in said
    assert chain.statuses() == {"a": "promoted", "b": "failed"}
    assert "the cat sat on &lt;the&gt; keyboard" in (chain.out / "report.html").read_text()
    chain.options["b"] = []
    assert chain.run() == ["b", "c"]


def test_restarts(chain):
    chain.top["max_restarts"] = 1
    chain.options["b"] = [f"once={chain.tmp}/luck"]
    assert chain.run() == ["a", "b", "b", "c"]
    assert chain.promotions()["stages"]["b"]["steps"]["b"]["attempts"] == 2
    chain.options["c"] = ["code=2"]  # a user's mistake is not tried twice
    assert chain.fails()[1] == ["c"]


def test_a_step_that_leaves_nothing(chain):
    empty = chain.tmp / "empty.py"
    empty.write_text("")
    chain.fields["b"] = {"script": [str(empty)]}
    said, _ = chain.fails()
    assert f"{chain.out}/b: the step ended without an error, but left nothing here" in said


def test_what_was_damaged_runs_again(chain, capsys):
    chain.run()
    (chain.out / "b/checkpoints/iter_0000010/weights").write_bytes(b"x")
    assert chain.run() == ["b"]  # it is as it was, so that c is made of the same
    assert "weights: does not match its SHA-256" in capsys.readouterr().err
    (chain.out / "b/checkpoints/iter_0000010/weights").write_bytes(b"x")
    assert chain.run("--no-verify") == []


def test_from_and_until_stage(chain):
    said, ran = chain.fails("--from_stage", "b")
    assert "from_stage b: stage a: step a is not finished" in said
    assert ran == []
    assert chain.run("--until_stage", "b") == ["a", "b"]
    assert chain.run("--from_stage", "b") == ["b", "c"]
    assert (chain.out / "set_aside/b.1").is_dir()
    chain.options["a"] = ["content=new"]
    assert "what it is made of has changed" in chain.fails("--from_stage", "b")[0]


def test_a_manifest_changed_by_hand_or_cut_is_refused(chain):
    chain.gates["a"] = [{"metric": "val/loss", "at_most": 3}]
    chain.run()
    path = chain.out / "promotions.json"
    text = path.read_text()
    path.write_text(text.replace('"value": 2.1', '"value": 1.1'))
    said, ran = chain.fails()
    assert (ran, "stage a was changed by hand" in said) == ([], True)
    path.write_text(text[:-30])
    assert "promotions.json: cannot be read" in chain.fails()[0]
    path.write_text(text)
    assert chain.run() == []


def test_one_pipeline_in_a_folder(chain):
    from engine.pipeline_steps import promotions

    with promotions.locked(chain.out):
        assert "another pipeline is running in this folder" in chain.fails()[0]
    assert chain.run() == ["a", "b", "c"]


@pytest.mark.parametrize(("fields", "words"), [
    ({"script": None, "command": "sftt"}, "step c: there is no command 'sftt'. There are prepare"),
    ({"script": ["no.py"]}, "step c: script: no.py: no such file"),
    ({"script": [str(STUB), "${sft}"]}, "step c: ${sft} names no step before it. There are ${here}"),
    ({"script": None, "command": "pretrain", "overrides": {"train.lrr": 1}},
     "stage c, step c: --train.lrr: unknown option. Did you mean --train.lr?"),
    ({"script": None, "command": "pretrain", "overrides": {"train": {"max_steps": "x"}}},
     "stage c, step c: --train.max_steps: got 'x', expected a whole number"),
    ({"script": None, "command": "pretrain", "config": "configs/no.yaml"}, "configs/no.yaml: cannot read the file"),
])
def test_mistakes_in_the_last_stage_are_found_before_the_first(chain, fields, words):
    chain.fields["c"] = fields
    if fields["script"] is None:
        del chain.fields["c"]["script"]
        fields = chain.fields["c"]
        path = chain.file()
        content = yaml.safe_load(path.read_text())
        content["stages"][2]["steps"] = [fields]
        chain.file = lambda: (path.write_text(yaml.safe_dump(content)), path)[1]
    said, ran = chain.fails()
    assert words in said
    assert ran == []
    assert not chain.out.exists()


def test_ranks_environment_and_a_time_limit(chain):
    chain.fields["a"] = {"processes": 2, "environment": {"COLOUR": "blue"}}
    chain.fields["b"] = {"timeout_minutes": 1 / 60}
    chain.options["b"] = ["sleep=60"]
    chain.top["grace_seconds"] = 5
    start = time.monotonic()
    said, _ = chain.fails()
    assert time.monotonic() - start < 40
    assert "step b: failed with exit code 124: took longer than 1 s" in said
    assert sorted(chain.runs.read_text().splitlines())[:2] == ["a rank 0 of 2 blue", "a rank 1 of 2 blue"]
    assert not psutil.pid_exists(int((chain.out / "b/pid").read_text()))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interruption_ends_the_step_and_the_next_start_goes_on(chain, sent):
    chain.options["b"] = ["sleep=60"]
    chain.runs.write_text("")
    process = subprocess.Popen([sys.executable, "-m", "engine.cli", "pipeline", "--config", str(chain.file())],
                               stderr=subprocess.DEVNULL)
    wait_for(chain.out / "b/pid")
    child = int((chain.out / "b/pid").read_text())
    process.send_signal(sent)
    code = process.wait(20)
    assert code == (-9 if sent == signal.SIGKILL else 130)
    ends = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends, "the step outlives the pipeline"
        time.sleep(0.05)
    if sent != signal.SIGKILL:
        assert chain.statuses() == {"a": "promoted", "b": "interrupted"}
        assert "b interrupted" in (chain.out / "report.html").read_text()
    chain.options["b"] = []
    assert chain.run() == ["b", "c"]


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["configs/pipeline.yaml", "configs/pipeline/7b_8gpu.yaml"])
def test_the_chains_that_are_shipped_pass_preflight(path, monkeypatch):
    from engine import pipeline
    from engine.config import parse
    from engine.config.pipeline import PipelineConfig
    from engine.pipeline_steps import chain

    monkeypatch.chdir(Path(__file__).parents[2])
    cfg = parse(PipelineConfig, ["--config", path], prog="pipeline")
    found = chain.plan(cfg, pipeline.commands())
    for stage, _, work in found:
        pipeline.preflight(stage.name, work.name, pipeline.commands()[work.command], work.arguments)
    assert [work.command for _, _, work in found if work.trains] == ["pretrain", "midtrain", "sft", "dpo", "lora"]
    assert {gate.metric for stage, _, _ in found for gate in stage.gates} >= {
        "val/perplexity", "val/accuracy", "val/rewards/margins", "refusal_rate"}


# --- real commands ---------------------------------------------------------------------------------------------------

def real(tmp: Path, corpus: Path, **train: object) -> Path:
    """prepare, pretrain, evaluate and answer: the engine's own, on a tiny corpus."""
    import tiny

    (tmp / "train.yaml").write_text(dump_yaml(tiny.config(Path("unset"), Path("unset"), checkpoint__save_steps=4)))
    stages = [
        {"name": "prepare", "steps": [{"command": "prepare", "overrides": {
            "input": [str(corpus.parent / "raw")], "vocab_size": 300, "validation_fraction": 0.1}}]},
        {"name": "pretrain", "steps": [{"command": "pretrain", "config": str(tmp / "train.yaml"), "overrides": {
            "data.path": "${prepare}", "train": train, "evaluation.eval_steps": 2}}],
         "gates": [{"metric": "val/perplexity", "at_most": 400}]},
        {"name": "check", "steps": [
            {"name": "measured", "command": "evaluate", "overrides": {"checkpoint": "${pretrain}"}},
            {"name": "answered", "command": "answer", "overrides": {
                "model": "${pretrain}", "prompt": ["the spring", "wheels"], "max_new_tokens": 3}}],
         "gates": [{"metric": "perplexity", "file": "result.json", "step": "measured", "at_most": 400},
                   {"metric": "refusal_rate", "file": "result.json", "at_most": 0}]}]
    path = tmp / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp / "out"), "stages": stages, "follow": False}))
    return path


def test_real_commands(tmp_path, corpus, capsys):
    path = real(tmp_path, corpus, max_steps=4)
    words = [sys.executable, "-m", "engine.cli", "pipeline", "--config", str(path)]
    done = subprocess.run(words, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/promotions.json").read_text())["stages"]
    assert [entry["status"] for entry in found.values()] == ["promoted"] * 3
    prepared = tmp_path / "out/prepare"
    sha256 = hashlib.sha256((prepared / "manifest.json").read_bytes()).hexdigest()
    assert found["prepare"]["steps"]["prepare"]["result"] == {"kind": "prepared", "path": ".", "sha256": sha256}
    training = found["pretrain"]["steps"]["pretrain"]
    assert training["data"] == {str(prepared): sha256}
    assert training["result"]["step"] == 4
    measured = json.loads((tmp_path / "out/measured/result.json").read_text())
    assert found["check"]["gates"][0]["value"] == measured["perplexity"]
    answers = [json.loads(line) for line in (tmp_path / "out/answered/answers.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in answers] == ["the spring", "wheels"]
    assert (tmp_path / "out/answered/result.json").is_file()
    again = subprocess.run(words, text=True, capture_output=True, timeout=200)
    assert again.returncode == 0
    assert "pretrain: unchanged, kept" in again.stderr
    assert "prepared before from the same input and settings" in (tmp_path / "out/logs/prepare.log").read_text()
    assert not (tmp_path / "out/set_aside").exists()
    check_page((tmp_path / "out/report.html").read_text())


def test_training_that_was_interrupted_goes_on_from_its_checkpoint(tmp_path, corpus):
    path = real(tmp_path, corpus, max_steps=20)
    words = [sys.executable, "-m", "engine.cli", "pipeline", "--config", str(path)]
    content = yaml.safe_load(path.read_text())
    content["stages"] = content["stages"][1:2]
    content["stages"][0]["steps"][0]["overrides"] |= {"data.path": str(corpus), "evaluation.eval_steps": 10}
    path.write_text(yaml.safe_dump(content))
    process = subprocess.Popen([*words, "--grace_seconds", "1"], stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out/pretrain/checkpoints/latest_checkpointed_iteration.txt")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 130
    done = subprocess.run(words, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/promotions.json").read_text())["stages"]["pretrain"]["steps"]["pretrain"]
    assert (record["attempts"], record["result"]["step"]) == (2, 20)
    assert "resuming " in (tmp_path / "out/logs/pretrain.log").read_text()
    assert not (tmp_path / "out/set_aside").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/pretrain/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 21))


# --- the page --------------------------------------------------------------------------------------------------------

class Page(HTMLParser):
    VOID = frozenset({"meta", "br", "img", "hr", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text: str) -> Page:
    """Well formed, and nothing is fetched or run."""
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    for start in [i for i in range(len(text)) if text.startswith("<svg", i)]:
        ET.fromstring(text[start:text.index("</svg>", start) + 6])
    return page


def test_the_report(chain):
    chain.options["b"] = ["loss=nan"]
    chain.options["c"] = ["loss=1"]
    chain.gates["c"] = [{"metric": "val/loss", "at_most": 1.2}]
    chain.top["title"] = "<b>Chain</b> & co"
    chain.run()
    text = (chain.out / "report.html").read_text()
    page = check_page(text)
    assert "<title>&lt;b&gt;Chain&lt;/b&gt; &amp; co</title>" in text
    assert "All 3 stages promoted" in text
    assert page.tags.count("svg") == 3  # the whole run, a and c; b has nothing finite
    assert "validation 1.1 at 10" in text
    assert text.count('class="level"') == 1
    for entry in chain.promotions()["stages"].values():
        assert entry["sha256"] in text
