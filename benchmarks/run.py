"""Runs benchmark suites by name: ``python benchmarks/run.py train --precision bf16 --json out.json``.

Prints a table for each, writes JSON with the machine and the versions, and compares with an earlier result
(``--compare earlier.json``: exit code 1 if a row got worse by more than ``--tolerance``). Exit code 1 also if a row
says that something of ours failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # started as a file, from a checkout that need not be installed
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "kernels")]

from benchmarks import harness
from engine.errors import UserError


def suite_names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def load_suite(name: str) -> ModuleType:
    """benchmarks.bench_<name>. Raises UserError when there is none."""
    if name not in suite_names():
        raise UserError(f"no benchmark suite {name!r}", fix=f"There are: {', '.join(suite_names())}")
    suite = importlib.import_module(f"benchmarks.bench_{name}")
    assert hasattr(suite, "run"), f"benchmarks/bench_{name}.py has no run(options) -> list[Row]"
    return suite


def load_earlier(path: Path) -> dict:
    """An earlier ``--json`` file. Raises UserError when it is not one."""
    try:
        earlier = json.loads(path.read_text())
    except OSError as error:
        raise UserError(str(error.strerror), where=str(path), fix="Give a file that --json wrote") from error
    except ValueError as error:
        raise UserError("not JSON", where=str(path), fix="Give a file that --json wrote") from error
    if not isinstance(earlier, dict) or "suites" not in earlier:
        raise UserError("not a benchmark result", where=str(path), fix="Give a file that --json wrote")
    return earlier


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", metavar="SUITE", help=", ".join(suite_names()))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--compare", type=Path, help="an earlier --json file")
    parser.add_argument("--tolerance", type=float, default=0.05, help="a regression is worse by more than this (0.05)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of what is measured (all cores)")
    for name in [name for name in suite_names() if name in argv]:  # the suites named decide which options there are
        suite = load_suite(name)
        if hasattr(suite, "add_options"):
            suite.add_options(parser.add_argument_group(f"suite {name}"))
    options = parser.parse_args(argv)

    suites = {name: load_suite(name) for name in options.suites}
    earlier = load_earlier(options.compare) if options.compare else None  # before an hour of measuring, not after it
    rows_of: dict[str, list[harness.Row]] = {}
    for name, suite in suites.items():
        rows = rows_of[name] = []
        for row in suite.run(options):
            rows.append(row)
            if options.json:  # after each: a run that is stopped keeps what it measured
                harness.write_json(options.json, harness.result(rows_of, vars(options)))
        print(f"\n{name}\n{harness.table(rows)}", flush=True)
    now = harness.result(rows_of, vars(options))
    if options.json:
        harness.write_json(options.json, now)
        print(f"\nwritten to {options.json}")
    failures = [row for rows in rows_of.values() for row in rows if row.failed]
    for row in failures:
        print(f"FAILED {row.name}: {row.failed}", file=sys.stderr)
    return max(_compare(now, earlier, options.tolerance) if earlier else 0, int(bool(failures)))


def _compare(now: dict, earlier: dict, tolerance: float) -> int:
    comparisons = harness.compare(now, earlier, tolerance)
    print(f"\nagainst the result of {earlier.get('time', 'an unknown time')}")
    for line in harness.differences(now, earlier):
        print(f"  {line}")
    if not comparisons:
        print("  no row in common")
        return 0
    print(harness.comparison_table(comparisons))
    return int(any(comparison.regressed for comparison in comparisons))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
