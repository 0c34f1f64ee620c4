"""Evaluation rows, where the index cache lies, and what the loader says to bad input."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import naive_order as naive
import numpy as np
import pytest
from datafiles import loader_config as config

from engine.data import prepared
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter
from engine.data.loader import build
from engine.errors import UserError

S = 16
VOCAB = 5000


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(folder: Path, seed: int = 0, manifest: bool = True, **sizes) -> Path:
    """A prepared directory with random tokens in documents of these lengths, by split."""
    rng, splits = np.random.default_rng(seed), {}
    for split, lengths in sizes.items():
        with IndexedDatasetWriter(folder / split, VOCAB) as writer:
            for length in lengths:
                writer.add_document(rng.integers(0, VOCAB, length))
        splits[split] = {"documents": len(lengths), "tokens": sum(lengths),
                         "bin_sha256": sha256(folder / f"{split}.bin"), "idx_sha256": sha256(folder / f"{split}.idx")}
    if manifest:
        (folder / "manifest.json").write_text(json.dumps({"vocab_size": VOCAB, "splits": splits}))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return prepare(tmp_path / "data", train=[40, 0, 1, 100, 33, 7, 64, 1, 1, 90], validation=[20, 0, 30, 1])


@pytest.fixture
def blend(tmp_path):
    sizes = {"a": [40, 80, 5], "b": [300, 1, 0, 60], "c": [17]}
    folders = [prepare(tmp_path / name, seed, train=s, validation=s) for seed, (name, s) in enumerate(sizes.items())]
    return list(zip(folders, [0.3, 0.5, 0.2], strict=True))


def first_rows(cfg, gbs):
    """[(tokens, labels)] of the first global batch."""
    with build(cfg, "train", dp_rank=0, dp_size=1) as loader:
        (batch,) = loader.micro_batches(0, global_batch_size=gbs, micro_batch_size=gbs, seq_length=S)
    return list(zip(batch.tokens_bs.tolist(), batch.labels_bs.tolist(), strict=True))


# ---- evaluation -----------------------------------------------------------------------------------------------------


def predictions(cfg, mbs, length, dp_size, max_sequences=None):
    """[(token, label)] that count, in row order, after checking that the ranks agree on the number of batches."""
    loaders = [build(cfg, "validation", dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    batches = [list(loader.evaluation_batches(mbs, length, max_sequences)) for loader in loaders]
    assert len({len(own) for own in batches}) == 1
    pairs = []
    for m in range(len(batches[0])):
        for rank in range(dp_size):
            b = batches[rank][m]
            assert b.tokens_bs.shape == b.labels_bs.shape == b.loss_mask_bs.shape == (mbs, length)
            pairs += zip(b.tokens_bs[b.loss_mask_bs == 1].tolist(), b.labels_bs[b.loss_mask_bs == 1].tolist(),
                         strict=True)
            assert b.tokens_bs[b.loss_mask_bs == 0].eq(0).all()
    return pairs


def pairs_of(folder, split="validation"):
    tokens = [int(t) for document in IndexedDataset(folder / split) for t in document]
    return list(itertools.pairwise(tokens))


@pytest.mark.parametrize(("mbs", "length", "dp_size"),
                         [(1, S, 1), (4, S, 2), (3, 7, 3), (2, 1, 1), (1, 50, 1), (2, 64, 2)])
def test_evaluation_predicts_every_token_once_in_file_order(data, mbs, length, dp_size):
    assert predictions(config(data), mbs, length, dp_size) == pairs_of(data)


def test_evaluation_of_a_blend_takes_one_source_after_the_other(blend):
    expected = [pair for folder, _ in blend for pair in pairs_of(folder)]
    assert predictions(config(blend=blend), 3, 10, 2) == expected


def test_evaluation_can_be_cut_short(data):
    assert predictions(config(data), 2, 10, 2, max_sequences=3) == pairs_of(data)[:30]
    assert predictions(config(data), 2, 10, 2, max_sequences=0) == []
    assert predictions(config(data), 2, 10, 2, max_sequences=99) == pairs_of(data)


def test_a_validation_split_shorter_than_a_sample_is_fine(tmp_path):
    folder = prepare(tmp_path / "d", validation=[2])
    assert predictions(config(folder), 2, S, 2) == pairs_of(folder)
    for sizes in ([], [1]):
        with pytest.raises(UserError, match=rf"validation\.bin: {sum(sizes)} tokens, evaluation needs at least 2"):
            predictions(config(prepare(tmp_path / "e", validation=sizes)), 2, S, 1)


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_the_index_lies_beside_the_data_or_where_it_is_asked_for(data, tmp_path):
    for cfg, folder in [(config(data), data / "index_cache"), (config(data, cache_dir=tmp_path / "x"), tmp_path / "x")]:
        with build(cfg, "train", dp_rank=0, dp_size=1) as loader:
            loader.sample_ids(0, 1, S)
        assert len(list(folder.glob("*.groups"))) == 1


def test_data_prepared_anew_at_the_same_path_is_read_anew(data):
    seen = set()
    for seed, sizes in [(0, [100, 90, 80]), (1, [80, 90, 100]), (2, [80, 90, 100])]:
        prepare(data, seed, train=sizes)
        blocks = naive.blocks_in_order(list(IndexedDataset(data / "train")), S, 1, 0)
        expected = [(block[:-1], block[1:]) for block in blocks]
        assert first_rows(config(data), 8) == expected[:8]
        seen.add(str(expected))
    assert len(seen) == 3


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(cfg, split="train") -> str:
    with pytest.raises(UserError) as caught:
        build(cfg, split, dp_rank=0, dp_size=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_that_is_not_there_or_no_directory(data, tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such directory" in refused(config(tmp_path / "nowhere"))
    assert "train.bin: not a directory" in refused(config(data / "train.bin"))
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / 'train.idx'}: file not found" in refused(config(tmp_path / "empty"))


def test_files_that_are_not_the_manifests(data, tmp_path):
    whole = (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "train.bin: is not the file manifest.json describes (bin_sha256" in refused(config(data))
    (data / "train.bin").write_bytes(whole)
    prepare(tmp_path / "other", train=[7, 330])
    for end in ("bin", "idx"):
        (data / f"train.{end}").write_bytes((tmp_path / "other" / f"train.{end}").read_bytes())
    assert "train.idx: is not the file manifest.json describes (idx_sha256" in refused(config(data))
    (data / "train.bin").write_bytes(whole[:-2])
    assert "train.bin: truncated" in refused(config(data))


@pytest.mark.parametrize("content", [
    b"{", b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b'{"splits": null}', b'{"splits": {"train": null}}',
    b'{"splits": {"train": {"shards": null}}}', b'{"splits": {"train": {"shards": [1]}}}', b'{"vocab_size": "10"}',
    b'{"tokenizer_sha256": [1]}',
])
def test_a_damaged_manifest(data, content):
    (data / "manifest.json").write_bytes(content)
    assert "manifest.json: " in refused(config(data))


def test_large_files_are_held_against_the_manifest_by_size_and_index_only(data, monkeypatch):
    monkeypatch.setattr(prepared, "HASHED_BYTES", 10)
    monkeypatch.setattr(IndexedDataset, "bin_sha256", lambda self: pytest.fail("hashed all of it"))
    build(config(data), "train", dp_rank=0, dp_size=1)


def test_megatrons_own_files_need_no_manifest(tmp_path):
    folder = prepare(tmp_path / "d", manifest=False, train=[100, 50])
    whole = first_rows(config(folder), 2)
    for end in ("bin", "idx"):
        (folder / f"train.{end}").rename(folder / f"train-00000-of-00002.{end}")
        empty = prepare(tmp_path / "e", train=[]) / f"train.{end}"
        empty.rename(folder / f"train-00001-of-00002.{end}")
    assert first_rows(config(folder), 2) == whole


def test_tokens_outside_the_vocabulary_are_found_when_read(data):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["vocab_size"] = 10
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train\.bin: holds token \d+, outside the vocabulary of 10"):
        first_rows(config(data), 2)
    with pytest.raises(UserError, match=r"validation\.bin: holds token \d+, outside the vocabulary of 10"):
        predictions(config(data), 1, S, 1)


def test_too_little_data_is_said_when_training_is_built(tmp_path):
    folder = prepare(tmp_path / "d", train=[10, 6], validation=[9])
    message = refused(config(folder))
    assert "16 tokens are less than one sample of 17" in message
    assert "set model.seq_length to 15 or less" in message
    build(config(folder), "validation", dp_rank=0, dp_size=1)


def test_blends_that_make_no_sense(blend, data):
    paths = [path for path, _ in blend]
    for weight in (-0.5, float("nan"), float("inf")):
        assert "data.blend[1].weight" in refused(config(blend=[(paths[0], 1), (paths[1], weight)]))
    assert "data.blend: no source has a weight above 0" in refused(config(blend=[(path, 0) for path in paths]))
    again = paths[0] / ".." / paths[0].name
    assert "data.blend[2]" in refused(config(blend=[(paths[0], 1), (paths[1], 1), (again, 1)]))
    assert "set either data.path or data.blend" in refused(config())
    assert "set either data.path or data.blend" in refused(config(data, blend=blend))
    assert "data.num_workers: -1 is negative" in refused(config(data, num_workers=-1))


def test_batches_and_lengths_that_do_not_fit(data):
    loader = build(config(data), "train", dp_rank=1, dp_size=2)
    for bad, said in [
        ({"global_batch_size": 6, "micro_batch_size": 2, "seq_length": S}, "global_batch_size: 6 .* multiple of 4"),
        ({"global_batch_size": 0, "micro_batch_size": 2, "seq_length": S}, "train.global_batch_size"),
        ({"global_batch_size": 4, "micro_batch_size": 0, "seq_length": S}, "train.global_batch_size"),
        ({"global_batch_size": 4, "micro_batch_size": 2, "seq_length": S + 1}, "17 tokens are not between 1 and"),
        ({"global_batch_size": 4, "micro_batch_size": 2, "seq_length": 0}, "0 tokens are not between 1 and"),
    ]:
        with pytest.raises(UserError, match=said):
            loader.micro_batches(0, **bad)
    with pytest.raises(ValueError, match="negative"):
        loader.micro_batches(-1, global_batch_size=4, micro_batch_size=2, seq_length=S)
    with pytest.raises(ValueError, match="dp_rank 2 of dp_size 2"):
        build(config(data), "train", dp_rank=2, dp_size=2)


def test_an_unwritable_cache_folder_that_was_asked_for_is_an_error(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/cache: cannot write the index cache"):
        build(config(data, cache_dir=tmp_path / "file" / "cache"), "train", dp_rank=0, dp_size=1)
