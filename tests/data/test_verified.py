"""Checks of files that are spared because they were made before: only where the file is surely the same."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from engine.data import indexed
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter, shard_name
from engine.errors import UserError

SIZES = [100, 0, 200]


def write(prefix: Path) -> Path:
    with IndexedDatasetWriter(prefix, 1000) as writer:
        writer.add_documents(np.arange(300), np.array(SIZES))
    return prefix


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files that are read in full; and the files lie there for three seconds by the time of their check."""
    found, sha256 = [], indexed._sha256
    monkeypatch.setattr(indexed, "_sha256", lambda map: found.append(len(map)) or sha256(map))
    monkeypatch.setattr(indexed, "now_ns", lambda: time.time_ns() + 3 * 10**9)
    return found


def edited(path: Path, offset: int, flip: int = 1) -> None:
    """Another byte in a file of the same size and modification time."""
    time.sleep(0.02)  # more than a tick of the file system's clock
    before, content = path.stat(), bytearray(path.read_bytes())
    content[offset] ^= flip
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_file_is_checked_once(tmp_path, hashed):
    prefix = write(tmp_path / "train")
    opened = [IndexedDataset(prefix, remember=tmp_path / "cache") for _ in range(3)]
    assert len(hashed) == 1
    assert [(one.num_tokens, one.fingerprint) for one in opened] == [(300, opened[0].pairs[0].fingerprint)] * 3
    assert opened[2].fingerprint == hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    content = hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    assert [one.bin_sha256() for one in opened] == [[content]] * 3
    IndexedDataset(prefix, remember=tmp_path / "cache").bin_sha256()
    assert len(hashed) == 4, "the .bin once for each that was opened before it was known, then no more"
    IndexedDataset(prefix)
    assert len(hashed) == 5, "nothing is remembered without a folder"


def test_an_edit_of_the_same_size_and_time_is_seen(tmp_path, hashed):
    prefix = write(tmp_path / "train")
    IndexedDataset(prefix, remember=tmp_path / "cache").bin_sha256()
    edited(tmp_path / "train.bin", 7)
    found = IndexedDataset(prefix, remember=tmp_path / "cache").bin_sha256()
    assert found == [hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()]
    edited(tmp_path / "train.idx", 34)
    with pytest.raises(UserError, match=r"train\.idx: damaged index: document 1 points to byte"):
        IndexedDataset(prefix, remember=tmp_path / "cache")


def test_a_file_that_took_the_place_of_another_is_checked(tmp_path, hashed):
    prefix, path = write(tmp_path / "train"), tmp_path / "train.idx"
    IndexedDataset(prefix, remember=tmp_path / "cache")
    edited(tmp_path.joinpath(write(tmp_path / "other").name + ".idx"), 34)
    os.utime(tmp_path / "other.idx", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(tmp_path / "other.idx", path)
    with pytest.raises(UserError, match=r"train\.idx: damaged index"):
        IndexedDataset(prefix, remember=tmp_path / "cache")


def test_a_known_index_does_not_vouch_for_its_bin(tmp_path, hashed):
    prefix = write(tmp_path / "train")
    IndexedDataset(prefix, remember=tmp_path / "cache")
    os.truncate(tmp_path / "train.bin", 598)
    with pytest.raises(UserError, match=r"train\.bin: truncated: 598 bytes"):
        IndexedDataset(prefix, remember=tmp_path / "cache")


def test_a_file_that_was_just_written_is_not_trusted(tmp_path, hashed, monkeypatch):
    """A write in the same tick of the clock as the check would show nowhere."""
    prefix = write(tmp_path / "train")
    written = (tmp_path / "train.idx").stat().st_ctime_ns
    for times, seconds in enumerate((1.5, 2.0, 2.1, 2.1), 1):
        monkeypatch.setattr(indexed, "now_ns", functools.partial(int, written + int(seconds * 10**9)))
        IndexedDataset(prefix, remember=tmp_path / "cache")
        assert len(hashed) == min(times, 3)


def test_a_file_that_changes_while_it_is_checked_is_not_trusted(tmp_path, hashed, monkeypatch):
    prefix, sha256 = write(tmp_path / "train"), indexed._sha256

    def slow(map):
        found = sha256(map)
        edited(tmp_path / "train.idx", 34)
        return found

    monkeypatch.setattr(indexed, "_sha256", slow)
    IndexedDataset(prefix, remember=tmp_path / "cache")  # as it was
    monkeypatch.setattr(indexed, "_sha256", sha256)
    with pytest.raises(UserError, match="damaged index"):
        IndexedDataset(prefix, remember=tmp_path / "cache")


def test_only_the_new_shards_are_checked(tmp_path, hashed):
    for number in range(3):
        write(tmp_path / shard_name("train", number, 3))
    whole = IndexedDataset(tmp_path / "train", remember=tmp_path / "cache")
    assert len(hashed) == 3
    edited(tmp_path / "train-00001-of-00003.idx", 0, flip=0)
    again = IndexedDataset(tmp_path / "train", remember=tmp_path / "cache")
    assert len(hashed) == 4
    assert (again.fingerprint, again.num_tokens) == (whole.fingerprint, 900)


def test_what_is_remembered_is_held_against_its_own_hash(tmp_path, hashed):
    prefix = write(tmp_path / "train")
    IndexedDataset(prefix, remember=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_text()
    assert whole.replace("300", "301") != whole
    hashes = [whole.replace("300", "301"), whole[:-9], "", "[]", "null", '{"sha256": 1, "files": 2}', "[" * 100_000]
    for times, content in enumerate(hashes, 2):
        file.write_text(content)
        assert IndexedDataset(prefix, remember=tmp_path / "cache").num_tokens == 300
        assert len(hashed) == times
        assert json.loads(file.read_text()) == json.loads(whole)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, hashed):
    (tmp_path / "cache").write_text("in the way")
    prefix = write(tmp_path / "train")
    assert [len(IndexedDataset(prefix, remember=tmp_path / "cache")) for _ in range(2)] == [3, 3]
    assert len(hashed) == 2
