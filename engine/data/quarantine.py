"""What could not be read, and why: with file and row, counts by reason and samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

EXCERPT_CHARACTERS = 80
MAX_SAMPLES = 20


class Refused(Exception):
    """A file or row that holds nothing of use. ``excerpt``: how the row begins, where that helps to find it."""

    def __init__(self, reason: str, detail: str, fix: str = "Mend or remove it.", excerpt: bytes = b""):
        super().__init__(detail)
        self.reason, self.detail, self.fix = reason, detail, fix
        self.excerpt = excerpt[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")


class Quarantine:
    """What could not be read: every item as a line of ``stream``, counts by reason, the first few and the first of each
    reason as samples.

    A row is counted from 1 at the beginning of its file, but with ``start`` from that byte, where a piece of a large
    file begins (see `units.LineNumbers`).
    """

    def __init__(self, stream: TextIO, max_samples: int = MAX_SAMPLES):
        self.files = 0
        self.lines = 0
        self.reasons: Counter[str] = Counter()
        self.samples: list[dict] = []
        self._stream = stream
        self._max_samples = max_samples

    def add(
        self, path: str, line: int | None, reason: str, detail: str, excerpt: str = "", *, start: int = 0
    ) -> None:
        item: dict[str, Any] = {"file": path, "line": line, "reason": reason, "detail": detail, "excerpt": excerpt}
        if start and line is not None:
            item["start"] = start
        self.files += line is None
        self.lines += line is not None
        self.reasons[reason] += 1
        if len(self.samples) < self._max_samples or self.reasons[reason] == 1:
            self.samples.append(item)
        self._stream.write(json.dumps(item) + "\n")

    def as_manifest(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "lines": self.lines,
            "reasons": dict(sorted(self.reasons.items())),
            "samples": self.samples,
        }


def merged(parts: Iterable[Mapping[str, Any]], max_samples: int = MAX_SAMPLES) -> dict[str, Any]:
    """Several `Quarantine.as_manifest`, in order, as one quarantine of all of them would have it."""
    files = lines = 0
    reasons: Counter[str] = Counter()
    samples: list[dict] = []
    sampled: set[str] = set()
    for part in parts:
        files += part["files"]
        lines += part["lines"]
        reasons.update(part["reasons"])
        for item in part["samples"]:
            if len(samples) < max_samples or item["reason"] not in sampled:
                samples.append(item)
            sampled.add(item["reason"])
    return {"files": files, "lines": lines, "reasons": dict(sorted(reasons.items())), "samples": samples}
