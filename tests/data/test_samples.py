"""Sample order against naive Python: the random numbers, the permutations, and the cut into blocks."""

from __future__ import annotations

import os
import struct
from collections import Counter
from pathlib import Path

import naive_order as naive
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import _index
from engine.data.concatenate import concatenate
from engine.data.index_cache import IndexCache
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter, shard_name
from engine.data.samples import GROUP, SampleIndex
from engine.errors import UserError

MASK = naive.MASK
lengths = st.lists(st.one_of(st.just(0), st.just(1), st.integers(2, 40)), min_size=1, max_size=25)
same_folder = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(prefix: Path, sizes, first: int = 0) -> IndexedDataset:
    """Documents with these lengths whose tokens count on from one to the next, so every token is unique."""
    with IndexedDatasetWriter(prefix, 10**7) as writer:
        total = int(np.sum(sizes, dtype=np.int64))
        writer.add_documents(np.arange(first, first + total), np.array(sizes, np.int64))
    return IndexedDataset(prefix)


def read_turns(index: SampleIndex, turns, threads=1) -> list[list[int]]:
    """The S + 1 tokens of the dataset's n-th blocks, through the compiled reader."""
    s = index.seq_length
    tokens, labels = np.empty((len(turns), s), np.int64), np.empty((len(turns), s), np.int64)
    pieces = np.array([[0, turn, 0, s, place * s] for place, turn in enumerate(turns)], np.int64).reshape(-1, 5)
    _index.gather([index.order], pieces, tokens, labels, threads)
    assert (tokens[:, 1:] == labels[:, :-1]).all()
    return np.concatenate([tokens, labels[:, -1:]], axis=1).tolist()


# ---- random numbers -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, MASK), st.integers(0, MASK), st.integers(0, 1))
def test_the_shuffle_is_the_documented_one(count, seed, epoch, purpose):
    expected = naive.shuffled(naive.stream_key(seed, epoch, purpose), count)
    assert _index.shuffled(count, seed, epoch, purpose).tolist() == expected
    assert _index.permuted(np.arange(count), count, seed, epoch, purpose).tolist() == expected


def test_the_order_is_the_same_for_ever_and_everywhere():
    assert _index.shuffled(10, 1234, 0, 0).tolist() == [6, 3, 9, 1, 4, 8, 7, 0, 5, 2]
    assert _index.permuted(np.array([0, 1, 10**15]), 10**15 + 1, 1234, 0, 0).tolist() == PERMUTED
    assert naive.mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0
    assert naive.document_order(1200, 7, 3)[:6] == DOCUMENTS
    assert naive.document_order(1200, 7, 3)[598:602] == DOCUMENTS_LATER


PERMUTED = [48924944464799, 969289266909913, 947187614890660]
DOCUMENTS = [1150, 880, 982, 61, 253, 16]
DOCUMENTS_LATER = [986, 629, 794, 1049]


def test_shuffles_are_uniform_permutations():
    counts = Counter(tuple(_index.shuffled(4, seed, 0, 0).tolist()) for seed in range(12_000))
    assert len(counts) == 24
    assert chi_squared(counts.values(), 500) < 49.7  # 23 degrees of freedom, one in a thousand
    assert sorted(_index.shuffled(100_000, 5, 0, 0)) == list(range(100_000))


def test_seed_epoch_and_purpose_all_count():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    assert len({tuple(_index.shuffled(50, *key)) for key in keys}) == 5
    places = np.arange(20)
    assert len({tuple(_index.permuted(places, 10**6, *key)) for key in keys}) == 5


# ---- permutations a place at a time ---------------------------------------------------------------------------------


def chi_squared(counts, expected: float) -> float:
    return float(sum((n - expected) ** 2 / expected for n in counts))


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.integers(2**16 - 2, 2**16 + 5), st.integers(2, 2**62)), st.integers(0, MASK), st.data())
def test_a_permutation_is_the_documented_one(count, seed, data):
    if count <= naive.TABLE:
        place = data.draw(st.integers(0, count - 1))
        expected = naive.shuffled(naive.stream_key(seed, 5, 2), count)[place]
    else:
        place = data.draw(st.integers(0, count - 1))
        expected = naive.feistel(naive.stream_key(seed, 5, 2), count, place)
    assert _index.permuted(np.array([place]), count, seed, 5, 2).tolist() == [expected]


@pytest.mark.parametrize("count", [1, 2, 2**16, 2**16 + 1, 100_003, 2**17, 2**17 + 1, 2**18 - 1, 10**6])
def test_a_permutation_takes_every_place_once(count):
    images = _index.permuted(np.arange(count), count, 3, 1, 2)
    np.testing.assert_array_equal(np.sort(images), np.arange(count))


def test_a_permutation_far_past_32_bits_stays_inside_and_never_meets_itself():
    count = 3 * 2**59 + 1
    images = _index.permuted(np.arange(200_000), count, 3, 1, 2)
    assert 0 <= images.min() <= images.max() < count
    assert len(np.unique(images)) == 200_000
    assert images.max() > 0.99 * count


def test_a_network_is_as_uniform_as_a_shuffle():
    """Over keys: where one place goes, where two neighbours go together, how many places stay, how many keep their
    successor (both are Poisson of mean 1 and nearly so). Each bound is passed by chance but once in a thousand."""
    count, keys = 2**16 + 100, 4000
    first = np.array([_index.permuted(np.array([0, 1, count - 1]), count, seed, 0, 0) for seed in range(keys)])
    for place in range(3):
        assert chi_squared(np.bincount(first[:, place] * 64 // count, minlength=64), keys / 64) < 103.4  # 63 degrees
    both = (first[:, 0] * 8 // count) * 8 + first[:, 1] * 8 // count
    assert chi_squared(np.bincount(both, minlength=64), keys / 64) < 103.4
    low_bits = (first[:, 0] % 8) * 8 + first[:, 1] % 8
    assert chi_squared(np.bincount(low_bits, minlength=64), keys / 64) < 103.4
    stay, follow = 0, 0
    for seed in range(100):
        images = _index.permuted(np.arange(count), count, seed, 0, 1)
        stay += int((images == np.arange(count)).sum())
        follow += int((np.diff(images) == 1).sum())
    assert abs(stay - 100) < 35, "100 of a Poisson variable, 3.5 deviations"
    assert abs(follow - 100) < 35


def test_asking_outside_a_permutation_is_an_error():
    for count, place in ((5, 5), (5, -1), (10**6, 10**6), (0, 0)):
        with pytest.raises(IndexError, match="outside the permutation"):
            _index.permuted(np.array([place]), count, 0, 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        _index.permuted(np.array([0]), -1, 0, 0, 0)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def check_epoch(dataset, documents, seq_length, seed, epoch):
    index = SampleIndex(dataset, seq_length, seed, IndexCache(None))
    expected = naive.blocks_in_order(documents, seq_length, seed, epoch)
    assert index.blocks_per_epoch == index.order.blocks == len(expected)
    turns = np.arange(len(expected)) + epoch * len(expected)
    assert read_turns(index, turns.tolist()) == expected
    epochs, blocks = index.locate(turns)
    assert epochs.tolist() == [epoch] * len(expected)
    assert blocks.tolist() == naive.block_order(len(expected), seed, epoch)


@same_folder
@given(sizes=lengths, seq_length=st.integers(1, 30), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_blocks_are_the_naive_cut_of_the_shuffled_documents(tmp_path, sizes, seq_length, seed, epoch):
    dataset = write(tmp_path / "train", sizes)
    if dataset.num_tokens <= seq_length:
        with pytest.raises(UserError, match=r"tokens are less than one sample|the dataset is empty"):
            SampleIndex(dataset, seq_length, seed, IndexCache(None))
        return
    check_epoch(dataset, list(dataset), seq_length, seed, epoch)


@same_folder
@given(documents=st.integers(GROUP - 1, 4 * GROUP + 3), seq_length=st.integers(1, 60), seed=st.integers(0, MASK),
       shards=st.integers(1, 7))
def test_blocks_of_several_groups_in_several_shards(tmp_path, documents, seq_length, seed, shards):
    """The order is that of one pair, however the documents are cut into shards (some of them empty)."""
    rng = np.random.default_rng(seed % 2**32)
    sizes = rng.choice([0, 1, 2, 3, 40], documents, p=[0.3, 0.2, 0.2, 0.2, 0.1])
    cuts = np.sort(rng.integers(0, documents + 1, shards - 1))
    folder = tmp_path / f"{shards}"
    first = 0
    for number, part in enumerate(np.split(sizes, cuts)):
        write(folder / shard_name("train", number, shards), part, first)
        first += int(part.sum())
    dataset = IndexedDataset(folder / "train")
    check_epoch(dataset, list(dataset), seq_length, seed, 1)


def test_the_tokens_of_groups_do_not_depend_on_threads_or_shards(tmp_path):
    sizes = np.random.default_rng(0).integers(0, 50, 3 * GROUP + 77)
    whole = write(tmp_path / "whole", sizes)
    for number, part in enumerate(np.split(sizes, [100, 100, 900])):
        write(tmp_path / shard_name("train", number, 4), part)
    concatenate([tmp_path / "train"], tmp_path / "joined")
    groups = -(-len(sizes) // GROUP)
    expected = [int(sizes[g::groups].sum()) for g in range(groups)]
    for dataset in (whole, IndexedDataset(tmp_path / "train"), IndexedDataset(tmp_path / "joined")):
        for threads in (1, 2, 5, 0):
            assert dataset.corpus.group_tokens(threads).tolist() == expected


def test_a_batch_does_not_depend_on_threads(tmp_path):
    dataset = write(tmp_path / "train", np.random.default_rng(0).integers(0, 50, 2000))
    index = SampleIndex(dataset, 16, 1, IndexCache(None))
    turns = np.random.default_rng(1).integers(0, 5 * index.blocks_per_epoch, 100).tolist()
    assert read_turns(index, turns) == read_turns(index, turns, 4) == read_turns(index, turns, 0)


def test_the_smallest_and_largest_token_are_those_of_all_pieces(tmp_path):
    """Each token is its place in the file, and pieces come in any order: none of them alone has both."""
    index = SampleIndex(write(tmp_path / "train", [60]), 4, 0, IndexCache(None))
    other = SampleIndex(write(tmp_path / "other", [60], 1000), 4, 0, IndexCache(None))
    tokens, labels = np.empty(12, np.int64), np.empty(12, np.int64)
    for order in ([8, 50, 20], [50, 20, 8], [20, 8, 50]):
        pieces = np.array([[token, 4, 4 * place] for place, token in enumerate(order)])
        for threads in (1, 3):
            assert index.dataset.corpus.gather(pieces, tokens, labels, threads) == (8, 54)
    turns = [index.locate(np.arange(14))[1].tolist().index(block) for block in (7, 2, 11, 5)]
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [1, 2, 3, 0]):
        pieces = np.array([[n % 2, turns[n], 0, 3, 3 * place] for place, n in enumerate(order)])
        for threads in (1, 3):
            found = _index.gather([index.order, other.order], pieces, tokens, labels, threads)
            assert found == [(28, 47), (1008, 1023)]


def test_few_epochs_are_in_memory(tmp_path):
    """Of 10^8 documents an epoch takes 1.6 MB, of which only the last few are kept."""
    documents, groups = 10**8, -(-(10**8) // GROUP)
    with open(tmp_path / "train.idx", "wb") as idx:
        idx.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, documents, documents + 1))
        idx.truncate(34 + 20 * documents + 8)
    (tmp_path / "train.bin").touch()
    os.truncate(tmp_path / "train.bin", 2 * documents)
    files = [_index.Map(str(tmp_path / f"train.{end}")) for end in ("idx", "bin")]
    totals = np.full(groups, documents // groups, np.int64)
    totals[: documents % groups] += 1
    order = _index.SampleOrder(_index.Corpus([(*files, documents)]), totals, 1000, 0)

    def private() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    order.locate(np.array([0]))
    before = private()
    order.locate(np.arange(50) * order.blocks)
    assert private() - before < 30e6, "50 epochs are 80 MB"


def test_every_block_comes_once_an_epoch_and_epochs_differ(tmp_path):
    index = SampleIndex(write(tmp_path / "train", [30, 0, 1, 55, 200, 7]), 8, 3, IndexCache(None))
    blocks = index.blocks_per_epoch
    assert blocks == (293 - 1) // 8
    read = [read_turns(index, range(epoch * blocks, (epoch + 1) * blocks)) for epoch in range(3)]
    for epoch in read:
        labelled = [token for block in epoch for token in block[1:]]
        assert len(set(labelled)) == len(labelled) == 8 * blocks
    assert read[0] != read[1] != read[2]
    starts = [index.order.starts(epoch, np.arange(blocks)).tolist() for epoch in range(3)]
    assert starts[0] != starts[1] != starts[2], "the documents' order differs too"


def test_starts_are_where_blocks_begin(tmp_path):
    sizes = np.random.default_rng(0).integers(0, 9, 1500)
    index = SampleIndex(write(tmp_path / "train", sizes), 16, 9, IndexCache(None))
    first = np.concatenate([[0], np.cumsum(sizes)])
    document, offset = index.order.starts(2, np.arange(index.blocks_per_epoch)).T
    row = naive.row(list(index.dataset), 9, 2)
    assert (first[document] + offset).tolist() == row[:-1:16][: index.blocks_per_epoch]
    assert (offset < sizes[document]).all()


def test_any_epoch_can_be_asked_for_at_any_time(tmp_path):
    index = SampleIndex(write(tmp_path / "train", [50, 3, 0, 9]), 8, 0, IndexCache(None))
    far = 2**40 * index.blocks_per_epoch
    expected = {epoch: read_turns(index, [epoch * index.blocks_per_epoch]) for epoch in (0, 1, 2**40)}
    for epoch in (7, 0, 2**40, 5, 1, 6, 0):  # more than are held, and back
        if epoch in expected:
            assert read_turns(index, [epoch * index.blocks_per_epoch]) == expected[epoch]
    assert index.locate(np.array([far]))[0].tolist() == [2**40]


def test_rows_pass_32_bits(tmp_path):
    """Six documents of 2^30 tokens, holes on the disk: the row is longer than 2^32 tokens."""
    sizes = np.full(6, 2**30, np.int32)
    with open(tmp_path / "train.idx", "wb") as idx:
        idx.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 6, 7) + sizes.tobytes())
        idx.write(np.arange(0, 6 * 2**31, 2**31, dtype=np.int64).tobytes() + np.arange(7, dtype=np.int64).tobytes())
    marks = {0: 1, 2**32 + 7: 2, 5 * 2**30 + 2**30 - 2: 3}  # token of the file -> its value
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(6 * 2**31)
        for place, value in marks.items():
            file.seek(2 * place)
            file.write(struct.pack("<H", value))
    index = SampleIndex(IndexedDataset(tmp_path / "train"), 2**20, 3, IndexCache(None))
    assert index.blocks_per_epoch == (6 * 2**30 - 1) // 2**20
    order, turns = naive.document_order(6, 3, 0), naive.block_order(index.blocks_per_epoch, 3, 0)
    tokens, labels = np.empty(2, np.int64), np.empty(2, np.int64)
    for place, value in marks.items():
        block, offset = divmod(order.index(place >> 30) * 2**30 + place % 2**30, 2**20)
        _index.gather([index.order], np.array([[0, turns.index(block), offset, 1, 1]]), tokens, labels)
        assert (tokens[1], labels[1]) == (value, 0)
        index.dataset.corpus.gather(np.array([[place, 1, 0]]), tokens, labels)
        assert (tokens[0], labels[0]) == (value, 0)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_asking_outside_is_an_error_not_a_crash(tmp_path):
    index, out = SampleIndex(write(tmp_path / "train", [5, 5]), 4, 0, IndexCache(None)), np.empty(4, np.int64)
    for piece in ([0, -1, 0, 1, 0], [0, 0, -1, 1, 0], [0, 0, 4, 1, 0], [0, 0, 0, 5, 0], [0, 0, 0, 0, 0],
                  [0, 0, 0, 4, 1], [0, 0, 0, 1, -1], [0, 0, 2**62, 1, 0], [0, 0, 0, 1, 2**62], [1, 0, 0, 1, 0],
                  [-1, 0, 0, 1, 0], [0, 0, 1, 2**62, 0]):
        with pytest.raises(IndexError):
            _index.gather([index.order], np.array([piece]), out, out.copy())
    assert _index.gather([index.order], np.array([[0, 0, 0, 4, 0]]), out, out.copy())[0][1] < 10
    for piece in ([10, 1, 0], [-1, 1, 0], [7, 3, 0], [0, 0, 0], [0, 5, 0], [0, 3, 2], [0, 1, -1], [2**62, 1, 0]):
        with pytest.raises(IndexError):
            index.dataset.corpus.gather(np.array([piece]), out, out.copy())
    assert index.dataset.corpus.gather(np.array([[6, 3, 0]]), out, out.copy()) == (6, 9)
    assert _index.gather([index.order], np.empty((0, 5), np.int64), out, out.copy())[0] == (2**63 - 1, -(2**63))


def test_wrong_calls_are_refused(tmp_path):
    dataset, out = write(tmp_path / "train", [5, 5]), np.empty(4, np.int64)
    totals = dataset.corpus.group_tokens()
    order = _index.SampleOrder(dataset.corpus, totals, 4, 0)
    for wrong in (totals + 1, np.array([5, 5]), np.empty(0, np.int64)):
        with pytest.raises(ValueError, match="totals are not the corpus's"):
            _index.SampleOrder(dataset.corpus, wrong, 4, 0)
    for length in (0, 10, -3):
        with pytest.raises(ValueError, match="not one block"):
            _index.SampleOrder(dataset.corpus, totals, length, 0)
    with pytest.raises(ValueError, match="5 columns"):
        _index.gather([order], np.zeros((1, 4), np.int64), out, out.copy())
    with pytest.raises(ValueError, match="differ in size"):
        _index.gather([order], np.zeros((1, 5), np.int64), out, out[:3].copy())
    with pytest.raises(TypeError):  # a copy would be filled, and thrown away
        _index.gather([order], np.zeros((1, 5), np.int64), out.astype(np.int32), out.copy())
    for block in (-1, 2):
        with pytest.raises(IndexError, match="no such block"):
            order.starts(0, np.array([block]))
    with pytest.raises(ValueError, match="at least one pair"):
        _index.Corpus([])


def test_rows_are_cut_into_pieces():
    found = _index.pieces(np.array([0, 10, 13, 2**50]), 8, 16)
    assert found.tolist() == [[0, 0, 0, 8, 0], [0, 0, 10, 6, 8], [0, 1, 0, 2, 14], [0, 0, 13, 3, 16], [0, 1, 0, 5, 19],
                              [0, 2**46, 0, 8, 24]]
    for positions, length in ((np.array([-1]), 8), (np.array([0]), 0), (np.array([0]), 17)):
        with pytest.raises(ValueError, match=r"negative|length must be"):
            _index.pieces(positions, length, 16)


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


def test_a_truncated_file_is_an_error_not_a_crash(tmp_path):
    index = SampleIndex(write(tmp_path / "train", [100_000]), 8, 0, IndexCache(None))
    os.truncate(tmp_path / "train.bin", 10)
    with pytest.raises(_index.Truncated) as caught:
        read_turns(index, range(100))
    assert caught.value.args == (str(tmp_path / "train.bin"), 10)
