"""Every layout of the documentation's table, in short form, equals one rank."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.verification import layouts, report, table
from engine.verification.ranks import compare_all

ROOT = Path(__file__).resolve().parents[2]
ROWS = {row.name: row for row in layouts.rows()}


@pytest.fixture(scope="module")
def summaries() -> dict[str, dict]:
    cases = {name: row.case(short=True) for name, row in ROWS.items()}
    found = compare_all(list(cases.values()))
    return {name: report.summary(case, outcome) for (name, case), outcome in zip(cases.items(), found, strict=True)}


@pytest.mark.parametrize("name", ROWS)
def test_a_layout_equals_one_rank(summaries, name):
    found = summaries[name]
    assert "failure" not in found, found["failure"]["error"]
    assert found["passed"], (found["failed"], found["worst"], found["worst_tensor"])
    counts = [step["tokens"][0] for step in found["steps"]]
    assert all(count > 0 for count in counts)
    assert all(step["loss"]["expected"] > 1.0 for step in found["steps"]), "the model has learnt to predict noise"
    moved = {tensor["name"] for tensor in found["tensors"] if tensor["gradients"] and tensor["gradients"]["size"] > 0}
    silent = {tensor["name"] for tensor in found["tensors"]} - moved
    assert all(".experts." in each or each.endswith("expert_bias") for each in silent), silent  # none chose them


def test_the_rows_are_those_of_the_issue():
    names = {(row.section, row.layout) for row in ROWS.values()}
    dense = ["TP2", "TP2+SP", "TP4+SP", "PP2", "PP4", "PP2, 2 chunks a rank", "CP2", "CP4", "DP2",
             "DP4, distributed optimizer"]
    products = ["TP2 x PP2", "TP2+SP x CP2", "CP2 x PP2", "DP2 x TP2", "DP2 x PP2, distributed optimizer"]
    experts = ["EP2", "EP4", "EP2 x TP2+SP, expert TP2", "EP2 x PP2", "EP2, expert TP2, TP1"]
    muon = ["TP2", "TP2+SP", "PP2", "DP2", "EP2"]
    wanted = {"Dense": dense, "Products": products, "Experts": experts, "Muon": muon}
    assert {(section, layout) for section, list_ in wanted.items() for layout in list_} <= names
    for row in ROWS.values():
        sizes = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP"}
        cfg = row.case().found.cfg
        for field, short in sizes.items():
            size = getattr(cfg.parallel, field)
            assert (size > 1) == bool(re.search(rf"(?<!expert ){short}[2-8]", row.layout)), row.name
        assert cfg.parallel.sequence_parallel == ("+SP" in row.layout)
        assert cfg.parallel.distributed_optimizer == ("distributed" in row.layout)
        assert row.ranks <= 4


def test_the_documentation_has_every_row_and_none_failed():
    text = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    for row in ROWS.values():
        assert f"\n| {row.layout} | {row.model.strip()} | {row.ranks} |" in text, row.name
    assert "**" not in text, "a row differs or failed"


def test_a_refused_row_is_a_failure_of_its_own():
    row = layouts.Row("Dense", "TP3", "tied", 3, {"parallel.tensor": 3})
    found = table.measure([row])
    assert found[0]["failure"]["refused"]
    assert "model.num_attention_heads (4)" in table.page(found, command="table", seconds=1.0)
