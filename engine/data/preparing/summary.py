"""What reading all units came to: cleaning and quarantine merged in their order, rows numbered through, and the
refusals that follow."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO

from engine.config.prepare import PrepareConfig
from engine.data import quarantine
from engine.data.cleaning import Cleaner
from engine.data.cleaning_report import CleaningReport
from engine.data.preparing import read
from engine.data.preparing.job import Job
from engine.data.quarantine import Quarantine
from engine.data.reading import check_bad_fraction
from engine.data.sources import show
from engine.data.units import LineNumbers, Slice
from engine.errors import UserError


def cleaned(job: Job) -> CleaningReport:
    """The cleaning of all units as if one cleaner had done it."""
    total = CleaningReport()
    for unit in range(job.units):
        total.merge(CleaningReport.from_json(read.report_of(job, unit)["cleaning"]))
    return total


def quarantined(job: Job) -> dict[str, Any]:
    """The manifest's ``quarantine``: of all units as if one reader had filled it."""
    first = Quarantine(io.StringIO())
    _add_unreadable(job, first)
    units = (read.report_of(job, unit)["quarantine"] for unit in range(job.units))
    return quarantine.merged([first.as_manifest(), *units])


def write_quarantine(job: Job, out: BinaryIO, numbers: LineNumbers) -> None:
    """All of its lines, in the order of the input."""
    text = io.StringIO()
    _add_unreadable(job, Quarantine(text))
    out.write(text.getvalue().encode())
    for unit in range(job.units):
        with open(job.place(read.NAME, unit) / read.QUARANTINE, "rb") as lines:
            if all(piece.start == 0 for piece in job.unit(unit).unit.slices):
                shutil.copyfileobj(lines, out)
                continue
            for line in lines:
                out.write(json.dumps(numbers.item(json.loads(line))).encode() + b"\n")


def _add_unreadable(job: Job, into: Quarantine) -> None:
    for path, reason in job.unreadable:
        into.add(path, None, "unreadable", reason)


def line_numbers(job: Job) -> LineNumbers:
    """Rows of pieces that do not begin their file, as rows of the file."""
    return LineNumbers(_pieces_of_cut_files(job))


def _pieces_of_cut_files(job: Job) -> Iterator[tuple[Slice, int]]:
    for unit in range(job.units):
        pieces = job.unit(unit).unit.slices
        if any(not piece.whole for piece in pieces):
            found = read.report_of(job, unit)["slices"]
            yield from ((piece, item["lines"]) for piece, item in zip(pieces, found, strict=True) if not piece.whole)


def numbered(item: Any, numbers: LineNumbers) -> Any:
    """A part of the manifest with every place in it, wherever it stands, numbered by ``numbers``."""
    if isinstance(item, list):
        return [numbered(each, numbers) for each in item]
    if not isinstance(item, dict):
        return item
    item = numbers.item(item) if "file" in item else item
    places = {name: numbers.place(item[name]) for name in ("source", "dropped", "same_as") if _is_place(item, name)}
    return {name: numbered(value, numbers) for name, value in item.items()} | places


def _is_place(item: dict[str, Any], name: str) -> bool:
    return isinstance(item.get(name), str)


def check(job: Job) -> None:
    """UserError where too many rows were unusable, or where no document is left."""
    reports = [read.report_of(job, unit) for unit in range(job.units)]
    bad = sum(report["quarantine"]["lines"] for report in reports)
    records = sum(report["records"] for report in reports)
    if bad > job.config.max_bad_fraction * records:
        check_bad_fraction(job.config, records, bad, _first_bad(job))
    if not any(len(read.spool_of(job, unit)) for unit in range(job.units)):
        raise _nothing_left(job.config, sum(report["read"] for report in reports), cleaned(job), quarantined(job))


def _first_bad(job: Job) -> str:
    numbers = line_numbers(job)
    for unit in range(job.units):
        with open(job.place(read.NAME, unit) / read.QUARANTINE, encoding="utf-8") as lines:
            for item in map(json.loads, lines):
                if item["line"] is not None:
                    item = numbers.item(item)
                    return f"{item['file']}:{item['line']}: {item['detail']}"
    raise AssertionError("counted, but not in the quarantine")


def _nothing_left(
    config: PrepareConfig, documents: int, report: CleaningReport, quarantine: dict[str, Any]
) -> UserError:
    where = ", ".join(show(path) for path in config.input[:3]) + (", …" if len(config.input) > 3 else "")
    if not documents:
        first = next(iter(quarantine["samples"]), None)
        detail = f"; the first unreadable one is {first['file']} ({first['detail']})" if first else ""
        return UserError(f"no documents{detail}", where=where, fix="Check --input, and that the files are UTF-8.")
    rule, count = report.dropped.most_common(1)[0]
    description = next(item.description for item in Cleaner.of(config).rules if item.name == rule)
    flags = {"too_short": "Lower --min_characters.", "too_long": "Raise --max_characters.", "empty": "Check --input."}
    return UserError(
        f"cleaning removed all {documents:,} documents; rule {rule} ({description}) removed most, {count:,}, first "
        f"{report.samples[rule][0]['source']}",
        where=where, fix=flags.get(rule, f"If it is wrong here, leave it out with --skip_rule {rule}."),
    )  # fmt: skip
