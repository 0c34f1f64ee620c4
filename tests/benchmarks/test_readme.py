"""README's figures are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import bench_data, readme

README = Path(__file__).parents[2] / "README.md"


def test_the_table_is_the_committed_result():
    result = json.loads((readme.RESULTS / "cpu_demo_train.json").read_text())
    assert readme.table(result) in README.read_text()
    assert readme.place(result) in README.read_text()


def test_the_bars_that_readme_claims_are_met():
    result = json.loads((readme.RESULTS / "cpu_demo_train.json").read_text())
    ratios = {row["name"]: row["values"] for row in result["suites"]["train"]}
    for precision in ("fp32", "bf16"):
        engine = ratios[f"demo {precision} engine"]
        assert engine["x eager"] >= 1.2
        assert engine["x compile"] >= 1.0
        assert engine["start-up s"] + engine["first step s"] <= 15


def test_the_table_of_stages_is_the_committed_result_and_its_bars_are_met():
    result = json.loads((readme.RESULTS / "cpu_post.json").read_text())
    assert readme.table(result, "post") in README.read_text()
    rows = {row["name"]: row["values"] for row in result["suites"]["post"]}
    for precision in ("fp32", "bf16"):
        for task, ratio in (("sft", "x trl"), ("dpo", "x trl"), ("dpo", "x trl with reference")):
            engine, trl = rows[f"{task} {precision} engine"], rows[f"{task} {precision} trl"]
            assert engine[ratio] >= 2
            assert engine["memory GB"] <= trl["memory GB"]


def test_the_demo_line_is_the_committed_report():
    report = json.loads((readme.RESULTS / "cpu_demo_report.json").read_text())
    assert report["verdict"] in README.read_text()
    assert report["held_out"]["loss"] < report["baselines"]["bigram"] < report["baselines"]["unigram"]


def test_the_table_of_data_is_the_committed_result_and_its_bars_are_met():
    result = json.loads((readme.RESULTS / "cpu_data.json").read_text())
    assert readme.data_table(result) in (README.parent / "docs/data.md").read_text()
    rows = result["suites"]["data"]
    assert {row["name"].split()[0] for row in rows} == set(bench_data.jobs())
    barred = [row for row in rows if row["values"].get("bar")]
    assert len(barred) == len(bench_data.jobs())
    for row in barred:
        assert row["values"]["engine is x"] >= row["values"]["bar"], row["name"]
    assert not [row["name"] for row in rows if row["failed"]]
