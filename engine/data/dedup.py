"""Exact deduplication: the first document with a given content stays, in the order of the sources.

`ExactDedup` remembers what it saw. For more documents than memory holds, every unit leaves a sorted run of digests
(`write_run`), and `exact_duplicates` compares the runs of all units, a range of digests at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine import _dedup
from engine.errors import UserError

DIGEST_BYTES = 16  # of the SHA-256: 2^64 documents before a chance collision is likely

# A document that goes, and the one that stays for it: numbers of units, and of documents within them.
DUPLICATE = np.dtype([("unit", "u4"), ("doc", "u8"), ("first_unit", "u4"), ("first_doc", "u8")])

_EXACT_BYTES = 72  # a document of the range, while its part is compared: the records as they grow, and sorted


def content_digest(text_utf8: bytes) -> bytes:
    """The identity of a cleaned document: 16 bytes, a function of its text alone."""
    return hashlib.sha256(text_utf8).digest()[:DIGEST_BYTES]


def digest_words(digests: Iterable[bytes]) -> np.ndarray:
    """[documents, 2] uint64: results of `content_digest` as `write_run` takes them."""
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def write_run(path: Path, digests_n2: np.ndarray) -> None:
    """Write the digests of one unit, sorted, with checksums: 20 bytes a document.

    ``digests_n2`` [documents, 2] uint64; the row is the document's number in its unit. Raises OSError.
    """
    path.write_bytes(_dedup.run_bytes(np.ascontiguousarray(digests_n2, np.uint64)))


def duplicate_parts(runs: Sequence[Path], memory_mb: float = 256) -> int:
    """Into how many ranges the digests of ``runs`` are cut so that each is compared in about ``memory_mb`` MB.

    A function of the runs' sizes alone. Only a text that occurs millions of times takes more: 72 bytes an occurrence.
    """
    documents = sum(path.stat().st_size for path in runs) / 20
    return max(1, math.ceil(documents * _EXACT_BYTES / (memory_mb * 1e6)))


def exact_duplicates(runs: Sequence[Path], part: int = 0, parts: int = 1) -> np.ndarray:
    """Later copies among the documents of all units, of those whose digest lies in range ``part`` of ``parts``.

    ``runs[u]`` is what `write_run` left for unit u. The ranges together hold every digest once, so the results of all
    parts are disjoint, and together the same for any ``parts``. One run is open at a time.

    Returns:
        [duplicates] `DUPLICATE`, sorted by (unit, doc). The first document with a content, by (unit, doc), stays.

    Raises:
        UserError: a run is missing, damaged or cut off; it names the file.
    """
    return as_duplicates(from_files(_dedup.exact_duplicates, [str(path) for path in runs], part, parts))


def as_duplicates(rows_n4: np.ndarray) -> np.ndarray:
    """[n] `DUPLICATE` of [n, 4] uint32."""
    found = np.empty(len(rows_n4), DUPLICATE)
    for column, name in enumerate(DUPLICATE.names or ()):
        found[name] = rows_n4[:, column]
    return found


def from_files(read, *arguments):
    """``read(*arguments)`` of the extension, its complaint about a file as one line for a person."""
    try:
        return read(*arguments)
    except ValueError as error:
        if len(error.args) != 2:
            raise
        path, problem = error.args
        fix = "Delete it and run again: what is missing is made anew."
        raise UserError(problem, where=path, fix=fix) from None


class ExactDedup:
    """Remembers the digests seen. About 100 bytes of memory a document."""

    def __init__(self, max_samples: int = 5):
        self.duplicates = 0
        self.samples: list[dict[str, str]] = []
        self._max_samples = max_samples
        self._first: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._first)

    def add(self, digest: bytes, source: str) -> bool:
        """True if the content is new; otherwise counted, with the first few pairs kept as samples."""
        first = self._first.get(digest)
        if first is None:
            self._first[digest] = source
            return True
        self.duplicates += 1
        if len(self.samples) < self._max_samples:
            self.samples.append({"dropped": source, "same_as": first})
        return False
