"""Every layout against one rank, as a page of documentation; exit code 1 if one of them differs.

    python -m engine.verification.table --output docs/layouts.md --json layouts.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from engine.config.verify import TOLERANCES
from engine.errors import UserError
from engine.verification import report
from engine.verification.jobs import LEAST_EPS, STEPS
from engine.verification.layouts import Row, rows
from engine.verification.ranks import compare_all

_INTRODUCTION = """# Every layout against one rank

Written by `{command}` in {minutes:.1f} minutes on CPUs (gloo): {versions}.

The same model, the same global batch with uneven loss masks, once on one rank and once under each layout, {steps} steps
of the drivers' own training step. *Loss*: the largest relative error of the steps' losses. *Gradients*: of the first
step, reduced and normalised, before clipping; *weights*: after {steps} steps. The error of a tensor is
`||found - expected|| / ||expected||` in float64, the worst of all its copies on data-parallel ranks, tensor ranks and
pipeline stages; a figure is that of the worst tensor of the model. Summation order alone costs 1e-7 to 1e-6 in fp32.
Tolerances: {tolerances}. AdamW's eps is {eps:g}: it would divide a gradient that is nothing but rounding by its own
size. What the denominator is for tensors that are zero or nearly so: engine/verification/compare.py.

Your own configuration: `mainspring verify-layout --config FILE --shrink`.
"""
_ABOUT = {
    "Dense": "Four layers of 32 features, 4 query heads, 2 groups, tied and untied embeddings.",
    "Products": "The same model, tied.",
    "Experts": "8 experts, top 2, a shared expert, the first layer dense, balance and z-losses; both dispatchers.",
    "Muon": "Hidden matrices by Newton-Schulz, the rest by AdamW.",
    "Variants": "What else a layout could break. Recomputation is compared with one rank that recomputes nothing.",
    "bf16": "Parameters and activations in bf16, gradients in fp32, against one rank in bf16.",
    "Batch split": "One global batch of 8 sequences, against one rank that takes them one by one.",
}


def measure(chosen: list[Row]) -> list[dict[str, Any]]:
    """Each row with what ``report.summary`` found; a row that is refused has the refusal as its failure."""
    cases, refused = {}, {}
    for row in chosen:
        try:
            cases[row.name] = row.case()
        except UserError as error:
            refused[row.name] = {"passed": False, "failure": {"rank": None, "error": str(error), "refused": True}}
    outcomes = compare_all(list(cases.values())) if cases else []
    found = {name: report.summary(case, outcome) for (name, case), outcome in zip(cases.items(), outcomes, strict=True)}
    return [{"section": row.section, "layout": row.layout, "model": row.model.strip(), "ranks": row.ranks,
             **(found | refused)[row.name]} for row in chosen]


def page(found: list[dict[str, Any]], *, command: str, seconds: float) -> str:
    """The page of documentation."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions().items())
    tolerances = ", ".join(f"{bound:g} in {precision}" for precision, bound in TOLERANCES.items())
    text = [_INTRODUCTION.format(command=command, minutes=seconds / 60, versions=versions, steps=STEPS,
                                 tolerances=tolerances, eps=LEAST_EPS)]
    for section in dict.fromkeys(row["section"] for row in found):
        text += [f"## {section}", "", _ABOUT[section], "", "| layout | model | ranks | loss | gradients | weights | "
                 "worst tensor |", "|---|---|--:|--:|--:|--:|---|"]
        text += [_line(row) for row in found if row["section"] == section] + [""]
    return "\n".join(text)


def _line(row: dict[str, Any]) -> str:
    head = f"| {row['layout']} | {row['model']} | {row['ranks']} |"
    if "failure" in row:
        return f"{head} | | | **failed**: {row['failure']['error'].strip().splitlines()[-1]} |"
    figures = " | ".join(report.number(row["worst"][name]) for name in ("loss", "gradients", "weights"))
    mark = "" if row["passed"] else f"**differs** ({', '.join(row['failed'])}): "
    return f"{head} {figures} | {mark}`{row['worst_tensor']['name']}` |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.verification.table", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/layouts.md"))
    parser.add_argument("--json", type=Path, help="everything, every tensor included")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args(argv)
    started = time.monotonic()
    found = measure([row for row in rows() if options.only in row.name])
    seconds = time.monotonic() - started
    command = f"python -m engine.verification.table --output {options.output}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(found, command=command, seconds=seconds), encoding="utf-8")
    if options.json is not None:
        everything = {"versions": report.versions(), "seconds": seconds, "rows": found}
        options.json.write_text(json.dumps(report.strict(everything), indent=1) + "\n", encoding="utf-8")
    failed = [row for row in found if not row["passed"]]
    for row in failed:
        print(_line(row))
    print(f"{len(found) - len(failed)} of {len(found)} layouts equal one rank; {options.output}, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
