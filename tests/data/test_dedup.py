"""The first of equal documents stays; runs compared on disk find what a dictionary finds, in any number of parts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _dedup
from engine.data.dedup import (
    DUPLICATE,
    ExactDedup,
    content_digest,
    digest_words,
    duplicate_parts,
    exact_duplicates,
    write_run,
)
from engine.errors import UserError


def test_digest_is_the_head_of_sha256():
    assert content_digest(b"text") == hashlib.sha256(b"text").digest()[:16]
    assert content_digest(b"text") != content_digest(b"text ")
    words_n2 = digest_words([content_digest(b"text"), content_digest(b"b")])
    assert words_n2.tobytes() == content_digest(b"text") + content_digest(b"b")
    assert words_n2.shape == (2, 2)
    assert digest_words([]).shape == (0, 2)


def test_first_stays_and_pairs_are_named():
    dedup = ExactDedup(max_samples=2)
    documents = [(b"a", "f1"), (b"b", "f2"), (b"a", "f3"), (b"a", "f4"), (b"b", "f5"), (b"c", "f6"), (b"c", "f6")]
    kept = [source for text, source in documents if dedup.add(content_digest(text), source)]
    assert kept == ["f1", "f2", "f6"]
    assert (len(dedup), dedup.duplicates) == (3, 4)
    assert dedup.samples == [{"dropped": "f3", "same_as": "f1"}, {"dropped": "f4", "same_as": "f1"}]


def plain(units: list[list[tuple[int, int]]]) -> list[tuple[int, int, int, int]]:
    """Later copies by a dictionary."""
    first: dict[tuple[int, int], tuple[int, int]] = {}
    found = []
    for unit, digests in enumerate(units):
        for doc, digest in enumerate(digests):
            if digest in first:
                found.append((unit, doc, *first[digest]))
            else:
                first[digest] = (unit, doc)
    return found


def write(folder, units) -> list:
    runs = [folder / f"{unit}.run" for unit in range(len(units))]
    for path, digests in zip(runs, units, strict=True):
        write_run(path, np.array(digests, np.uint64).reshape(-1, 2))
    return runs


# Few values and the ends of the range, so that copies and the borders of parts meet; a half that differs alone.
WORDS = st.sampled_from([0, 1, 2**32, 2**63 - 1, 2**63, 2**64 // 3, 2**64 - 2, 2**64 - 1]) | st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(units=st.lists(st.lists(st.tuples(WORDS, st.integers(0, 1)), max_size=40), max_size=5),
       parts=st.sampled_from([1, 2, 3, 4, 7, 1000]))  # fmt: skip
def test_finds_what_a_dictionary_finds(units, parts, tmp_path_factory):
    runs = write(tmp_path_factory.mktemp("runs"), units)
    found = [exact_duplicates(runs, part, parts) for part in range(parts)]
    for each in found:
        assert each.tolist() == sorted(each.tolist())
    assert sorted(row for each in found for row in each.tolist()) == plain(units)


@pytest.mark.parametrize("copies", [1, 3])
def test_many_blocks(tmp_path, copies):
    rng = np.random.default_rng(copies)
    pool = rng.integers(0, 2**64, (4000, 2), dtype=np.uint64)
    pool[:500, 0] = 2**63  # one first word over several blocks
    units = [pool[rng.integers(0, len(pool), size)] for size in (0, 1, 127, 128, 129, 3000 * copies)]
    units.append(np.repeat(pool[:2], 700, axis=0))  # one digest over several blocks
    runs = write(tmp_path, units)
    expected = plain([[tuple(row) for row in unit.tolist()] for unit in units])
    assert exact_duplicates(runs).tolist() == expected
    for parts in (2, 5):
        found = np.concatenate([exact_duplicates(runs, part, parts) for part in range(parts)])
        assert np.sort(found, order=["unit", "doc"]).tolist() == expected
        assert found.dtype == DUPLICATE


def test_equal_contents_make_equal_files(tmp_path):
    digests_n2 = np.random.default_rng(0).integers(0, 9, (300, 2), dtype=np.uint64)
    write_run(tmp_path / "a", digests_n2)
    write_run(tmp_path / "b", np.asfortranarray(digests_n2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert _dedup.header(str(tmp_path / "a"))["records"] == 300


def test_parts_follow_from_the_size(tmp_path):
    runs = write(tmp_path, [[(i, 0) for i in range(5000)], []])
    assert duplicate_parts(runs) == 1
    assert duplicate_parts(runs, memory_mb=0.1) == 4  # 72 bytes each, and the file has a little more than documents
    assert duplicate_parts([]) == 1
    assert exact_duplicates([]).tolist() == []


def test_every_damage_is_found_and_named(tmp_path):
    runs = write(tmp_path, [[(i * 2**50, i) for i in range(400)], [(5, 5)]])
    whole = runs[0].read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(0, 80, 3), 80, 2640, 2648, len(whole) - 1, *rng.integers(80, len(whole), 100)]:
        runs[0].write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        with pytest.raises(UserError, match=rf"^{runs[0]}: .*Delete it"):
            exact_duplicates(runs)
    for size in (0, 5, 79, 80, 81, 1000, len(whole) - 1):
        runs[0].write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"^{runs[0]}: has {size} bytes"):
            exact_duplicates(runs)
    runs[0].write_bytes(whole + b"0")
    with pytest.raises(UserError, match=f"has {len(whole) + 1} bytes, its header says {len(whole)}"):
        exact_duplicates(runs)
    runs[0].unlink()
    with pytest.raises(UserError, match=rf"^{runs[0]}: cannot be opened"):
        exact_duplicates(runs)


def test_blocks_that_changed_places_are_found(tmp_path):
    runs = write(tmp_path, [[(i, i) for i in range(300)]])
    whole = runs[0].read_bytes()
    block = 128 * 20 + 8
    first, second = whole[80 : 80 + block], whole[80 + block : 80 + 2 * block]
    runs[0].write_bytes(whole[:80] + second + first + whole[80 + 2 * block :])
    with pytest.raises(UserError, match="is damaged in block 0"):
        exact_duplicates(runs)


@pytest.mark.parametrize("wrong", [(1, 1), (0, 0), (5, 3)])
def test_part_must_be_below_parts(tmp_path, wrong):
    with pytest.raises(ValueError, match="part must be below parts"):
        exact_duplicates(write(tmp_path, [[(1, 1)]]), *wrong)


def test_digests_have_two_words(tmp_path):
    with pytest.raises(ValueError, match=r"\[documents, 2\]"):
        write_run(tmp_path / "run", np.zeros((3, 3), np.uint64))
