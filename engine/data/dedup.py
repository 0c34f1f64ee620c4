"""Exact deduplication: the first document with a given content stays, in the order of the sources."""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 16  # of the SHA-256: 2^64 documents before a chance collision is likely


def content_digest(text_utf8: bytes) -> bytes:
    """The identity of a cleaned document: 16 bytes, a function of its text alone."""
    return hashlib.sha256(text_utf8).digest()[:DIGEST_BYTES]


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
