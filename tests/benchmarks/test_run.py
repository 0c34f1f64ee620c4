"""The benchmark runner: suites by name, JSON, comparison with an earlier result."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import harness, run
from benchmarks.harness import ROOT, Row
from engine.errors import UserError


@pytest.fixture
def suites(monkeypatch):
    """Two suites in place of the real ones; the values of "fast" can be changed between runs."""
    values = {"rate": 100.0, "seconds": 2.0}

    def add_options(group):
        group.add_argument("--size", type=int, default=3)

    def fast(options):
        return [Row("op", {"GB/s": values["rate"], "size": options.size}, compare="GB/s"),
                Row("latency", {"s": values["seconds"]}, compare="s", higher_is_better=False),
                Row("note", {"text": "hello", "nothing": None})]

    modules = {"fast": SimpleNamespace(run=fast, add_options=add_options),
               "other": SimpleNamespace(run=lambda options: [Row("x", {"n": 1234567})])}
    monkeypatch.setattr(run, "suite_names", lambda: sorted(modules))
    monkeypatch.setattr(run.importlib, "import_module", lambda name: modules[name.removeprefix("benchmarks.bench_")])
    return values


def test_the_result_names_machine_and_versions(suites, tmp_path, capsys):
    path = tmp_path / "new" / "out.json"
    assert run.main(["fast", "other", "--size", "5", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["suites"]["fast"][0] == {"name": "op", "values": {"GB/s": 100.0, "size": 5}, "compare": "GB/s",
                                            "higher_is_better": True, "failed": ""}
    assert written["suites"]["other"][0]["values"] == {"n": 1234567}
    assert written["options"]["size"] == 5
    assert set(written["machine"]) == {"cpu", "cores", "memory_gb", "gpu", "system"}
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["memory_gb"] > 0.5
    import torch

    assert written["versions"]["torch"] == torch.__version__
    assert set(written["versions"]) == {"python", "commit", "dirty", *harness.PACKAGES}
    out = capsys.readouterr().out
    assert "1,234,567" in out
    assert "hello" in out


def test_a_run_that_is_stopped_keeps_what_it_measured(suites, tmp_path, monkeypatch):
    def stopped(options):
        yield Row("first", {"ms": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_suite", lambda name: SimpleNamespace(run=stopped))
    with pytest.raises(KeyboardInterrupt):
        run.main(["fast", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in written["suites"]["fast"]] == ["first"]


def test_a_failure_of_ours_is_exit_code_1_after_everything_ran(suites, tmp_path, monkeypatch, capsys):
    rows = [Row("bad", {"ms": None}, failed="off by 0.5"), Row("good", {"ms": 1.0})]
    monkeypatch.setattr(run, "load_suite", lambda name: SimpleNamespace(run=lambda options: rows))
    assert run.main(["fast", "--json", str(tmp_path / "out.json")]) == 1
    assert "FAILED bad: off by 0.5" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())["suites"]["fast"]) == 2


def test_commit_and_changes_are_those_of_the_repository(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    head = (tmp_path / ".git" / (tmp_path / ".git" / "HEAD").read_text().split()[1]).read_text().strip()
    found = harness.versions()
    assert (found["commit"], found["dirty"]) == (head, False)
    (tmp_path / "file").write_text("2")
    assert harness.versions()["dirty"] is True


@pytest.mark.parametrize(("rate", "seconds", "code", "ratios"), [
    (100.0, 2.0, 0, ["1.000", "1.000"]),
    (90.0, 2.0, 1, ["0.900", "1.000"]),  # slower
    (100.0, 2.5, 1, ["1.000", "0.800"]),  # longer, where less is better
    (150.0, 1.0, 0, ["1.500", "2.000"]),
    (96.0, 2.0, 0, ["0.960", "1.000"]),  # within the tolerance of 5%
])
def test_comparison_flags_regressions(suites, tmp_path, capsys, rate, seconds, code, ratios):
    earlier = str(tmp_path / "earlier.json")
    run.main(["fast", "--json", earlier])
    suites.update(rate=rate, seconds=seconds)
    capsys.readouterr()
    assert run.main(["fast", "--compare", earlier]) == code
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if line.startswith("fast: ")]
    assert [line.split()[5] for line in compared] == ratios
    assert [line.split()[-1] for line in compared] == ["REGRESSED" if float(ratio) < 0.95 else "ok" for ratio in ratios]


def test_comparison_names_another_machine(suites, tmp_path, capsys):
    path = tmp_path / "earlier.json"
    run.main(["fast", "--json", str(path)])
    earlier = json.loads(path.read_text())
    earlier["machine"]["cpu"] = "Z80"
    earlier["suites"] = {}
    path.write_text(json.dumps(earlier))
    assert run.main(["fast", "--compare", str(path)]) == 0
    out = capsys.readouterr().out
    assert "cpu: Z80 then, " in out
    assert "no row in common" in out


@pytest.mark.parametrize(("content", "message"), [
    (None, "No such file"), ("{", "not JSON"), ("[]", "not a benchmark result"), ("{}", "not a benchmark result")])
def test_a_bad_earlier_result_is_refused_before_anything_runs(suites, tmp_path, content, message):
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_text(content)
    suites.clear()  # running "fast" would raise KeyError
    with pytest.raises(UserError, match=rf"earlier\.json: {message}"):
        run.main(["fast", "--compare", str(path)])


def test_an_unknown_suite_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "benchmarks/run.py", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no benchmark suite 'nonsense'. There are: ")
    assert "train" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_table_aligns_and_prints_dashes():
    text = harness.table([Row("a", {"x": 1.23456, "y": None}), Row("long name", {"x": 123456.7, "z": "text"})])
    assert text.splitlines() == ["                 x  y     z",
                                 "---------------------------",
                                 "a            1.235  -     -",
                                 "long name  123,457  -  text"]


def test_median_ratio_is_of_rounds_not_of_medians():
    assert harness.median_ratio([10.0, 100.0, 10.0], [5.0, 50.0, 1.0]) == 2.0
