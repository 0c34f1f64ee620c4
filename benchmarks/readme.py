"""README's tables of figures, made from the committed results: ``python benchmarks/readme.py`` prints them.

A test holds README to it, so no figure there is typed in by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

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


def place(result: dict) -> str:
    """Where and with what it was measured."""
    machine, versions = result["machine"], result["versions"]
    return (f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, transformers "
            f"{versions['transformers']}, megatron-core {versions['megatron-core']}, Python {versions['python']}")


def main() -> None:
    result = json.loads((RESULTS / "cpu_demo_train.json").read_text())
    print(f"{place(result)}\n\n{table(result)}")
    print(f"\n{table(json.loads((RESULTS / 'cpu_post.json').read_text()), 'post')}")


if __name__ == "__main__":
    main()
