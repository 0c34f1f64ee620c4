"""README's tables of figures, made from the committed results: ``python benchmarks/readme.py`` prints them.

A test holds README to it, so no figure there is typed in by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a file, from a checkout that need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data import plot

RESULTS = Path(__file__).parent / "results"
COLUMNS = {"tokens/s": "{:,.0f}", "x eager": "{:.2f}", "x compile": "{:.2f}", "MFU %": "{:.0f}", "memory GB": "{:.2f}",
           "start-up s": "{:.1f}", "first step s": "{:.1f}",
           "last loss": "{:.3f}"}
POST_COLUMNS = {"examples/s": "{:.1f}", "x trl": "{:.2f}", "x trl with reference": "{:.2f}", "fill %": "{:.0f}",
                "memory GB": "{:.2f}", "last loss": "{:.3f}"}


def table(result: dict, suite: str = "train") -> str:
    """A suite's rows as Markdown: "train" or "post"."""
    columns = COLUMNS if suite == "train" else POST_COLUMNS
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in result["suites"][suite]:
        values = (row["values"].get(name) for name in columns)
        cells = ["" if value is None else form.format(value)
                 for value, form in zip(values, columns.values(), strict=True)]
        lines.append(f"| {row['name'].removeprefix('demo ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def data_table(result: dict) -> str:
    """The suite "data" as Markdown: every side of every job, and how many times as fast the engine is beside it."""
    lines = ["| job | size | side | seconds | rate | memory MB | the engine is | asked for |", "|---" * 8 + "|"]
    for row in result["suites"]["data"]:
        parts = plot.NAME.fullmatch(row["name"])
        assert parts is not None, row["name"]
        values = row["values"]
        rate = next(((name[2:], value) for name, value in values.items() if name.endswith("/s") and name[:2] == "M "),
                    None)
        cells = [parts["job"].replace("_", " "), f"{parts['size']} {parts['unit']}", parts["side"],
                 _cell(values.get("seconds"), "{:.3g}"), f"{rate[1]:,.3g} M {rate[0]}" if rate else "",
                 _cell(values.get("memory MB"), "{:,.0f}"), _cell(values.get("engine is x"), "{:.3g} x"),
                 _cell(values.get("bar"), "{:g} x")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def place(result: dict) -> str:
    """Where and with what it was measured."""
    machine, versions = result["machine"], result["versions"]
    return (f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, transformers "
            f"{versions['transformers']}, megatron-core {versions['megatron-core']}, Python {versions['python']}")


def main() -> None:
    result = json.loads((RESULTS / "cpu_demo_train.json").read_text())
    print(f"{place(result)}\n\n{table(result)}")
    print(f"\n{table(json.loads((RESULTS / 'cpu_post.json').read_text()), 'post')}")
    print(f"\n{data_table(json.loads((RESULTS / 'cpu_data.json').read_text()))}")


if __name__ == "__main__":
    main()
