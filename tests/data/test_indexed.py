"""The .bin/.idx pair against megatron-core's own reader and writer, and every kind of damage."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from engine import _index
from engine.data import indexed_writer
from engine.data.indexed import DTYPES, IndexedDataset, IndexedDatasetWriter, dtype_code, reading
from engine.data.indexed_writer import write_index
from engine.errors import UserError

lengths = st.lists(st.one_of(st.just(0), st.just(1), st.integers(2, 40)), max_size=30)
same_folder = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def documents_of(sizes, vocab_size=1000, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size) for size in sizes]


def write(prefix: Path, documents, vocab_size=1000) -> Path:
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def megatron_write(prefix: Path, documents, dtype) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@same_folder
@given(sizes=lengths, vocab_size=st.sampled_from([1000, 65499, 65500, 200_000]))
def test_the_files_are_megatrons_byte_for_byte(tmp_path, sizes, vocab_size):
    documents = documents_of(sizes, vocab_size)
    ours = write(tmp_path / "ours", documents, vocab_size)
    theirs = megatron_write(tmp_path / "theirs", documents, np.uint16 if vocab_size < 65500 else np.int32)
    assert bytes_of(ours) == bytes_of(theirs)


@pytest.mark.parametrize("vocab_size", [1000, 200_000])
def test_megatron_reads_what_we_write(tmp_path, vocab_size):
    documents = documents_of([3, 0, 1, 500, 17], vocab_size)
    theirs = MegatronDataset(str(write(tmp_path / "train", documents, vocab_size)))
    assert len(theirs) == 5
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    for document, expected in enumerate(documents):
        np.testing.assert_array_equal(theirs[document], expected)
    np.testing.assert_array_equal(theirs.get(3, offset=100, length=50), documents[3][100:150])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_we_read_what_megatron_writes(tmp_path, dtype):
    documents = documents_of([3, 0, 1, 500, 17], vocab_size=127)
    ours = IndexedDataset(megatron_write(tmp_path / "train", documents, dtype))
    assert (len(ours), ours.num_tokens, ours.dtype) == (5, 521, np.dtype(dtype))
    assert ours.sizes.tolist() == [3, 0, 1, 500, 17]
    assert ours.sizes.dtype == np.int32
    for document, expected in enumerate(documents):
        np.testing.assert_array_equal(ours[document], expected)
        assert ours[document].dtype == dtype
    np.testing.assert_array_equal(ours[-1], documents[-1])
    np.testing.assert_array_equal(ours.get(3, 100, 50), documents[3][100:150])
    np.testing.assert_array_equal(ours.get(3, 499), documents[3][499:])


def test_we_read_documents_of_several_sequences_and_multimodal_files(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.arange(5), [2, 3], [0, 1])
    builder.add_document(torch.arange(5, 9), [4], [1])
    builder.finalize(str(tmp_path / "m.idx"))
    ours = IndexedDataset(tmp_path / "m")
    assert [ours[i].tolist() for i in range(len(ours))] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    assert ours.document_indices.tolist() == [0, 2, 3]


def test_views_are_zero_copy_and_read_only(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "train", documents_of([8])))
    assert not dataset[0].flags.writeable
    assert np.shares_memory(dataset[0], dataset.get(0, 2, 3))


def test_reading_outside_a_document_is_an_index_error(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "train", documents_of([8, 4])))
    for document, offset, length in ((2, 0, 1), (-3, 0, 1), (0, 4, 5), (0, -1, 2), (0, 9, None), (1, 0, -1)):
        with pytest.raises(IndexError):
            dataset.get(document, offset, length)


def test_fingerprint_is_the_content_hash_of_the_index(tmp_path):
    first = write(tmp_path / "a", documents_of([5, 6], seed=0))
    dataset = IndexedDataset(first)
    assert dataset.fingerprint == hashlib.sha256(bytes_of(first)[1]).hexdigest()
    assert dataset.bin_sha256() == [hashlib.sha256(bytes_of(first)[0]).hexdigest()]
    assert IndexedDataset(write(tmp_path / "b", documents_of([5, 6], seed=1))).fingerprint == dataset.fingerprint
    assert IndexedDataset(write(tmp_path / "c", documents_of([6, 5], seed=0))).fingerprint != dataset.fingerprint


def test_an_empty_dataset_is_a_pair_too(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "train", []))
    assert (len(dataset), dataset.num_tokens) == (0, 0)
    dataset = IndexedDataset(write(tmp_path / "zeros", documents_of([0, 0])))
    assert (len(dataset), dataset.num_tokens, dataset[1].tolist()) == (2, 0, [])


def test_dtype_codes_are_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    assert {code: DType.dtype_from_code(code) for code in DTYPES} == DTYPES
    for code, dtype in DTYPES.items():
        assert _index.item_size(code) == np.dtype(dtype).itemsize
    assert [_index.item_size(code) for code in (0, 6, 7, 9, 255)] == [0] * 5
    for vocab_size in (2, 65499, 65500, 10**6):
        assert DTYPES[dtype_code(vocab_size)] == DType.optimal_dtype(vocab_size)


# ---- damage -------------------------------------------------------------------------------------------------------


def refused(prefix: Path) -> str:
    with pytest.raises(UserError) as caught:
        IndexedDataset(prefix)
    message = str(caught.value)
    assert str(prefix) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("end", ["bin", "idx"])
def test_a_missing_file_is_named_with_its_partner(tmp_path, end):
    prefix = write(tmp_path / "train", documents_of([5]))
    Path(f"{prefix}.{end}").unlink()
    message = refused(prefix)
    assert f"train.{end}: file not found (train.{'idx' if end == 'bin' else 'bin'} is there)" in message
    assert "mainspring prepare" in message


def test_every_truncation_is_found(tmp_path):
    prefix = write(tmp_path / "train", documents_of([5, 0, 9, 1]))
    for end, whole in zip(("bin", "idx"), bytes_of(prefix), strict=True):
        path = Path(f"{prefix}.{end}")
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            assert str(path) in refused(prefix)
        path.write_bytes(whole + b"\0")
        assert str(path) in refused(prefix)
        path.write_bytes(whole)
    assert len(IndexedDataset(prefix)) == 4


def test_every_flipped_bit_of_the_index_is_found(tmp_path):
    prefix = write(tmp_path / "train", documents_of([5, 0, 9, 1, 3, 3]))
    path, whole = Path(f"{prefix}.idx"), bytes_of(prefix)[1]
    survivors = []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            IndexedDataset(prefix)
        except UserError:
            continue
        survivors.append(bit)
    # A document boundary moved between its neighbours is a legal file: only the manifest's hash tells (prepared.py).
    documents_at = 8 * (34 + 6 * 12)
    assert all(bit >= documents_at for bit in survivors), survivors
    assert len(survivors) < 20


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0, b"PK\3\4", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\7", "dtype code 7 is no integer type"),
        (17, b"\4", "points to byte"),  # int32 where the file has uint16
        (18, struct.pack("<Q", 2**61), "truncated"),
        (18, struct.pack("<Q", 2**64 - 1), "truncated"),
        (26, struct.pack("<Q", 2**63), "truncated"),
        (26, struct.pack("<Q", 2), "8 bytes too many"),
        (34, struct.pack("<i", -5), "negative length"),
        (34 + 8, struct.pack("<q", 4), "points to byte 4"),
        (34 + 24, struct.pack("<q", 1), "begin with 0"),
        (34 + 24 + 8, struct.pack("<q", 3), "goes backwards"),
        (34 + 24 + 16, struct.pack("<q", 1), "ends at 1"),
    ],
)
def test_a_damaged_index_says_what_is_wrong(tmp_path, offset, value, said):
    prefix = write(tmp_path / "train", documents_of([5, 7]))
    path, content = Path(f"{prefix}.idx"), bytearray(bytes_of(prefix)[1])
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    assert said in refused(prefix)


def test_a_bin_of_another_dtype_or_dataset_is_refused(tmp_path):
    narrow, wide = write(tmp_path / "a", documents_of([5, 7])), write(tmp_path / "b", documents_of([5, 7]), 100_000)
    shutil.copy(f"{wide}.bin", f"{narrow}.bin")
    message = refused(narrow)
    assert "too long: 48 bytes" in message
    assert "12 tokens of type uint16, 24 bytes" in message
    write(narrow, documents_of([5, 8]))
    shutil.copy(f"{write(tmp_path / 'c', documents_of([5, 7]))}.bin", f"{narrow}.bin")
    assert "truncated: 24 bytes" in refused(narrow)


def test_garbage_never_crashes_the_parser():
    rng = random.Random(7)
    for _ in range(2000):
        header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, rng.choice([4, 8]), rng.getrandbits(rng.choice([2, 4, 64])),
                                              rng.getrandbits(rng.choice([2, 4, 64])))
        with pytest.raises(ValueError, match=r"."):
            _index.check_tables(header + rng.randbytes(rng.randrange(200)))


def test_a_bin_truncated_while_open_is_an_error_not_a_crash(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "train", documents_of([100_000])))
    with open(tmp_path / "train.bin", "r+b") as file:
        file.truncate(10)
    out = np.empty(10, np.int64)
    with pytest.raises(UserError, match="truncated: 10 bytes"), reading([dataset]):
        dataset.corpus.gather(np.array([[90_000, 10, 0]]), out, out.copy())


def test_an_index_truncated_while_open_is_an_error_not_a_crash(tmp_path):
    """Also of the last of many shards, which are looked at in turns."""
    for number in range(40):
        write(tmp_path / f"train-{number:05d}-of-00040", documents_of([1] * 5_000))
    dataset, out = IndexedDataset(tmp_path / "train"), np.empty(10, np.int64)

    def read(times: int):
        with reading([dataset]):
            for _ in range(times):
                dataset.corpus.gather(np.array([[9, 10, 0]]), out, out.copy())

    read(9)
    os.truncate(tmp_path / "train-00039-of-00040.idx", 100)
    with pytest.raises(UserError, match=r"train-00039-of-00040\.idx: truncated while it is read: 100 bytes of 1"):
        read(3)


def test_an_index_edited_while_open_leads_nowhere_outside_the_bin(tmp_path):
    dataset, out = IndexedDataset(write(tmp_path / "train", documents_of([100]))), np.empty(5_000, np.int64)
    with open(tmp_path / "train.idx", "r+b") as file:
        file.seek(34)
        file.write(struct.pack("<i", 10**6))
    with pytest.raises(IndexError, match=r"a document leaves the \.bin"):
        dataset.corpus.gather(np.array([[0, 5_000, 0]]), out, out.copy())


def test_a_bin_replaced_while_open_is_read_as_it_was(tmp_path):
    old, new = documents_of([100], seed=1), documents_of([50], seed=2)
    dataset = IndexedDataset(write(tmp_path / "train", old))
    write(tmp_path / "train", new)
    out = np.empty(10, np.int64)
    with reading([dataset]):
        dataset.corpus.gather(np.array([[80, 10, 0]]), out, out.copy())
    assert out.tolist() == old[0][80:90].tolist()


def test_threads_find_the_same_first_fault():
    """In an index of several ranges of the parallel check: one wrong entry, or two of which the first is named."""
    choose = np.random.default_rng(0)
    sizes = choose.integers(0, 9, 900_000).astype(np.int32)
    file = io.BytesIO()
    write_index(file, [sizes], 8)
    whole = np.frombuffer(file.getvalue(), np.uint8)
    assert _index.check_tables(whole, 4) == _index.check_tables(whole, 1) == sizes.sum()
    tables = {"has the negative length": (34, 4, 900_000), "points to byte": (34 + 4 * 900_000, 8, 900_000),
              "goes backwards at entry": (34 + 12 * 900_000, 8, 900_001)}
    for said, (start, item, count) in tables.items():
        for _ in range(3):
            wrong, places = whole.copy(), sorted(choose.choice(np.arange(2, count), 2, replace=False).tolist())
            for place in places:
                wrong[start + place * item : start + (place + 1) * item] = 255  # the value -1
            messages = set()
            for threads in (1, 2, 5):
                with pytest.raises(ValueError, match=said) as caught:
                    _index.check_tables(wrong, threads)
                messages.add(str(caught.value))
            assert len(messages) == 1
            assert str(places[0]) in messages.pop()


# ---- the writer ---------------------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing_and_keeps_the_old_pair(tmp_path):
    prefix = write(tmp_path / "train", documents_of([5]))
    before = bytes_of(prefix)

    def interrupted():
        yield np.arange(900)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(prefix, interrupted())
    assert bytes_of(prefix) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.idx"]


def test_nothing_is_at_the_prefix_before_close(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "new" / "train", 1000)
    writer.add_document(np.arange(900))
    assert not (tmp_path / "new" / "train.bin").exists()
    writer.close()
    writer.close()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["train.bin", "train.idx"]
    assert writer.num_tokens == 900


@pytest.mark.parametrize(("tokens", "said"), [([3, 1000], "token 1000"), ([-1, 3], "token -1"), ([2**40], "token 109")])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, tokens, said):
    with pytest.raises(UserError, match=f"document 1 has {said}"):
        write(tmp_path / "train", [np.array([1, 2]), np.array(tokens)])
    assert list(tmp_path.iterdir()) == []


@same_folder
@given(sizes=lengths, cuts=st.lists(st.integers(0, 30), max_size=4), piece=st.integers(1, 9))
def test_many_documents_at_once_are_the_same_as_one_by_one(tmp_path, sizes, cuts, piece):
    documents = documents_of(sizes)
    one_by_one = bytes_of(write(tmp_path / "one", documents))
    with pytest.MonkeyPatch.context() as patch, IndexedDatasetWriter(tmp_path / "many", 1000) as writer:
        patch.setattr(indexed_writer, "_PIECE", piece)  # the index is written in many pieces too
        for part in np.split(np.arange(len(sizes)), sorted(min(cut, len(sizes)) for cut in cuts)):
            flat = np.concatenate([np.empty(0, np.int64), *(documents[i] for i in part)])
            writer.add_documents(flat.astype(np.uint32), np.array([sizes[i] for i in part], np.int32))
        assert (writer.num_documents, writer.num_tokens) == (len(sizes), sum(sizes))
        writer.close()
    assert bytes_of(tmp_path / "many") == one_by_one


def test_a_wrong_token_in_a_batch_is_named_by_its_document_and_nothing_of_the_batch_is_kept(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "train", 1000)
    writer.add_documents(np.arange(5), np.array([2, 0, 3]))
    for tokens, said in (([1, 2, 3, 1000], "document 6 has token 1000"), ([1, -2, 3, 4], "document 4 has token -2")):
        with pytest.raises(UserError, match=said):
            writer.add_documents(np.array(tokens), np.array([1, 1, 0, 2]))
    for lengths_n in ([4, 1], [5, -1], [3]):
        with pytest.raises(ValueError, match="there are 4"):
            writer.add_documents(np.arange(4), np.array(lengths_n))
    with pytest.raises(TypeError, match="the lengths must be a 1-D array"):
        writer.add_documents(np.arange(4), np.array([4.0]))
    writer.close()
    assert [document.tolist() for document in IndexedDataset(tmp_path / "train")] == [[0, 1], [], [2, 3, 4]]


def test_a_document_too_long_for_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_writer, "LONGEST", 9)
    with pytest.raises(UserError, match=r"document 1 has 10 tokens, the format allows 9\. Split the document"):
        write(tmp_path / "train", [np.arange(9), np.arange(10)])


@pytest.mark.parametrize("tokens", [np.ones(3), np.ones((2, 2), int)])
def test_a_document_is_one_row_of_integers(tmp_path, tokens):
    with pytest.raises(TypeError, match="1-D array of integers"):
        write(tmp_path / "train", [tokens])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        IndexedDatasetWriter(tmp_path / "file" / "train", 10)


@pytest.mark.parametrize("call", [1, 2, 3], ids=["bin", "idx", "folder"])
def test_a_full_disk_is_a_user_error_and_leaves_no_pair(tmp_path, monkeypatch, call):
    calls = iter(range(1, 10))

    def fsync(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "train", documents_of([9]))
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    assert (tmp_path / "train.idx").exists() == (call == 3)  # the folder's sync comes when both are whole


def test_a_crash_between_the_renames_leaves_no_mixed_pair(tmp_path, monkeypatch):
    """Old and new have the same lengths, so nothing but the missing .idx could tell them apart."""
    prefix, replace = write(tmp_path / "train", documents_of([9], seed=1)), os.replace

    def crash(source, target):
        if target.endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, documents_of([9], seed=2))
    assert "train.idx: file not found" in refused(prefix)
