"""Sample order against naive Python: the random numbers, the cut into blocks, and the cache on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import _index
from engine.data import index_cache
from engine.data.index_cache import IndexCache, default_folder
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter
from engine.data.samples import SampleIndex
from engine.errors import UserError

MASK = 2**64 - 1
lengths = st.lists(st.one_of(st.just(0), st.just(1), st.integers(2, 40)), min_size=1, max_size=25)
same_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(prefix: Path, sizes) -> IndexedDataset:
    """Documents with these lengths whose tokens count on from one to the next, so every token is unique."""
    first = 0
    with IndexedDatasetWriter(prefix, 10**6) as writer:
        for size in sizes:
            writer.add_document(np.arange(first, first + size))
            first += size
    return IndexedDataset(prefix)


def block_tokens(index: SampleIndex, epoch: int, block: int) -> list[int]:
    """The S + 1 tokens of a block, through the compiled reader."""
    tokens, labels = np.empty(index.seq_length, np.int64), np.empty(index.seq_length, np.int64)
    index.read(np.array([epoch]), np.array([block]), np.array([[0, index.seq_length, 0]]), tokens, labels)
    assert tokens[1:].tolist() == labels[:-1].tolist()
    return [*tokens.tolist(), int(labels[-1])]


# ---- the documented random numbers, on Python's integers ------------------------------------------------------------


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def naive_shuffle(count, seed, epoch, purpose):
    golden = 0x9E3779B97F4A7C15
    state = mix((seed + golden) & MASK)
    for word in (epoch, purpose):
        state = mix(((state ^ word) + golden) & MASK)

    def below(bound):
        nonlocal state
        while True:
            state = (state + golden) & MASK
            product = mix(state) * bound
            if product & MASK >= 2**64 % bound:
                return product >> 64

    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = below(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, MASK), st.integers(0, MASK), st.integers(0, 1))
def test_the_shuffle_is_the_documented_one(count, seed, epoch, purpose):
    assert _index.shuffled(count, seed, epoch, purpose).tolist() == naive_shuffle(count, seed, epoch, purpose)


def test_the_order_is_the_same_for_ever_and_everywhere():
    assert _index.shuffled(10, 1234, 0, 0).tolist() == [6, 3, 9, 1, 4, 8, 7, 0, 5, 2]
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0


def test_shuffles_are_uniform_permutations():
    counts = {}
    for seed in range(12_000):
        key = tuple(_index.shuffled(4, seed, 0, 0).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    chi_squared = sum((n - 500) ** 2 / 500 for n in counts.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, one in a thousand
    assert sorted(_index.shuffled(100_000, 5, 0, 0)) == list(range(100_000))


def test_seed_epoch_and_purpose_all_count():
    orders = {tuple(_index.shuffled(50, *key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]}
    assert len(orders) == 5


# ---- blocks ---------------------------------------------------------------------------------------------------------


@same_folder
@given(sizes=lengths, seq_length=st.integers(1, 30), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_blocks_are_the_naive_cut_of_the_shuffled_documents(tmp_path, sizes, seq_length, seed, epoch):
    dataset = write(tmp_path / "train", sizes)
    if dataset.num_tokens <= seq_length:
        with pytest.raises(UserError, match=r"tokens are less than one sample|the dataset is empty"):
            SampleIndex(dataset, seq_length, seed, IndexCache(None))
        return
    index = SampleIndex(dataset, seq_length, seed, IndexCache(None))
    row = [int(t) for document in naive_shuffle(len(sizes), seed, epoch, 0) for t in dataset[document]]
    expected = [row[b : b + seq_length + 1] for b in range(0, len(row) - seq_length, seq_length)]
    assert index.blocks_per_epoch == len(expected)
    assert [block_tokens(index, epoch, b) for b in range(len(expected))] == expected
    turns = np.arange(len(expected)) + epoch * len(expected)
    epochs, blocks = index.locate(turns)
    assert epochs.tolist() == [epoch] * len(expected)
    assert blocks.tolist() == naive_shuffle(len(expected), seed, epoch, 1)


def test_every_block_comes_once_an_epoch_and_epochs_differ(tmp_path):
    index = SampleIndex(write(tmp_path / "train", [30, 0, 1, 55, 200, 7]), 8, 3, IndexCache(None))
    assert index.blocks_per_epoch == (293 - 1) // 8
    epochs, blocks = index.locate(np.arange(3 * index.blocks_per_epoch))
    orders = []
    for epoch in range(3):
        orders.append(blocks[epochs == epoch].tolist())
        assert sorted(orders[-1]) == list(range(index.blocks_per_epoch))
        labelled = [t for block in orders[-1] for t in block_tokens(index, epoch, block)[1:]]
        assert len(set(labelled)) == len(labelled) == 8 * index.blocks_per_epoch
    assert orders[0] != orders[1] != orders[2]
    assert index.epoch(0).order_n.tolist() != index.epoch(1).order_n.tolist()


def test_offsets_pass_32_bits():
    """Five documents of 2^30 tokens: the row is longer than 2^32, and no memory is needed to index it."""
    sizes, order = np.full(5, 2**30, np.int32), np.array([4, 2, 0, 1, 3])
    starts = _index.sample_starts(sizes, order, 2**31 - 8, 3)
    assert starts.tolist() == [[0, 0], [1, 2**30 - 8], [3, 2**30 - 16]]
    data = _index.index_bytes(sizes, 4)
    assert _index.parse_index(data)[3] == 5 * 2**30
    assert np.frombuffer(data, "<i8", 5, 34 + 20).tolist() == [i * 2**32 for i in range(5)]


def test_asking_past_the_end_is_an_error_not_a_crash(tmp_path):
    dataset, out = write(tmp_path / "train", [5, 5]), np.empty(4, np.int64)
    with pytest.raises(IndexError, match="past the last token"):
        _index.sample_starts(dataset.sizes, np.array([0, 1]), 5, 3)
    with pytest.raises(IndexError, match="names no document"):
        _index.sample_starts(dataset.sizes, np.array([0, 2]), 5, 2)
    for piece in ([0, 7, 3, 0], [0, 0, 5, 0], [0, 0, 3, 2], [-1, 0, 1, 0], [0, -1, 1, 0], [0, 0, 0, 0], [2, 0, 1, 0],
                  [0, 0, 1, -1], [0, 0, 2**62, 0]):
        with pytest.raises(IndexError):
            dataset.gather(None, np.array([piece]), out, out.copy())
    assert dataset.gather(None, np.array([[0, 6, 3, 0]]), out, out.copy()) == (6, 9)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([], "the dataset is empty (0 tokens)"), ([0, 0], "the dataset is empty (0 tokens)"), ([1], "1 tokens are less"),
     ([5, 3], "8 tokens are less than one sample of 9 (model.seq_length + 1). Add data, or set model.seq_length to 7")],
)
def test_too_little_data_says_how_much_there_is_and_what_to_do(tmp_path, sizes, said):
    with pytest.raises(UserError) as caught:
        SampleIndex(write(tmp_path / "train", sizes), 8, 0, IndexCache(None))
    assert said in str(caught.value)
    assert str(tmp_path / "train.bin") in str(caught.value)


def test_only_a_few_epochs_are_held(tmp_path):
    index = SampleIndex(write(tmp_path / "train", [50]), 8, 0, IndexCache(tmp_path / "cache"))
    first = index.epoch(0)
    for epoch in range(10):
        index.epoch(epoch)
    assert list(index._held) == [7, 8, 9]
    assert index.epoch(0).blocks_k.tolist() == first.blocks_k.tolist()


# ---- the cache ------------------------------------------------------------------------------------------------------

SIZES = [30, 0, 1, 55, 200, 7]


def order_of(dataset, cache_folder, seed=3, seq_length=8):
    epoch = SampleIndex(dataset, seq_length, seed, IndexCache(cache_folder)).epoch(0)
    return [epoch.order_n.tolist(), epoch.starts_k2.tolist(), epoch.blocks_k.tolist()]


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.samples"))


def count_builds(monkeypatch) -> list[int]:
    builds, build = [], SampleIndex._build
    monkeypatch.setattr(SampleIndex, "_build", lambda self, epoch: builds.append(epoch) or build(self, epoch))
    return builds


def test_the_cache_is_used_and_equals_what_is_built(tmp_path, monkeypatch):
    dataset, builds = write(tmp_path / "train", SIZES), count_builds(monkeypatch)
    fresh = order_of(dataset, None)
    assert order_of(dataset, tmp_path / "cache") == fresh
    assert order_of(dataset, tmp_path / "cache") == fresh
    assert builds == [0, 0]  # once without a cache, once with
    assert len(cache_files(tmp_path / "cache")) == 1


def test_every_part_of_the_key_has_its_own_file(tmp_path):
    dataset = write(tmp_path / "train", SIZES)
    for seed, seq_length in ((3, 8), (4, 8), (3, 9), (-1, 8)):
        assert order_of(dataset, tmp_path / "c", seed, seq_length) == order_of(dataset, None, seed, seq_length)
    SampleIndex(dataset, 8, 3, IndexCache(tmp_path / "c")).epoch(1)
    assert len(cache_files(tmp_path / "c")) == 5


def test_a_rewritten_dataset_at_the_same_path_gets_its_own_index(tmp_path):
    order_of(write(tmp_path / "train", SIZES), tmp_path / "cache")
    for sizes in ([200, 30, 7, 0, 55, 1], [*SIZES, 9]):
        dataset = write(tmp_path / "train", sizes)
        assert order_of(dataset, tmp_path / "cache") == order_of(dataset, None)
    assert len(cache_files(tmp_path / "cache")) == 3


def test_damaged_cache_files_are_never_used(tmp_path, caplog):
    dataset, folder = write(tmp_path / "train", SIZES), tmp_path / "cache"
    fresh = order_of(dataset, folder)
    (file,) = cache_files(folder)
    whole = file.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 39, 64, len(whole) // 2, len(whole) - 8, len(whole) - 1)]
    damaged += [whole + bytes(8), bytes(len(whole)), whole[:40].ljust(len(whole), b"\0")]
    for bit in np.random.default_rng(0).choice(8 * len(whole), 150, replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        caplog.clear()
        assert order_of(dataset, folder) == fresh
        assert str(file) in caplog.text
        assert file.read_bytes() == whole


def test_a_file_of_another_key_under_this_name_is_not_used(tmp_path):
    dataset, folder = write(tmp_path / "train", SIZES), tmp_path / "cache"
    order_of(dataset, folder, seed=4)
    (other,) = cache_files(folder)
    other.rename(folder / other.name.replace("seed4", "seed3"))
    assert order_of(dataset, folder, seed=3) == order_of(dataset, None, seed=3)
    same_shape = write(tmp_path / "other", SIZES[::-1])
    (file,) = cache_files(folder)
    file.rename(folder / file.name.replace(dataset.fingerprint[:16], same_shape.fingerprint[:16]))
    assert order_of(same_shape, folder) == order_of(same_shape, None) != order_of(dataset, None)


def test_a_failed_write_leaves_nothing_and_the_order_is_right(tmp_path, monkeypatch, caplog):
    dataset, fresh = write(tmp_path / "train", SIZES), order_of(IndexedDataset(tmp_path / "train"), None)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.os, "fsync", full)
    assert order_of(dataset, tmp_path / "cache") == fresh
    assert "No space left on device" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    index = SampleIndex(dataset, 8, 3, IndexCache(tmp_path / "cache", required=True))
    with pytest.raises(UserError, match=r"cannot write the index cache: No space left on device.*data\.cache_dir"):
        index.epoch(0)


def test_old_leftovers_of_killed_processes_are_removed(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "old.samples.1.tmp").write_text("x")
    os.utime(folder / "old.samples.1.tmp", (time.time() - 7200,) * 2)
    (folder / "new.samples.2.tmp").write_text("being written")
    order_of(write(tmp_path / "train", SIZES), folder)
    assert [path.name for path in folder.glob("*.tmp")] == ["new.samples.2.tmp"]


def test_a_stopped_lock_holder_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "_LOCK_SECONDS", 0.1)
    (tmp_path / "cache").mkdir()
    dataset = write(tmp_path / "train", SIZES)
    with index_cache._lock(tmp_path / "cache"):
        assert order_of(dataset, tmp_path / "cache") == order_of(dataset, None)


def test_the_default_folder_is_beside_the_data_else_the_users(tmp_path, monkeypatch):
    assert default_folder(tmp_path) == tmp_path / "index_cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(index_cache.os, "access", lambda path, mode: False)  # root may write everywhere
    assert default_folder(tmp_path) == Path("/somewhere/mainspring/index_cache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder(tmp_path) == Path.home() / ".cache/mainspring/index_cache"


def _cold_start(prefix, folder, barrier, results):
    barrier.wait()
    index = SampleIndex(IndexedDataset(prefix), 8, 3, IndexCache(folder))
    results.put(json.dumps([[index.epoch(e).order_n.tolist(), index.epoch(e).starts_k2.tolist(),
                             index.epoch(e).blocks_k.tolist()] for e in range(2)]))


@pytest.mark.parametrize("with_locks", [True, False])
def test_processes_starting_together_agree(tmp_path, monkeypatch, with_locks):
    monkeypatch.setattr(index_cache, "_LOCK_SECONDS", 60.0 if with_locks else 0.0)  # children are forked
    dataset, context = write(tmp_path / "train", SIZES * 500), multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    args = (dataset.prefix, tmp_path / "cache", barrier, results)
    processes = [context.Process(target=_cold_start, args=args) for _ in range(8)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(seen) == 1
    assert json.loads(seen.pop())[0] == order_of(dataset, None)
    assert len(cache_files(tmp_path / "cache")) == 2
    assert list((tmp_path / "cache").glob("*.tmp")) == []


def _killed(prefix, folder, ready):
    def stop(_):
        ready.set()
        time.sleep(60)

    index_cache.os.fsync = stop  # the file is written but not renamed, and the lock is held
    SampleIndex(IndexedDataset(prefix), 8, 3, IndexCache(folder)).epoch(0)


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
    assert order_of(dataset, tmp_path / "cache") == order_of(dataset, None)
    assert time.monotonic() - begun < 10
    assert len(cache_files(tmp_path / "cache")) == 1
