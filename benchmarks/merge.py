"""One result of a GPU run from its parts: ``python benchmarks/merge.py --output DIR --junit tests.xml kernels.json``

Writes DIR/results.json (all suites; the test run is one of them) and DIR/results.md, and prints what matters in few
characters. Parts that were stopped count with what they had written; parts that wrote nothing are named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.harness import Row, cell, write_json

# What the printed summary shows of each suite; the files have everything.
SHORT = {"kernels_gpu": ("ms", "% copy", "% matmul", "x eager", "x compile", "x liger", "x quack", "error"),
         "train": ("tokens/s", "MFU %", "memory GB", "engine x", "x bf16", "last loss"),
         "profile": ("ms", "%", "calls", "what"),
         "tests": ("passed", "failed", "skipped", "seconds", "note"),
         "ahead": ("registers", "spilled bytes", "shared bytes", "occupancy %")}
NOTE = 100  # characters of a note


def merged(parts: Iterable[Path], junit: Path | None, status: Iterable[str]) -> dict[str, Any]:
    """The parts' suites under one machine and one set of versions; ``status``: "part=exit code after N s" lines."""
    result: dict[str, Any] = {"machine": {}, "versions": {}, "time": "", "options": {}, "suites": {}}
    for path in parts:
        if not path.exists():
            result["suites"].setdefault("missing", []).append(_plain(Row(path.stem, {"note": "wrote no result"})))
            continue
        part = json.loads(path.read_text())
        result |= {key: part[key] for key in ("machine", "versions", "time")}
        result["options"][path.stem] = part["options"]
        for suite, rows in part["suites"].items():
            result["suites"].setdefault(suite, []).extend(rows)
    if junit is not None:
        result["suites"]["tests"] = [_plain(row) for row in test_rows(junit)]
    result["options"]["status"] = list(status)
    return result


def _plain(row: Row) -> dict[str, Any]:
    return {"name": row.name, "values": row.values, "compare": None, "higher_is_better": True, "failed": row.failed}


def test_rows(path: Path) -> list[Row]:
    """pytest's junit report: the numbers, then a row for each test that failed."""
    if not path.exists():
        return [Row("tests", {"note": "no report: stopped before it ended"}, failed="no report")]
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total = {key: sum(int(float(suite.get(key, 0))) for suite in suites)
             for key in ("tests", "failures", "errors", "skipped", "time")}
    failed = total["failures"] + total["errors"]
    rows = [Row("tests", {"passed": total["tests"] - failed - total["skipped"], "failed": failed,
                          "skipped": total["skipped"], "seconds": total["time"]})]
    for suite in suites:
        for test in suite.iter("testcase"):
            for problem in (*test.iter("failure"), *test.iter("error")):
                message = (problem.get("message") or "").strip().splitlines()
                rows.append(Row(f"{test.get('classname')}::{test.get('name')}", {"note": (message or [""])[0][:300]},
                                failed=(problem.text or "")[-1500:]))
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Everything as tables."""
    machine, versions = result["machine"], result["versions"]
    place = ", ".join(machine.get("gpu") or ["no GPU"])
    lines = [f"# {place}", "",
             f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores; "
             + ", ".join(f"{name} {version}" for name, version in versions.items() if version not in (None, "")), "",
             f"Measured {result['time']}. " + "; ".join(result["options"]["status"]), ""]
    for suite, rows in result["suites"].items():
        columns = list(dict.fromkeys(column for row in rows for column in row["values"]))
        lines += [f"## {suite}", "", "| | " + " | ".join(columns) + " |",
                  "|---|" + "".join("---|" if _is_text(rows, column) else "--:|" for column in columns)]
        lines += ["| " + " | ".join(_escaped(text) for text in (
            row["name"], *(cell(row["values"].get(column)) for column in columns))) + " |" for row in rows]
        lines += ["", *[f"**{row['name']} failed**: {_escaped(row['failed'].strip().splitlines()[-1][:400])}\n"
                        for row in rows if row["failed"].strip()]]
    return "\n".join(lines)


def _is_text(rows: list[dict[str, Any]], column: str) -> bool:
    return any(isinstance(row["values"].get(column), str) for row in rows)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def short(result: dict[str, Any], limit: int) -> str:
    """The columns that matter, at most ``limit`` characters: failures first, then suite by suite."""
    lines = [*result["options"]["status"]]
    for suite, rows in result["suites"].items():
        lines += [f"FAILED {suite}: {row['name']}: {row['failed'].strip().splitlines()[-1][:200]}"
                  for row in rows if row["failed"].strip()]
    for suite, rows in result["suites"].items():
        lines.append(f"-- {suite}")
        for row in rows:
            values = {column: row["values"].get(column) for column in SHORT.get(suite, tuple(row["values"]))}
            note = row["values"].get("note")
            shown = [f"{column} {cell(value)[:60]}" for column, value in values.items() if value is not None]
            lines.append(f"{row['name']}: " + ", ".join(shown) + (f" [{note[:NOTE]}]" if note else ""))
    text = "\n".join(lines)
    return text if len(text) <= limit else text[:limit] + f"\n... {len(text) - limit} characters more in the files"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/merge.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--status", nargs="*", default=[])
    options = parser.parse_args(argv)
    result = merged(options.parts, options.junit, options.status)
    write_json(options.output / "results.json", result)
    (options.output / "results.md").write_text(markdown(result))
    print(short(result, 11_000))


if __name__ == "__main__":
    main(sys.argv[1:])
