"""The loader against the stream written out in plain Python: values, order, resume, ranks, threads, and bad input."""

from __future__ import annotations

import functools
import gc
import random
import threading
import time
from pathlib import Path

import naive_order as naive
import numpy as np
import pytest
import torch
from datafiles import loader_config as config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import Config
from engine.data import loader as loader_module
from engine.data.blend import BlendIndex
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter
from engine.data.loader import build
from engine.errors import UserError

S = 16
VOCAB = 5000
same_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def prepare(folder: Path, seed: int, sizes: list[int]) -> Path:
    """A directory with a training split of random tokens in documents of these lengths."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(folder / "train", VOCAB) as writer:
        for size in sizes:
            writer.add_document(rng.integers(0, VOCAB, size))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return prepare(tmp_path / "data", 0, [40, 0, 1, 100, 33, 7, 64, 1, 1, 90])


@pytest.fixture
def blend(tmp_path):
    sizes = {"a": [40, 80, 5], "b": [300, 1, 0, 60], "c": [17]}
    folders = [prepare(tmp_path / name, seed, s) for seed, (name, s) in enumerate(sizes.items())]
    return list(zip(folders, [0.3, 0.5, 0.2], strict=True))


class Reference:
    """The stream in plain Python: every block as a list of S + 1 tokens."""

    def __init__(self, folders, weights, seed=1):
        self.sets = [IndexedDataset(folder / "train") for folder in folders]
        self.seed, self.blend = seed, BlendIndex(weights)

    def block(self, j):
        source, own = (int(x[0]) for x in self.blend.locate(np.array([j])))
        per_epoch = (self.sets[source].num_tokens - 1) // S
        return self.epoch(source, own // per_epoch)[own % per_epoch]

    @functools.lru_cache  # noqa: B019 - the reference of one test
    def epoch(self, source, number):
        return naive.blocks_in_order(list(self.sets[source]), S, self.seed, number)

    def row(self, position, length):
        where = [divmod(p, S) for p in range(position, position + length)]
        blocks = {j: self.block(j) for j, _ in where}
        return [blocks[j][o] for j, o in where], [blocks[j][o + 1] for j, o in where]


def rows_of(batches):
    """[(tokens, labels), ...] of all rows."""
    return [row for b in batches for row in zip(b.tokens_bs.tolist(), b.labels_bs.tolist(), strict=True)]


def global_rows(cfg, position, gbs, mbs, length, dp_size, loaders=None):
    """The rows of a global batch in the order of j, put together from all ranks."""
    rows = {}
    for rank in range(dp_size):
        own = loaders[rank] if loaders else build(cfg, "train", dp_rank=rank, dp_size=dp_size)
        batches = list(own.micro_batches(position, global_batch_size=gbs, micro_batch_size=mbs, seq_length=length))
        assert len(batches) == gbs // (mbs * dp_size)
        for m, batch in enumerate(batches):
            for k, row in enumerate(rows_of([batch])):
                rows[(m * dp_size + rank) * mbs + k] = row
    return [rows[j] for j in range(gbs)]


# ---- values ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_promised_tensors(data):
    with build(config(data), "train", dp_rank=0, dp_size=1) as loader:
        (batch,) = loader.micro_batches(0, global_batch_size=3, micro_batch_size=3, seq_length=S)
    assert (batch.cu_seqlens_b, batch.prefixes_b, batch.pairs) == (None, None, None), "rows are not packed"
    tensors = {name: value for name, value in vars(batch).items() if value is not None}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "tokens_bs": (torch.int64, (3, S)), "labels_bs": (torch.int64, (3, S)),
        "loss_mask_bs": (torch.float32, (3, S)), "position_ids_bs": (torch.int64, (3, S)),
    }
    assert batch.loss_mask_bs.eq(1).all()
    assert batch.position_ids_bs.tolist() == [list(range(S))] * 3


def test_what_is_written_into_a_batch_is_in_no_other(data):
    with build(config(data), "train", dp_rank=0, dp_size=1) as loader:
        first, second = loader.micro_batches(0, global_batch_size=6, micro_batch_size=3, seq_length=S)
        for tensor in (first.tokens_bs, first.labels_bs, first.loss_mask_bs, first.position_ids_bs):
            tensor.fill_(-1)
        (again,) = loader.micro_batches(0, global_batch_size=3, micro_batch_size=3, seq_length=S)
    for batch in (second, again):
        assert batch.loss_mask_bs.eq(1).all()
        assert batch.position_ids_bs.tolist() == [list(range(S))] * 3
        assert batch.tokens_bs.min() >= 0


@same_folder
@given(position=st.integers(0, 4000), length=st.integers(1, S), gbs=st.integers(1, 6), mbs=st.sampled_from([1, 2]),
       workers=st.sampled_from([0, 2]))
def test_rows_are_those_of_the_plain_stream(data, position, length, gbs, mbs, workers):
    with build(config(data, num_workers=workers), "train", dp_rank=0, dp_size=1) as loader:
        rows = rows_of(loader.micro_batches(position, global_batch_size=gbs * mbs, micro_batch_size=mbs,
                                            seq_length=length))
    reference = Reference([data], [1])
    assert rows == [reference.row(position + j * length, length) for j in range(gbs * mbs)]


@same_folder
@given(position=st.integers(0, 3000), length=st.integers(1, S))
def test_rows_of_a_blend_are_those_of_the_plain_stream(blend, position, length):
    folders, weights = zip(*blend, strict=True)
    with build(config(blend=blend), "train", dp_rank=0, dp_size=1) as loader:
        rows = rows_of(loader.micro_batches(position, global_batch_size=4, micro_batch_size=4, seq_length=length))
    reference = Reference(folders, weights)
    assert rows == [reference.row(position + j * length, length) for j in range(4)]


def test_every_epoch_has_every_block_once(data):
    with build(config(data), "train", dp_rank=0, dp_size=1) as loader:
        per_epoch = (loader.num_tokens - 1) // S
        ids = loader.sample_ids(0, 3 * per_epoch, S)
    assert per_epoch == (337 - 1) // S
    for epoch in range(3):
        own = ids[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(own) == [((0, epoch, block, 0, S),) for block in range(per_epoch)]


def test_a_blend_draws_by_weight_and_every_source_goes_through_its_epochs(blend):
    with build(config(blend=blend), "train", dp_rank=0, dp_size=1) as loader:
        pieces = [piece for (piece,) in loader.sample_ids(0, 1000, S)]
    for source, (blocks, share) in enumerate([(7, 0.3), (22, 0.5), (1, 0.2)]):
        own = [piece for piece in pieces if piece[0] == source]
        assert abs(len(own) - 1000 * share) <= 1
        assert [epoch for _, epoch, *_ in own] == [n // blocks for n in range(len(own))]
        assert {block for _, epoch, block, *_ in own if epoch == 0} == set(range(blocks))


def test_sample_ids_name_what_is_read(data):
    with build(config(data), "train", dp_rank=0, dp_size=1) as loader:
        for length in (S, 5, 1):
            ids = loader.sample_ids(7, 6, length)
            rows = rows_of(loader.micro_batches(7, global_batch_size=6, micro_batch_size=2, seq_length=length))
            source = loader.stream.sources[0]
            for pieces, (tokens, labels) in zip(ids, rows, strict=True):
                read = []
                for _, epoch, block, offset, size in pieces:
                    row = naive.row(list(source.dataset), 1, epoch)
                    first = block * S + offset
                    read += zip(row[first : first + size], row[first + 1 : first + size + 1], strict=True)
                assert read == list(zip(tokens, labels, strict=True))


# ---- order: curriculum, ranks, threads, resume ----------------------------------------------------------------------

# (global batch size, length) of each step: a batch ramp and a curriculum, across several epochs of 21 blocks
SCHEDULE = [(2, 4), (2, 4), (4, 4), (4, 7), (4, 7), (8, 7), (8, 11), (8, S), (8, S), (16, S), (16, 5), (16, S), (16, S)]


def run(cfg, dp_size, mbs, first=0):
    """[rows of the global batch] of each step of SCHEDULE from the given one on, with fresh loaders."""
    loaders = [build(cfg, "train", dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    position, steps = sum(gbs * length for gbs, length in SCHEDULE[:first]), []
    for gbs, length in SCHEDULE[first:]:
        steps.append(global_rows(cfg, position, gbs, mbs, length, dp_size, loaders))
        position += gbs * length
    for loader in loaders:
        loader.close()
    return steps


def test_a_curriculum_and_a_batch_ramp_skip_and_replay_nothing(blend):
    folders, weights = zip(*blend, strict=True)
    read = [pair for step in run(config(blend=blend), 1, 1) for tokens, labels in step
            for pair in zip(tokens, labels, strict=True)]
    tokens, labels = Reference(folders, weights).row(0, sum(gbs * length for gbs, length in SCHEDULE))
    assert read == list(zip(tokens, labels, strict=True))


def test_order_is_the_same_for_any_rank_count_micro_batch_and_workers(blend):
    expected = run(config(blend=blend), 1, 1)
    for dp_size, mbs, workers in [(2, 1, 0), (1, 2, 1), (2, 1, 3), (1, 1, 4), (1, 2, 2), (2, 1, 1)]:
        assert run(config(blend=blend, num_workers=workers), dp_size, mbs) == expected, (dp_size, mbs, workers)


def test_resume_at_every_step_continues_the_order(blend):
    expected = run(config(blend=blend), 1, 1)
    for first in range(len(SCHEDULE)):
        assert run(config(blend=blend, num_workers=first % 3), 1 + first % 2, 1, first) == expected[first:]


def test_sample_ids_do_not_depend_on_rank(data):
    ids = [build(config(data), "train", dp_rank=rank, dp_size=size).sample_ids(5, 8, 6)
           for rank, size in [(0, 1), (0, 4), (3, 4)]]
    assert ids[0] == ids[1] == ids[2]


def test_the_real_configuration_fits(data):
    model = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "seq_length": S}
    cfg = Config.model_validate({"seed": 1, "model": model, "data": {"path": data}})
    blended = Config.model_validate({"seed": 1, "model": model, "data": {"blend": [{"path": data, "weight": 2}]}})
    expected = global_rows(config(data), 3, 4, 1, S, 2)
    assert global_rows(cfg, 3, 4, 1, S, 2) == global_rows(blended, 3, 4, 1, S, 2) == expected


def test_seeds(data):
    def first(**options):
        with build(config(data, **options), "train", dp_rank=0, dp_size=1) as loader:
            return loader.sample_ids(0, 40, S)

    assert first(seed=1) == first(seed=9, shuffle_seed=1)
    assert first(seed=1) != first(seed=2)
    assert first(seed=1) != first(seed=1, shuffle_seed=2)


# ---- prefetching ----------------------------------------------------------------------------------------------------

STEP = {"global_batch_size": 4, "micro_batch_size": 2, "seq_length": S}


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mainspring-reader")]


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """First positions of the micro-batches read from disk, in order."""
    seen, read = [], loader_module._read
    monkeypatch.setattr(loader_module, "_read", lambda s, p, n: seen.append(int(p[0])) or read(s, p, n))
    return seen


def settle(reads, count):
    deadline = time.monotonic() + 20
    while len(reads) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(reads) == count


def test_the_next_step_is_read_while_the_caller_works(data, reads):
    with build(config(data, num_workers=2), "train", dp_rank=0, dp_size=1) as loader:
        list(loader.micro_batches(0, **STEP))
        settle(reads, 4)
        assert sorted(reads) == [0, 2 * S, 4 * S, 6 * S]
        list(loader.micro_batches(4 * S, **STEP))  # already read: only the step after it is new
        settle(reads, 6)
        assert sorted(reads[4:]) == [8 * S, 10 * S]


def test_the_same_step_twice_keeps_what_was_read_ahead(data, reads):
    """Pipeline stages with several chunks ask for each step once a chunk."""
    with build(config(data, num_workers=1), "train", dp_rank=0, dp_size=1) as loader:
        first, again = (rows_of(loader.micro_batches(0, **STEP)) for _ in range(2))
        settle(reads, 6)
        assert first == again
        assert sorted(reads) == [0, 0, 2 * S, 2 * S, 4 * S, 6 * S]


def test_without_threads_nothing_is_read_ahead(data, reads):
    loader = build(config(data), "train", dp_rank=0, dp_size=1)
    batches = loader.micro_batches(0, **STEP)
    assert reads == []
    next(batches)
    assert reads == [0]
    next(batches)
    list(loader.micro_batches(4 * S, **STEP))
    assert reads == [0, 2 * S, 4 * S, 6 * S]
    assert reader_threads() == []


def test_what_was_to_be_read_ahead_is_dropped_after_a_jump(data, reads, monkeypatch):
    go, read = threading.Event(), loader_module._read
    monkeypatch.setattr(loader_module, "_read", lambda *args: go.wait(20) and read(*args))
    with build(config(data, num_workers=1), "train", dp_rank=0, dp_size=1) as loader:
        loader.micro_batches(0, **STEP)  # its two micro-batches and the two of the next step wait in the queue
        batches = loader.micro_batches(100 * S, **STEP)
        go.set()
        list(batches)
    assert {4 * S, 6 * S}.isdisjoint(reads)
    assert {100 * S, 102 * S} <= set(reads)


def test_jumping_about_gives_the_same_rows_as_asking_directly(data):
    choose = random.Random(3)
    with build(config(data, num_workers=2), "train", dp_rank=0, dp_size=1) as loader:
        direct = build(config(data), "train", dp_rank=0, dp_size=1)
        for _ in range(60):
            position, gbs, length = choose.randrange(600), choose.choice([2, 4, 8]), choose.randint(1, S)
            step = {"global_batch_size": gbs, "micro_batch_size": 2, "seq_length": length}
            batches = loader.micro_batches(position, **step)
            if choose.random() < 0.3:
                continue  # abandoned
            assert rows_of(batches) == rows_of(direct.micro_batches(position, **step))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_reading_comes_out_at_the_caller(data, workers):
    with build(config(data, num_workers=workers), "train", dp_rank=0, dp_size=1) as loader:
        list(loader.micro_batches(0, **STEP))
        with open(data / "train.bin", "r+b") as file:
            file.truncate(100)
        for position in (40 * S, 50 * S, 90 * S):  # the threads live on and say it again
            with pytest.raises(UserError, match=r"train\.bin: truncated: 100 bytes"):
                list(loader.micro_batches(position, **STEP))


def test_close_ends_the_threads_and_they_are_daemons(data):
    loader = build(config(data, num_workers=3), "train", dp_rank=0, dp_size=1)
    list(loader.micro_batches(0, **STEP))
    assert [thread.daemon for thread in reader_threads()] == [True] * 3
    loader.close()
    loader.close()
    assert reader_threads() == []
    for use in (lambda: loader.micro_batches(0, **STEP), lambda: next(loader.evaluation_batches(2, S))):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_a_forgotten_loader_leaves_no_threads(data):
    loader = build(config(data, num_workers=2), "train", dp_rank=0, dp_size=1)
    list(loader.micro_batches(0, **STEP))
    del loader
    gc.collect()
    deadline = time.monotonic() + 20
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reader_threads() == []
