"""What goes as near-duplicate, against all pairs compared in Python; the same wherever the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _dedup
from engine.config.near_dedup import NearDedupConfig, best_split
from engine.data.near_dedup import (
    Signer,
    near_clusters,
    near_duplicates,
    near_parts,
    write_pairs,
    write_signatures,
)
from engine.errors import UserError

SMALL = NearDedupConfig(permutations=16, bands=4, rows=2, threshold=0.7, shingle_words=2)


def write(folder, signatures, cuts, config=SMALL) -> list:
    """Units of a corpus cut at ``cuts``."""
    files = []
    for unit, rows in enumerate(np.split(signatures, cuts)):
        files.append(folder / f"{unit}.signatures")
        write_signatures(files[-1], np.ascontiguousarray(rows), config)
    return files


def numbers(found, cuts) -> list[tuple[int, int]]:
    """(document, the one that stays) as numbers in the whole corpus."""
    starts = np.array([0, *cuts])
    return list(zip((starts[found["unit"]] + found["doc"].astype(int)).tolist(),
                    (starts[found["first_unit"]] + found["first_doc"].astype(int)).tolist(), strict=True))  # fmt: skip


def alike(one, other, config) -> bool:
    """By the byte that the files keep of each number; of numbers that differ one of 256 has the same."""
    equal = (one * np.uint32(0x9E3779B1) >> 24) == (other * np.uint32(0x9E3779B1) >> 24)
    return equal.mean() >= config.threshold + (1 - config.threshold) / 256 - 1e-6


def plain(signatures, config, kept=None) -> list[tuple[int, int]]:
    """Every pair that shares a band and is alike enough; of these, in order, who goes and for whom."""
    bands, rows = config.split
    stays: list[int] = []
    found = []
    for later, mine in enumerate(signatures):
        if (kept is not None and not kept[later]) or (mine == 2**32 - 1).all():
            continue
        for earlier in stays:
            equal = mine == signatures[earlier]
            if alike(mine, signatures[earlier], config) and equal[: bands * rows].reshape(bands, rows).all(1).any():
                found.append((later, earlier))
                break
        else:
            stays.append(later)
    return found


def variants(rng, count, originals, permutations=16, change=0.2) -> np.ndarray:
    """Signatures of documents that resemble one of ``originals`` more or less."""
    pool = rng.integers(0, 2**32 - 1, (originals, permutations), dtype=np.uint32)
    mine = pool[rng.integers(0, originals, count)]
    changed = rng.random(mine.shape) < change * rng.random((count, 1))
    return np.where(changed, rng.integers(0, 2**32 - 1, mine.shape, dtype=np.uint32), mine)


@pytest.mark.parametrize("seed", range(12))
def test_finds_what_all_pairs_find_wherever_the_units_end(tmp_path, seed):
    rng = np.random.default_rng(seed)
    signatures = variants(rng, 160, 60)
    signatures[rng.integers(0, 160, 8)] = 2**32 - 1
    kept = rng.random(160) < 0.9
    expected = {True: plain(signatures, SMALL, kept), False: plain(signatures, SMALL)}
    assert 20 < len(expected[False]) < 120
    for cuts in ([], [50, 50, 51, 130]):
        files = write(tmp_path, signatures, cuts)
        masks = np.split(kept, cuts)
        for keep in (None, masks.__getitem__):
            for threads, memory in ((1, 256), (3, 0.003)):
                assert near_parts(files, SMALL, 256) == 1
                assert 3 <= near_parts(files, SMALL, 0.003) <= 6
                found = near_duplicates(files, SMALL, keep=keep, threads=threads, memory_mb=memory, folder=tmp_path)
                assert numbers(found, cuts) == expected[keep is not None]


@pytest.mark.parametrize(("count", "originals"), [(40, 1), (600, 2), (1500, 3)])
def test_keys_of_many_documents(tmp_path, count, originals):
    """Beyond 64 of a key not all pairs are compared: what goes resembles what stays, and most of it goes."""
    rng = np.random.default_rng(count)
    signatures = variants(rng, count, originals, change=0.3)
    found = numbers(near_duplicates(write(tmp_path, signatures, [count // 3]), SMALL), [count // 3])
    gone = dict(found)
    assert len(gone) == len(found)
    for later, earlier in found:
        assert earlier < later
        assert earlier not in gone
        assert alike(signatures[later], signatures[earlier], SMALL)
    assert len(found) >= 0.9 * len(plain(signatures, SMALL))


def test_copies_go_however_many_documents_share_their_key(tmp_path):
    """Unlike ones, far more than are compared with each other, each three times; and the pairs stay few."""
    rng = np.random.default_rng(3)
    config = NearDedupConfig(permutations=16, bands=4, rows=2, threshold=0.9)
    signatures = rng.integers(0, 2**32 - 1, (300, 16), dtype=np.uint32)
    signatures[:, :8] = 7
    files = write(tmp_path, np.concatenate([signatures, signatures, signatures]), [450], config)
    found = dict(numbers(near_duplicates(files, config), [450]))
    assert found == {doc: doc % 300 for doc in range(300, 900)}
    write_pairs(tmp_path / "pairs", files, config, 0)
    assert _dedup.header(str(tmp_path / "pairs"))["records"] == 600


def test_one_text_a_thousand_times_is_a_thousand_pairs(tmp_path):
    rng = np.random.default_rng(4)
    same = write(tmp_path, np.zeros((1000, 16), np.uint32), [])
    write_pairs(tmp_path / "pairs", same, SMALL, 0)
    assert _dedup.header(str(tmp_path / "pairs"))["records"] == 999
    family = write(tmp_path, variants(rng, 1000, 1, change=0.1), [])
    write_pairs(tmp_path / "pairs", family, SMALL, 0)
    assert _dedup.header(str(tmp_path / "pairs"))["records"] <= 8 * 1000


def test_a_key_with_more_documents_than_are_read_at_once(tmp_path):
    signatures = np.zeros((70_000, 16), np.uint32)
    signatures[1::2, 8:] = 1  # two kinds that share the first four bands, and are half alike
    files = write(tmp_path, signatures, [69_000])
    found = numbers(near_duplicates(files, SMALL), [69_000])
    assert found == [(doc, doc % 2) for doc in range(2, 70_000)]


def test_likeness_is_not_handed_on(tmp_path):
    """a like b like c, but a not like c: b goes for a, and c stays, since b is no longer there."""
    a = np.arange(16, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    b[12:] = 77
    c[8:] = 77
    files = write(tmp_path, np.stack([a, b, c]), [1, 2])
    assert numbers(near_duplicates(files, SMALL), [1, 2]) == [(1, 0)]
    for band in range(4):
        write_pairs(tmp_path / f"{band}", files, SMALL, band)
    pairs = [_dedup.header(str(tmp_path / f"{band}"))["records"] for band in range(4)]
    assert pairs == [2, 0, 0, 0]  # (b, a) and (c, b), in the first band that they share


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=120), st.integers(1, 9), st.integers(1, 50))
def test_clusters_in_pieces(tmp_path_factory, drawn, files, at_once):
    """From several files of pairs, few in memory at once: as with all of them in one list."""
    folder = tmp_path_factory.mktemp("pairs")
    edges = sorted({(max(pair), min(pair)) for pair in drawn if pair[0] != pair[1]})
    places = [(number // 3, number % 3) for number in range(41)]  # three documents a unit
    paths = [str(folder / str(number)) for number in range(files)]
    for number, path in enumerate(paths):
        rows = [(*places[later], *places[earlier]) for later, earlier in edges[number::files]]
        with open(path, "wb") as out:
            out.write(_dedup.pair_bytes(np.array(rows, np.uint32).reshape(-1, 4)))
    gone: dict[int, int] = {}
    for later, earlier in edges:
        if later not in gone and earlier not in gone:
            gone[later] = earlier
    expected = [(*places[later], *places[earlier]) for later, earlier in sorted(gone.items())]
    assert [tuple(row) for row in _dedup.clusters(paths, 14, at_once).tolist()] == expected


def test_every_damage_is_found_and_named(tmp_path):
    rng = np.random.default_rng(0)
    files = write(tmp_path, np.repeat(rng.integers(0, 9, (30, 16), dtype=np.uint32), 3, axis=0), [45])
    whole = files[0].read_bytes()
    for at in [*range(0, 80, 5), len(whole) - 1, *rng.integers(80, len(whole), 60)]:
        files[0].write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        with pytest.raises(UserError, match=rf"^{files[0]}: .*Delete it"):
            near_duplicates(files, SMALL)
    files[0].write_bytes(whole[:-9])
    with pytest.raises(UserError, match=rf"^{files[0]}: has {len(whole) - 9} bytes, its header says {len(whole)}"):
        near_duplicates(files, SMALL)
    files[0].write_bytes(whole)
    write_pairs(tmp_path / "pairs", files, SMALL, 0)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'pairs'}: is no file of signatures"):
        near_duplicates([tmp_path / "pairs"], SMALL)
    with pytest.raises(UserError, match="is no file of pairs"):
        near_clusters(files, 2)
    pairs = (tmp_path / "pairs").read_bytes()
    (tmp_path / "pairs").write_bytes(pairs[:-1] + bytes([pairs[-1] ^ 1]))
    with pytest.raises(UserError, match="has a damaged index"):
        near_clusters([tmp_path / "pairs"], 2)
    for wrong in ([[1, 0, 0, 0], [0, 5, 0, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]]):
        (tmp_path / "pairs").write_bytes(_dedup.pair_bytes(np.array(wrong, np.uint32)))
        with pytest.raises(UserError, match="is not sorted in block 0"):
            near_clusters([tmp_path / "pairs"], 2)


def test_signatures_of_other_settings_are_refused(tmp_path):
    files = write(tmp_path, np.zeros((3, 16), np.uint32), [1])
    for change in ({"seed": 2}, {"bands": 2}, {"rows": 3}, {"shingle_words": 3}):
        with pytest.raises(UserError, match=rf"^{files[0]}: was signed with other settings"):
            near_duplicates(files, SMALL.with_values(change))
    assert len(near_duplicates(files, SMALL.with_values({"threshold": 0.9}))) == 2


def test_calls_that_make_no_sense(tmp_path):
    files = write(tmp_path, np.zeros((3, 16), np.uint32), [1])
    with pytest.raises(TypeError, match="keep of unit 0 is not one bool for each of its 1 documents"):
        near_duplicates(files, SMALL, keep=lambda unit: np.ones(2, bool))
    with pytest.raises(ValueError, match="band 4 of 4"):
        write_pairs(tmp_path / "pairs", files, SMALL, 4)
    with pytest.raises(ValueError, match="do not fit the permutations"):
        _dedup.signature_bytes(np.zeros((1, 16), np.uint32), 4, 5, 0)
    assert near_duplicates([], SMALL).tolist() == []
    assert near_duplicates(write(tmp_path, np.zeros((0, 16), np.uint32), []), SMALL).tolist() == []


def test_texts_end_to_end(tmp_path):
    """Documents with some words changed go, unrelated and short ones stay, and where the units end does not matter."""
    rng = np.random.default_rng(5)
    config = NearDedupConfig()
    words = [f"w{number}" for number in range(5000)]
    texts, source = [], []
    for number in range(300):
        original = rng.choice(words, 200).tolist()
        for copy in range(rng.integers(1, 4)):
            mine = list(original)
            if copy:
                mine[rng.integers(200)] = "Änderung!"
            texts.append(" ".join(mine).capitalize() + "." * copy)
            source.append(number)
    texts += ["too short", "too short"]
    source += [-1, -2]
    order = rng.permutation(len(texts))
    texts, source = [texts[i] for i in order], [source[i] for i in order]
    signer = Signer(config)
    results = []
    for cuts in ([], [100, 333]):
        parts = np.split(np.array(texts, object), cuts)
        files = [tmp_path / f"{len(cuts)}.{unit}" for unit in range(len(parts))]
        for path, part in zip(files, parts, strict=True):
            write_signatures(path, signer.sign(list(part)), config)
            write_signatures(tmp_path / "threads", signer.sign(list(part), threads=3), config, threads=3)
            assert (tmp_path / "threads").read_bytes() == path.read_bytes()
        results.append(numbers(near_duplicates(files, config), cuts))
    assert results[0] == results[1]
    assert all(source[later] == source[earlier] for later, earlier in results[0])
    assert len(results[0]) == len(texts) - len(set(source))


def test_the_split_into_bands():
    """The weighted error by a fine integral, as datasketch has it: no split is better by more than the rule's grain."""
    grid = (np.arange(20_000) + 0.5) / 20_000

    def error(bands, rows, threshold):
        agree = 1 - (1 - grid**rows) ** bands
        return np.where(grid < threshold, 0.1 * agree, 0.9 * (1 - agree)).mean()

    for threshold, permutations in ((0.8, 128), (0.5, 64), (0.95, 16), (1.0, 32)):
        bands, rows = best_split(threshold, permutations)
        assert bands * rows <= permutations
        errors = [error(b, r, threshold) for r in range(1, permutations + 1) for b in range(1, permutations // r + 1)]
        assert error(bands, rows, threshold) <= min(errors) + 1e-4
    assert best_split(0.8, 128, 0.5) == (9, 13)  # what datasketch.MinHashLSH(0.8, 128) takes
    assert NearDedupConfig().split == (14, 9)
    assert NearDedupConfig(bands=16, rows=8).split == (16, 8)


@pytest.mark.parametrize(("fields", "line"), [
    ({"permutations": 100}, "permutations: 100 is no multiple of 16. Use 112"),
    ({"bands": 4}, "bands: is set without rows. Set both or none"),
    ({"rows": 4}, "rows: is set without bands. Set both or none"),
    ({"bands": 20, "rows": 8}, "bands: 20 bands of 8 rows need 160 permutations. Use 16 at most"),
    ({"threshold": 1.5}, "threshold: got 1.5"),
    ({"shingle_words": 0}, "shingle_words: got 0"),
])  # fmt: skip
def test_contradictions_are_refused(fields, line):
    with pytest.raises(UserError, match=line):
        NearDedupConfig(**fields)
