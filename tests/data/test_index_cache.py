"""The cache of a dataset's group totals: never wrong, whatever happens to the files, the processes and the data."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from engine import _index
from engine.data import index_cache
from engine.data.index_cache import IndexCache, default_folder
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter
from engine.data.samples import GROUP, SampleIndex, group_tokens
from engine.errors import UserError

SIZES = np.random.default_rng(0).integers(0, 60, 3 * GROUP + 5)


def write(prefix: Path, sizes) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, 1000) as writer:
        writer.add_documents(np.arange(np.sum(sizes)) % 1000, np.array(sizes))
    return IndexedDataset(prefix)


def totals_of(dataset, folder) -> list[int]:
    return group_tokens(dataset, IndexCache(folder)).tolist()


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.groups"))


def count_builds(monkeypatch) -> list[int]:
    """Grows by one whenever the lengths are gone through."""
    builds, load = [], IndexCache.load_or_build

    def counted(self, name, key, length, build):
        return load(self, name, key, length, lambda: builds.append(length) or build())

    monkeypatch.setattr(IndexCache, "load_or_build", counted)
    return builds


def test_the_cache_is_used_and_equals_what_is_built(tmp_path, monkeypatch):
    dataset, builds = write(tmp_path / "train", SIZES), count_builds(monkeypatch)
    fresh = totals_of(dataset, None)
    assert fresh == [int(SIZES[g::4].sum()) for g in range(4)]
    assert totals_of(dataset, tmp_path / "cache") == fresh
    assert totals_of(dataset, tmp_path / "cache") == fresh
    assert builds == [4, 4]  # once without a cache, once with
    (file,) = cache_files(tmp_path / "cache")
    assert file.stat().st_size < 300, "8 bytes for 512 documents, and a header"


def test_the_cache_serves_every_seed_length_and_epoch(tmp_path):
    dataset = write(tmp_path / "train", SIZES)
    for seed, seq_length in ((3, 8), (4, 8), (3, 9), (-1, 8)):
        cached, fresh = (SampleIndex(dataset, seq_length, seed, IndexCache(at)) for at in (tmp_path / "c", None))
        turns = np.arange(3 * fresh.blocks_per_epoch)
        np.testing.assert_array_equal(cached.locate(turns), fresh.locate(turns))
        np.testing.assert_array_equal(cached.order.starts(2, turns[:99]), fresh.order.starts(2, turns[:99]))
    assert len(cache_files(tmp_path / "c")) == 1


def test_a_rewritten_dataset_at_the_same_path_gets_its_own_file(tmp_path):
    totals_of(write(tmp_path / "train", SIZES), tmp_path / "cache")
    for sizes in (SIZES[::-1], [*SIZES, 9]):
        dataset = write(tmp_path / "train", sizes)
        assert totals_of(dataset, tmp_path / "cache") == totals_of(dataset, None)
    assert len(cache_files(tmp_path / "cache")) == 3


def test_damaged_cache_files_are_never_used(tmp_path, caplog):
    dataset, folder = write(tmp_path / "train", SIZES), tmp_path / "cache"
    fresh = totals_of(dataset, folder)
    (file,) = cache_files(folder)
    whole = file.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 39, 64, len(whole) // 2, len(whole) - 8, len(whole) - 1)]
    damaged += [whole + bytes(8), bytes(len(whole)), whole[:40].ljust(len(whole), b"\0")]
    for bit in np.random.default_rng(0).choice(8 * len(whole), 60, replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        caplog.clear()
        assert totals_of(dataset, folder) == fresh
        assert str(file) in caplog.text
        assert file.read_bytes() == whole


def test_a_file_of_another_key_under_this_name_is_not_used(tmp_path):
    dataset, folder = write(tmp_path / "train", SIZES), tmp_path / "cache"
    totals_of(dataset, folder)
    other = write(tmp_path / "other", SIZES[::-1])
    (file,) = cache_files(folder)
    file.rename(folder / file.name.replace(dataset.fingerprint[:16], other.fingerprint[:16]))
    assert totals_of(other, folder) == totals_of(other, None) != totals_of(dataset, None)


def test_a_failed_write_leaves_nothing_and_the_order_is_right(tmp_path, monkeypatch, caplog):
    dataset = write(tmp_path / "train", SIZES)
    fresh = totals_of(dataset, None)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.os, "fsync", full)
    assert totals_of(dataset, tmp_path / "cache") == fresh
    assert "No space left on device" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(UserError, match=r"cannot write the index cache: No space left on device.*data\.cache_dir"):
        SampleIndex(dataset, 8, 3, IndexCache(tmp_path / "cache", required=True))


def test_old_leftovers_of_killed_processes_are_removed(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("old.groups.1.tmp", "old.verified.1.tmp"):
        (folder / name).write_text("x")
        os.utime(folder / name, (time.time() - 7200,) * 2)
    (folder / "new.groups.2.tmp").write_text("being written")
    totals_of(write(tmp_path / "train", SIZES), folder)
    assert [path.name for path in folder.glob("*.tmp")] == ["new.groups.2.tmp"]


def test_what_others_keep_in_the_folder_stays(tmp_path):
    """data.cache_dir may be /tmp."""
    for name in ("theirs.tmp", "a.groups.tmp", "groups.1.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.tmp").mkdir()
    (tmp_path / "old.groups.1.tmp").mkdir()  # cannot be removed, which is no reason not to write
    before = set(tmp_path.iterdir())
    for path in before:
        os.utime(path, (1, 1))
    group_tokens(write(tmp_path / "data" / "train", SIZES), IndexCache(tmp_path, required=True))
    assert before < set(tmp_path.iterdir())
    assert len(cache_files(tmp_path)) == 1


def test_a_lock_that_cannot_be_opened_costs_work_only(tmp_path):
    """Another user's, in a folder of a group."""
    (tmp_path / "cache" / ".lock").mkdir(parents=True)  # root may open every file
    dataset = write(tmp_path / "train", SIZES)
    assert group_tokens(dataset, IndexCache(tmp_path / "cache", required=True)).tolist() == totals_of(dataset, None)


def test_a_stopped_lock_holder_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "_LOCK_SECONDS", 0.1)
    (tmp_path / "cache").mkdir()
    dataset = write(tmp_path / "train", SIZES)
    with index_cache._lock(tmp_path / "cache"):
        assert totals_of(dataset, tmp_path / "cache") == totals_of(dataset, None)


def test_the_default_folder_is_beside_the_data_else_the_users(tmp_path, monkeypatch):
    assert default_folder(tmp_path) == tmp_path / "index_cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(index_cache.os, "access", lambda path, mode: False)  # root may write everywhere
    assert default_folder(tmp_path) == Path("/somewhere/mainspring/index_cache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder(tmp_path) == Path.home() / ".cache/mainspring/index_cache"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert default_folder(tmp_path) is None  # in memory, then


# ---- many processes, killed at any time (promise 14) -----------------------------------------------------------------


def cold_start(prefix, folder, barrier=None, results=None):
    """Opens, builds what is not there, reads some blocks of three epochs; what they are, as bytes."""
    if barrier is not None:
        barrier.wait()
    index = SampleIndex(IndexedDataset(prefix, remember=folder), 16, 3, IndexCache(folder))
    turns = np.arange(0, 3 * index.blocks_per_epoch, 97)
    tokens = np.empty((len(turns), 16), np.int64)
    pieces = np.stack([0 * turns, turns, 0 * turns, 0 * turns + 16, np.arange(len(turns)) * 16], axis=1)
    _index.gather([index.order], pieces, tokens, np.empty_like(tokens))
    if results is not None:
        results.put(tokens.tobytes())
    return tokens.tobytes()


@pytest.mark.parametrize("with_locks", [True, False])
def test_16_processes_starting_together_agree(tmp_path, monkeypatch, with_locks):
    monkeypatch.setattr(index_cache, "_LOCK_SECONDS", 60.0 if with_locks else 0.0)  # children are forked
    dataset, context = write(tmp_path / "train", SIZES), multiprocessing.get_context("fork")
    barrier, results = context.Barrier(16), context.Queue()
    args = (dataset.prefix, tmp_path / "cache", barrier, results)
    processes = [context.Process(target=cold_start, args=args) for _ in range(16)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert seen == {cold_start(dataset.prefix, None)}
    assert len(cache_files(tmp_path / "cache")) == 1
    assert list((tmp_path / "cache").glob("*.tmp")) == []


def test_50_cold_starts_with_kills_and_edits_never_read_a_partial_or_an_old_file(tmp_path):
    """Each round starts processes, kills them at random instants, sometimes edits the data; who is left is right."""
    context, folder, choose = multiprocessing.get_context("fork"), tmp_path / "cache", np.random.default_rng(0)
    dataset, expected = write(tmp_path / "train", SIZES), b""
    for cold in range(50):
        if cold % 10 == 0:
            dataset = write(tmp_path / "train", np.roll(SIZES, cold) + (cold == 40))
            expected = cold_start(dataset.prefix, None)
        if cold % 3 == 0:
            for file in folder.glob("*"):
                file.unlink()
        process = context.Process(target=cold_start, args=(dataset.prefix, folder))
        process.start()
        time.sleep(choose.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if cold % 2:
            assert cold_start(dataset.prefix, folder) == expected, cold


def _killed(prefix, folder, ready):
    def stop(_):
        ready.set()
        time.sleep(60)

    index_cache.os.fsync = stop  # the file is written but not renamed, and the lock is held
    SampleIndex(IndexedDataset(prefix), 8, 3, IndexCache(folder))


def test_a_kill_while_writing_blocks_nobody_and_is_not_read(tmp_path):
    dataset, context = write(tmp_path / "train", SIZES), multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_killed, args=(dataset.prefix, tmp_path / "cache", ready))
    process.start()
    assert ready.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list((tmp_path / "cache").glob("*.tmp"))) == 1
    begun = time.monotonic()
    assert totals_of(dataset, tmp_path / "cache") == totals_of(dataset, None)
    assert time.monotonic() - begun < 10
    assert len(cache_files(tmp_path / "cache")) == 1
