"""Shards as one dataset, pairs joined into one, and the start of a run on a very large dataset that is known."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from pathlib import Path

import naive_order as naive
import numpy as np
import pytest
import torch
from datafiles import loader_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from engine import _index
from engine.data import concatenate as concatenate_module
from engine.data import indexed, indexed_writer, verified
from engine.data.concatenate import concatenate
from engine.data.index_cache import IndexCache
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter, shard_name
from engine.data.loader import build
from engine.data.samples import SampleIndex
from engine.errors import UserError

VOCAB = 1000
lengths = st.lists(st.integers(0, 9), max_size=12)
same_folder = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(prefix: Path, sizes, seed: int = 0, vocab_size: int = VOCAB) -> Path:
    random = np.random.default_rng([seed, *sizes])
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        writer.add_documents(random.integers(0, VOCAB, int(sum(sizes))), np.array(sizes, np.int64))
    return prefix


def write_shards(prefix: Path, shards) -> list[Path]:
    return [write(prefix.parent / shard_name(prefix.name, number, len(shards)), sizes, number)
            for number, sizes in enumerate(shards)]


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def documents_of(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


def refused(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- one dataset in shards ------------------------------------------------------------------------------------------


@same_folder
@given(shards=st.lists(lengths, min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_shards_are_their_documents_one_behind_another(tmp_path, shards, seed):
    folder = tmp_path / f"{seed}-{len(shards)}"
    single = [documents_of(prefix) for prefix in write_shards(folder / "train", shards)]
    dataset = IndexedDataset(folder / "train")
    expected = [document for documents in single for document in documents]
    assert [document.tolist() for document in dataset] == expected
    assert [dataset.get(n, 1).tolist() for n, d in enumerate(expected) if d] == [d[1:] for d in expected if d]
    assert (len(dataset), dataset.num_tokens) == (len(expected), sum(map(len, expected)))
    assert dataset.sizes.tolist() == [len(document) for document in expected]
    assert dataset.document_indices.tolist() == list(range(len(expected) + 1))
    if expected:
        assert dataset[-1].tolist() == expected[-1]
    for outside in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            dataset[outside]


def test_the_fingerprint_of_shards_follows_every_shard_and_their_order(tmp_path):
    def fingerprint(name, *shards):
        write_shards(tmp_path / name / "train", shards)
        return IndexedDataset(tmp_path / name / "train").fingerprint

    found = [fingerprint("a", [1, 2], [3]), fingerprint("b", [1], [2, 3]), fingerprint("c", [3], [1, 2])]
    assert len(set(found)) == 3
    assert fingerprint("d", [1, 2], [3]) == found[0]


def test_a_pair_whose_name_begins_alike_is_no_shard(tmp_path):
    write(tmp_path / "train", [3])
    write(tmp_path / "train-extra", [4])
    write(tmp_path / "train2-00000-of-00001", [5])
    (tmp_path / "train-00000-of-00002.bin.tmp-77").write_bytes(b"x")
    assert IndexedDataset(tmp_path / "train").sizes.tolist() == [3]


@pytest.mark.parametrize("lost", ["-00000-of-00003.bin", "-00001-of-00003.idx", "-00002-of-00003.bin"])
def test_a_missing_shard_is_named(tmp_path, lost):
    write_shards(tmp_path / "train", [[1], [2], [3]])
    (tmp_path / f"train{lost}").unlink()
    message = refused(IndexedDataset, tmp_path / "train")
    assert f"{tmp_path}/train{lost}: file not found" in message


def test_shards_that_cannot_be_one_dataset_are_refused(tmp_path):
    write_shards(tmp_path / "train", [[1], [2]])
    write(tmp_path / "train-00001-of-00002", [2], vocab_size=100_000)
    assert "train-00001-of-00002.idx: has tokens of type int32, train-00000-of-00002.idx has uint16" in refused(
        IndexedDataset, tmp_path / "train")
    write(tmp_path / "train-00000-of-00003", [1])
    assert "shards of two sets, of 00002 and of 00003" in refused(IndexedDataset, tmp_path / "train")
    write(tmp_path / "train", [1])
    assert "both train.bin/.idx and shards of it (of 00002). Remove the older" in refused(
        IndexedDataset, tmp_path / "train")
    write(tmp_path / "b-00002-of-00002", [1])
    assert "shard 2 of 2 cannot be" in refused(IndexedDataset, tmp_path / "b")


@pytest.mark.parametrize("small", [0, 2**20], ids=["in threads", "in turn"])
def test_damage_in_any_shard_is_found_at_open(tmp_path, monkeypatch, small):
    """Promise 15 for shards: a truncated or flipped file is refused by its own name."""
    monkeypatch.setattr(indexed, "_SMALL", small)
    prefixes = write_shards(tmp_path / "train", [[5, 3], [0, 7], [2, 1]])
    for prefix in prefixes:
        for end, whole in zip(("bin", "idx"), bytes_of(prefix), strict=True):
            path = Path(f"{prefix}.{end}")
            damaged = [whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"]
            damaged += [whole[:34] + bytes([whole[34] ^ 4]) + whole[35:]] if end == "idx" else []
            for content in damaged:
                path.write_bytes(content)
                assert str(prefix) in refused(IndexedDataset, tmp_path / "train")
            path.write_bytes(whole)
    swapped = [bytes_of(prefix)[1] for prefix in prefixes]
    Path(f"{prefixes[0]}.idx").write_bytes(swapped[1])
    assert "the two files are not one pair" in refused(IndexedDataset, tmp_path / "train")


def prepared(folder: Path, shards) -> Path:
    """A directory as `prepare` leaves it, in shards, with what the manifest says of each."""
    described = [
        {"name": prefix.name, "documents": len(sizes), "tokens": sum(sizes)}
        | {f"{end}_sha256": hashlib.sha256(content).hexdigest()
           for end, content in zip(("bin", "idx"), bytes_of(prefix), strict=True)}
        for prefix, sizes in zip(write_shards(folder / "train", shards), shards, strict=True)
    ]
    manifest = {"vocab_size": VOCAB, "splits": {"train": {"tokens": sum(map(sum, shards)), "shards": described}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_loader_reads_shards_and_holds_each_against_the_manifest(tmp_path):
    shards = [[40, 0, 30], [0], [100, 7, 60], [90]]
    folder = prepared(tmp_path / "data", shards)
    whole = tmp_path / "whole"
    concatenate([folder / "train"], whole / "train")
    rows = []
    for path in (folder, whole):
        with build(loader_config(path), "train", dp_rank=0, dp_size=1) as loader:
            batches = loader.micro_batches(0, global_batch_size=40, micro_batch_size=8, seq_length=16)
            rows.append(torch.cat([batch.tokens_bs for batch in batches]).tolist())
    blocks = naive.blocks_in_order(documents_of(whole / "train"), 16, 1, 0)
    assert rows[0] == rows[1]
    assert rows[0][: len(blocks)] == [block[:-1] for block in blocks]

    def build_it():
        build(loader_config(folder), "train", dp_rank=0, dp_size=1)

    path = folder / "train-00002-of-00004.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert "train-00002-of-00004.bin: is not the file manifest.json describes (bin_sha256" in refused(build_it)
    path.write_bytes(content)
    build_it()
    with open(path, "r+b") as file:
        loader = build(loader_config(folder), "train", dp_rank=0, dp_size=1)
        file.truncate(10)
    with pytest.raises(UserError, match=r"train-00002-of-00004\.bin: truncated: 10 bytes"):
        list(loader.micro_batches(0, global_batch_size=40, micro_batch_size=8, seq_length=16))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].pop()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path.write_bytes(content)
    assert "has 4 shards, manifest.json describes 3" in refused(build_it)


# ---- joining --------------------------------------------------------------------------------------------------------


@same_folder
@given(shards=st.lists(lengths, min_size=1, max_size=5), piece=st.integers(1, 5))
def test_joined_pairs_are_the_bytes_of_one_that_was_written_whole(tmp_path, shards, piece):
    folder = tmp_path / "x"
    prefixes = [write(folder / f"{number}", sizes, number) for number, sizes in enumerate(shards)]
    with IndexedDatasetWriter(tmp_path / "whole", VOCAB) as writer:
        for prefix in prefixes:
            for document in IndexedDataset(prefix):
                writer.add_document(document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_writer, "_PIECE", piece)
        concatenate(prefixes, tmp_path / "joined")
    assert bytes_of(tmp_path / "joined") == bytes_of(tmp_path / "whole")


def test_documents_of_several_sequences_keep_them(tmp_path):
    for name, documents in (("a", [[2, 3], [4]]), ("b", [[1], [0, 5, 1], []])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for sizes in documents:
            builder.add_document(torch.arange(sum(sizes)), sizes)
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merged = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for name in ("a", "b"):
        merged.add_index(str(tmp_path / name))
    merged.finalize(str(tmp_path / "theirs.idx"))
    concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "ours")
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "theirs")
    assert IndexedDataset(tmp_path / "ours").document_indices.tolist() == [0, 2, 3, 4, 7, 7]
    for number, name in enumerate(("a", "b")):
        for end in ("bin", "idx"):
            os.link(tmp_path / f"{name}.{end}", tmp_path / f"s-0000{number}-of-00002.{end}")
    assert IndexedDataset(tmp_path / "s").document_indices.tolist() == [0, 2, 3, 4, 7, 7]


def test_nothing_to_join(tmp_path):
    with pytest.raises(ValueError, match="nothing to concatenate"):
        concatenate([], tmp_path / "none")
    concatenate([], tmp_path / "none", 100_000)
    empty = IndexedDataset(tmp_path / "none")
    assert (len(empty), empty.dtype) == (0, np.int32)


WAYS = ["copy_file_range", "sendfile", "read"]


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, 0], ids=str)
@pytest.mark.parametrize("able", WAYS)
def test_every_way_of_copying_gives_the_same_bytes(tmp_path, monkeypatch, able, answer):
    """A file system may refuse a way of copying, or stop after a part of the file."""
    prefixes = [write(tmp_path / f"{n}", [300, 200, n], n) for n in range(3)]
    concatenate(prefixes, tmp_path / "whole")
    expected = bytes_of(tmp_path / "whole")
    monkeypatch.setattr(concatenate_module, "_CHUNK", 100)
    for way in WAYS[: WAYS.index(able)]:
        real, calls = getattr(os, way), []

        def some(*args, calls=calls, real=real, **options):
            calls.append(1)
            if len(calls) % 3 == 0:
                if answer:
                    raise OSError(answer, "not here")
                return 0
            return real(*args, **options)

        monkeypatch.setattr(os, way, some)
    concatenate(prefixes, tmp_path / "joined")
    assert bytes_of(tmp_path / "joined") == expected


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    prefixes = [write(tmp_path / "in" / f"{n}", [5], n) for n in range(2)]

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        assert "No space left on device. Free space there" in refused(concatenate, prefixes, tmp_path / "out" / "train")
        assert list((tmp_path / "out").iterdir()) == []
    wide = write(tmp_path / "wide", [5], vocab_size=100_000)
    message = refused(concatenate, [*prefixes, wide], tmp_path / "out" / "train")
    assert "wide.bin: has tokens of type int32" in message
    assert "one tokenizer" in message
    with open(f"{prefixes[1]}.bin", "ab") as file:
        file.write(b"xx")
    assert "1.bin: too long: 12 bytes" in refused(concatenate, prefixes, tmp_path / "out" / "train")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_ends_early_is_an_error(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    with (open(tmp_path / "short", "rb") as source, open(tmp_path / "out", "wb") as target,
          pytest.raises(OSError, match="short is 3 bytes long, not 5")):
        concatenate_module.copy(source, target, 5)


# ---- a warm start ---------------------------------------------------------------------------------------------------


def test_a_known_dataset_of_a_billion_documents_starts_in_a_second(tmp_path, monkeypatch):
    """10^9 documents of 500 tokens, all holes but the lengths that the first rows need: an index of 20 GB, tokens of
    1 TB, of which an honest check would read every byte. The tokens of the groups are in the cache, and what the check
    found is noted as if it had been made."""
    documents, size, seq_length = 10**9, 500, 4096
    groups = -(-documents // 512)
    with open(tmp_path / "train.idx", "wb") as idx:
        idx.write(np.array(b"MMIDIDX", "S9").tobytes() + np.array([1], "<u8").tobytes() + b"\x08")
        idx.write(np.array([documents, documents + 1], "<u8").tobytes())
        idx.truncate(34 + 20 * documents + 8)
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2 * size * documents)
    cache, clock = tmp_path / "cache", verified.now_ns
    prefix = tmp_path / "train"
    known = verified.Verified(cache, prefix)
    known.note(Path(f"{prefix}.idx"), _index.Map(f"{prefix}.idx"), {"tokens": size * documents, "sha256": "f" * 64},
               clock() + 10**10)
    known.save()
    totals = np.full(groups, 512 * size, np.int64)
    totals[documents % groups or groups:] -= size  # the last groups have one document fewer
    assert totals.sum() == size * documents
    IndexCache(cache).load_or_build(f"{'f' * 16}.groups", {"format": 2, "idx_sha256": "f" * 64, "group": 512}, groups,
                                    lambda: totals)
    monkeypatch.setattr(_index, "check_tables", lambda *_: pytest.fail("read all of the index"))

    begun = time.perf_counter()
    index = SampleIndex(IndexedDataset(prefix, remember=cache), seq_length, 7, IndexCache(cache))
    _, blocks = index.locate(np.arange(4))
    elapsed = time.perf_counter() - begun
    assert index.blocks_per_epoch == (size * documents - 1) // seq_length

    for block in blocks.tolist():  # the lengths of the group that the block begins in, and of the next
        place = block * seq_length // (512 * size)  # near enough: the few shorter groups shift it by less than one
        with open(f"{prefix}.idx", "r+b") as idx:
            for group in _index.permuted(np.arange(max(0, place - 1), place + 3), groups, 7, 0, 0).tolist():
                for document in range(group, documents, groups):
                    os.pwrite(idx.fileno(), np.array([size], "<i4").tobytes(), 34 + 4 * document)
    pieces = np.stack([[0, turn, 0, seq_length, turn * seq_length] for turn in range(4)])
    tokens = np.full((4, seq_length), -1, np.int64)
    begun = time.perf_counter()
    _index.gather([index.order], pieces, tokens, np.empty_like(tokens))
    elapsed += time.perf_counter() - begun
    assert not tokens.any()
    limit = 120 if os.environ.get("MAINSPRING_SANITIZED") else 1  # the sanitizers' code is no measure of time
    assert elapsed < limit, f"{elapsed:.2f} s"
