"""The lines that `prepare` says as its steps end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from engine.data.preparing import count, finish, read, summary, tokens
from engine.data.preparing.job import Job


class StepLog:
    """``finished(step name)`` after each step."""

    def __init__(self, job: Job, log: Callable[[str], None]):
        self._job, self._log = job, log
        self._started = time.perf_counter()

    def finished(self, name: str) -> None:
        line = {count.CHOOSE: self._read, tokens.TOKENIZER: self._trained, tokens.TOKENIZE: self._tokenized}.get(name)
        if line is None:
            return
        line()
        self._started = time.perf_counter()

    def all_finished(self) -> None:
        """Where another executor did them all at once."""
        for name in (count.CHOOSE, tokens.TOKENIZER, tokens.TOKENIZE):
            self.finished(name)

    def _seconds(self) -> str:
        return f"{time.perf_counter() - self._started:.1f} s"

    def _read(self) -> None:
        job, quarantine, cleaning = self._job, summary.quarantined(self._job), summary.cleaned(self._job)
        reports = [read.report_of(job, unit) for unit in range(job.units)]
        counts = [count.count_of(job, unit) for unit in range(job.units)]
        size = sum(piece["bytes"] for report in reports for piece in report["slices"])
        files = sum(not piece.start for unit in range(job.units) for piece in job.unit(unit).unit.slices)
        documents, kept = sum(report["read"] for report in reports), sum(item["kept"] for item in counts)
        near = f"{_total(counts, 'near_duplicates'):,} near-duplicates, " if job.config.near_dedup else ""
        self._log(
            f"read {files:,} files, {size / 1e6:,.1f} MB, in {self._seconds()}: {documents:,} documents, "
            f"{cleaning.dropped.total():,} dropped, {_total(counts, 'duplicates'):,} duplicates, "
            f"{near}{kept:,} kept; in quarantine {quarantine['files']:,} files and {quarantine['lines']:,} lines"
        )

    def _trained(self) -> None:
        trained, config = tokens.trained_of(self._job), self._job.config
        if trained is None:
            return
        made, wanted = tokens.tokenizer_of(self._job).vocab_size, config.trained_vocab_size
        less = "" if made == wanted else f" ({wanted:,} were asked for, the text is too little)"
        self._log(f"trained a {trained['kind']} tokenizer of {made:,} tokens{less} on "
                  f"{trained['bytes'] / 1e6:,.1f} MB in {self._seconds()}")  # fmt: skip

    def _tokenized(self) -> None:
        job, size = self._job, count.choice_of(self._job)["bytes"]
        reports = [tokens.report_of(job, unit) for unit in range(job.units)]
        made = sum(split["tokens"] for report in reports for split in report["splits"].values())
        self._log(f"tokenized {size / 1e6:,.1f} MB into {made:,} tokens in {self._seconds()}")
        checks = finish.checks(job)
        if lost := checks["documents_not_restored"]:
            self._log(f"warning: this tokenizer loses text: {lost} of the first {checks['documents_checked']} "
                      "documents do not decode to what they were")  # fmt: skip
        if ended := checks["documents_with_eod_inside"]:
            eod = tokens.tokenizer_of(job).eod_token
            self._log(f"warning: {ended:,} documents hold {eod} as text, taken for their end")


def _total(counts: list[dict[str, Any]], kind: str) -> int:
    return sum(item[kind]["duplicates"] for item in counts)
