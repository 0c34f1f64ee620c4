"""README's table of figures, made from the committed results: ``python benchmarks/readme.py`` prints it.

A test holds README to it, so no figure there is typed in by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COLUMNS = {"tokens/s": "{:,.0f}", "x eager": "{:.2f}", "x compile": "{:.2f}", "MFU %": "{:.0f}", "memory GB": "{:.2f}",
           "start-up s": "{:.1f}", "first step s": "{:.1f}",
           "last loss": "{:.3f}"}


def table(result: dict) -> str:
    """The training suite's rows as Markdown."""
    rows = result["suites"]["train"]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [form.format(row["values"][name]) for name, form in COLUMNS.items()]
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


if __name__ == "__main__":
    main()
