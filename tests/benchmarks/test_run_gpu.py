"""The script for a machine with a GPU: parts, their limits, and one result of all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import merge
from benchmarks.harness import ROOT


def script(tmp_path, *parts, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "benchmarks/run_gpu.sh", *parts], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "DRY": "1"} | environment)


def test_parts_become_one_result(tmp_path):
    done = script(tmp_path, "kernels", "profile", SECONDS_LIMIT="600")
    log = (tmp_path / "dry/log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == ["log.txt", "results.json", "results.md"]
    result = json.loads((tmp_path / "dry/results.json").read_text())
    assert set(result["suites"]) == {"kernels_gpu", "profile"}
    assert result["versions"]["torch"]
    assert [line.split(" after")[0] for line in result["options"]["status"]] == [
        "kernels: exit code 0", "profile: exit code 0"]
    text = (tmp_path / "dry/results.md").read_text()
    assert "## kernels_gpu" in text
    assert "| tiny bf16 GEMM | " in text
    assert "-- profile" in done.stdout
    assert len(done.stdout) < 12_000


STUB = """#!/usr/bin/env bash
# Stands for Python: the kernels hang, the profile fails after a row, the rest is Python's.
case "$*" in
  *kernels_gpu*) exec sleep 600 ;;
  *"run.py profile"*) echo '{"machine": {}, "versions": {}, "time": "now", "options": {}, "suites": {"profile":
    [{"name": "step", "values": {"ms": 5.0}, "failed": ""}]}}' >"${@: -1}"; exit 1 ;;
  *) exec "$REAL" "$@" ;;
esac
"""


def test_a_part_that_hangs_is_ended_and_the_others_go_on(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    started = time.monotonic()
    done = script(tmp_path, "kernels", "profile", PYTHON=str(stub), REAL=sys.executable, SECONDS_LIMIT="16", LEAST="1")
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    result = json.loads((tmp_path / "dry/results.json").read_text())
    kernels, profile = result["options"]["status"]
    assert kernels.startswith("kernels: ended at its limit")
    assert profile.startswith("profile: exit code 1")
    assert result["suites"]["missing"][0]["name"] == "kernels"
    assert result["suites"]["profile"][0]["values"] == {"ms": 5.0}


def test_what_has_no_time_is_not_begun(tmp_path):
    done = script(tmp_path, "train", SECONDS_LIMIT="20")
    assert done.returncode == 1
    assert done.stdout.count("no time left") == 3


def test_an_unknown_part_is_refused(tmp_path):
    done = script(tmp_path, "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no part 'nonsense'; there are: tests")


JUNIT = """<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1" time="2.5">
<testcase classname="tests.kernels.test_a" name="test_good"/>
<testcase classname="tests.kernels.test_a" name="test_bad"><failure message="assert 1 == 2&#10;more">trace
E assert 1 == 2</failure></testcase>
<testcase classname="tests.kernels.test_b" name="test_broken"><error message="no GPU">trace</error></testcase>
<testcase classname="tests.kernels.test_b" name="test_skipped"><skipped/></testcase></testsuite></testsuites>"""


def test_tests_that_failed_are_rows(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    total, bad, broken = merge.test_rows(path)
    assert total.values == {"passed": 1, "failed": 2, "skipped": 1, "seconds": 2}
    assert (bad.name, bad.values["note"]) == ("tests.kernels.test_a::test_bad", "assert 1 == 2")
    assert broken.failed == "trace"
    result = merge.merged([], path, ["tests: exit code 1"])
    assert "FAILED tests: tests.kernels.test_a::test_bad: E assert 1 == 2" in merge.short(result, 5000)
    assert merge.short(result, 50).endswith("characters more in the files")
    assert "**tests.kernels.test_b::test_broken failed**: trace" in merge.markdown(result)
    assert merge.test_rows(tmp_path / "none.xml")[0].failed


@pytest.mark.parametrize("content", [{"a|b": 1.0, "text": "x|y"}])
def test_markdown_escapes_bars(content):
    row = {"name": "n|m", "values": content, "failed": ""}
    text = merge.markdown({"machine": {"gpu": ["NVIDIA H200, 143771 MiB"]}, "versions": {}, "time": "",
                           "options": {"status": []}, "suites": {"s": [row]}})
    assert text.startswith("# NVIDIA H200")
    assert "| n\\|m | 1.000 | x\\|y |" in text
