"""The first of equal documents stays; the digest is of the text alone."""

from __future__ import annotations

import hashlib

from engine.data.dedup import ExactDedup, content_digest


def test_digest_is_the_head_of_sha256():
    assert content_digest(b"text") == hashlib.sha256(b"text").digest()[:16]
    assert content_digest(b"text") != content_digest(b"text ")


def test_first_stays_and_pairs_are_named():
    dedup = ExactDedup(max_samples=2)
    documents = [(b"a", "f1"), (b"b", "f2"), (b"a", "f3"), (b"a", "f4"), (b"b", "f5"), (b"c", "f6"), (b"c", "f6")]
    kept = [source for text, source in documents if dedup.add(content_digest(text), source)]
    assert kept == ["f1", "f2", "f6"]
    assert (len(dedup), dedup.duplicates) == (3, 4)
    assert dedup.samples == [{"dropped": "f3", "same_as": "f1"}, {"dropped": "f4", "same_as": "f1"}]
