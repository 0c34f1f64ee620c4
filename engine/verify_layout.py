"""`mainspring verify-layout --config …`: a layout against one rank on this machine's CPUs, gradient by gradient."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from engine.config import Config, parameter_count
from engine.errors import UserError


def main(argv: list[str]) -> int:
    """Prints the report. Returns 0 where the layout equals one rank, 1 where it does not or a rank failed."""
    from engine.config import parse
    from engine.config.verify import VerifyConfig

    options = parse(VerifyConfig, argv, prog="mainspring verify-layout")
    command = shlex.join(["mainspring", "verify-layout", *argv])
    wanted = options.verify
    found = verify(options.training(), shrink=wanted.shrink, ranks=wanted.ranks, tolerance=wanted.bound,
                   precision=wanted.precision, command=command)
    print(found["report"])
    if wanted.json_file is not None:
        _write(wanted.json_file, found)
    return 0 if found["passed"] else 1


def verify(cfg: Config, *, shrink: bool = False, ranks: int | None = None, tolerance: float = 1e-5,
           precision: str = "fp32", plant: str | None = None, command: str | None = None) -> dict[str, Any]:
    """Compares the layout of ``cfg`` with one rank; starts the ranks itself, and leaves no process behind.

    ``ranks``: processes of the layout (None: ``jobs.fewest_ranks``). ``plant``: "file.py:function", a context manager
    that every rank of the layout enters around its work. -> ``passed``, ``report`` (text), and everything that the
    command's JSON holds. Raises ``UserError`` for a layout that cannot run, before any rank starts.
    """
    from engine.verification import jobs, report

    if cfg.awaits_model():  # of a stage that takes it from where it starts: not the defaults of the section model
        from engine.stages import origin

        cfg, _ = origin.settle(cfg)
    settled, count = jobs.fit(cfg, precision=precision, shrink=shrink, ranks=ranks)
    check_memory(settled, count)
    case = jobs.case("layout", settled, count, tolerance=tolerance, plant=plant)
    from engine.verification.ranks import compare_all

    started = time.monotonic()
    found = report.summary(case, compare_all([case])[0])
    if found.get("failure", {}).get("refused"):
        raise UserError(found["failure"]["error"])
    seconds = time.monotonic() - started
    notes = jobs.notes(settled, cfg)
    head = [f"layout   {report.layout(settled, count)}, against one rank, {precision}, tolerance {tolerance:g}",
            f"model    {report.model(settled)}{' (shrunk)' if shrink else ''}",
            *(f"note     {line}" for line in notes),
            f"versions {', '.join(f'{name} {number}' for name, number in report.versions().items())}",
            f"command  {command or 'engine.verify_layout.verify'}", ""]
    text = "\n".join([*head, *report.lines(case, found), f"{seconds:.1f} s"])
    return {"passed": found["passed"], "report": text, "layout": report.layout(settled, count), "command": command,
            "versions": report.versions(), "notes": notes, "seconds": seconds, "precision": precision,
            "config": settled.model_dump(mode="json"), "requested_config": cfg.model_dump(mode="json"),
            **{name: value for name, value in found.items() if name != "passed"}}


def check_memory(cfg: Config, ranks: int) -> None:
    """Refuses a model that does not fit into this machine's memory as often as the ranks of a layout hold it: weights,
    gradients, two moments, and what is kept to compare, in fp32. The disk holds the last as well."""
    import psutil

    from engine.verification.jobs import vocabulary

    copies = max(1.0, ranks / (cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.expert))
    needed = parameter_count(cfg.model, vocab_size=vocabulary(cfg)) * copies * 4 * 6
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(f"comparing this model takes about {needed / 2**30:,.0f} GiB of memory, "
                        f"and {available / 2**30:,.0f} are free", where="verify-layout", fix="Add --shrink")


def _write(path: Path, found: dict[str, Any]) -> None:
    from engine.verification.report import strict

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(strict(found), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path), fix="Choose another --json") from error


if __name__ == "__main__":
    from engine.runtime import command as run_command

    sys.exit(run_command(main, sys.argv[1:]))
