"""Prepared data in Arrow's format, and several prepared directories as one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from engine.config.prepare import PrepareConfig
from engine.config.prepared_data import ExportDataConfig, MergeDataConfig
from engine.data import merge_data as merging
from engine.data.export_data import export_data
from engine.data.indexed import IndexedDataset, IndexedDatasetWriter
from engine.data.merge_data import merge_data
from engine.data.prepare import prepare
from engine.data.prepared import open_split
from engine.errors import UserError


def raw(folder: Path, name: str, count: int) -> Path:
    path = folder / f"{name}.jsonl"
    rows = [{"text": f"Document {number} of {name}: a naïve spring, wound {number * 7} times, drives the wheel."}
            for number in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """a: with its tokenizer; b: of the same in three shards; c: of another; d: with nothing held out."""
    folder = tmp_path_factory.mktemp("made")
    a = folder / "a"
    common = {"validation_fraction": 0.1, "min_characters": 5}
    prepare(PrepareConfig(input=[raw(folder, "first", 60)], output=a, vocab_size=300, **common))
    same = {"tokenizer": a / "tokenizer"}
    prepare(PrepareConfig(input=[raw(folder, "second", 90)], output=folder / "b", shards="many", unit_mb=0.004,
                          workers=1, **same, **common))  # fmt: skip
    prepare(PrepareConfig(input=[raw(folder, "third", 30)], output=folder / "c", vocab_size=290, **common))
    prepare(PrepareConfig(input=[raw(folder, "fourth", 20)], output=folder / "d", validation_fraction=0, **same))
    return {name: folder / name for name in "abcd"}


def documents(directory: Path, split: str) -> list[list[int]]:
    found = IndexedDataset(directory / split)
    return [found[number].tolist() for number in range(len(found))]


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file()}  # fmt: skip


# ---- Arrow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_the_export_holds_the_same_documents(made, name, tmp_path):
    done = export_data(ExportDataConfig(data=made[name], output=tmp_path / "arrow"))
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert set(found) == {"train", "validation"} == set(done["splits"])
    for split in found:
        assert found[split].column_names == ["tokens"]
        assert str(found[split].data.schema.field("tokens").type) == "list<item: uint16>"
        assert found[split]["tokens"][:] == documents(made[name], split)
        assert len(found[split]) == done["splits"][split]["documents"]
    assert len(found["validation"]) == 0 if name == "d" else len(found["validation"]) > 0
    assert content(tmp_path / "arrow/tokenizer") == content(made[name] / "tokenizer")


def test_text_in_files_of_a_size_read_again_by_prepare(made, tmp_path):
    done = export_data(ExportDataConfig(data=made["b"], output=tmp_path / "arrow", text=True, file_mb=0.001))
    assert done["splits"]["train"]["files"] == 3  # one of each shard's batch
    assert sorted(path.name for path in (tmp_path / "arrow/train").glob("*.arrow"))[2] == "data-00002-of-00003.arrow"
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert found["train"]["tokens"][:] == documents(made["b"], "train")
    texts = sorted(found["train"]["text"][:] + found["validation"]["text"][:])
    assert texts == sorted(json.loads(line)["text"] for line in (made["b"].parent / "second.jsonl").open())
    again = prepare(PrepareConfig(input=[tmp_path / "arrow/train"], output=tmp_path / "again", validation_fraction=0,
                                  tokenizer=made["b"] / "tokenizer"))  # fmt: skip
    assert again["splits"]["train"]["documents"] == len(found["train"])
    assert documents(tmp_path / "again", "train") == documents(made["b"], "train")


def test_batches_end_where_they_should_and_large_vocabularies_are_int32(made, tmp_path, monkeypatch):
    from engine.data import export_data as exporting

    monkeypatch.setattr(exporting, "_BATCH_TOKENS", 10)
    monkeypatch.setattr(exporting, "_BATCH_DOCUMENTS", 3)
    shutil.copytree(made["a"], tmp_path / "wide")
    manifest = json.loads((tmp_path / "wide/manifest.json").read_text())
    lengths = [4, 6, 1, 0, 0, 0, 0, 25, 9, 2]
    for split, sizes in (("train", lengths), ("validation", [0, 0])):
        with IndexedDatasetWriter(tmp_path / "wide" / split, 100_000) as writer:
            for number, length in enumerate(sizes):
                writer.add_document(np.full(length, 65_000 + number))
        manifest["splits"][split] = {}
    (tmp_path / "wide/manifest.json").write_text(json.dumps(manifest))
    export_data(ExportDataConfig(data=tmp_path / "wide", output=tmp_path / "arrow"))
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    train = found["train"]
    assert found["validation"]["tokens"][:] == [[], []]
    assert str(train.data.schema.field("tokens").type) == "list<item: int32>"
    assert train["tokens"][:] == [[65_000 + number] * length for number, length in enumerate(lengths)]
    assert [len(chunk) for chunk in train.data.column("tokens").chunks] == [2, 3, 2, 1, 1, 1]


def test_exports_that_are_refused(made, tmp_path):
    def refused(**changes) -> str:
        with pytest.raises(UserError) as caught:
            export_data(ExportDataConfig(**{"data": made["a"], "output": tmp_path / "arrow"} | changes))
        return str(caught.value)

    assert "/nothing: not a prepared directory" in refused(data=tmp_path / "nothing")
    assert "lies in the data itself" in refused(output=made["a"] / "arrow")
    (tmp_path / "file").write_text("x")
    assert "/file: is a file" in refused(output=tmp_path / "file")
    export_data(ExportDataConfig(data=made["a"], output=tmp_path / "arrow"))
    before = content(tmp_path / "arrow")
    assert "/arrow: exists. Replace it with --overwrite" in refused()
    shutil.copytree(made["a"], tmp_path / "bad")
    with open(tmp_path / "bad/train.bin", "r+b") as file:
        file.write(b"\x07\x00")
    assert "/bad/train.bin: is not the file manifest.json describes" in refused(data=tmp_path / "bad", overwrite=True)
    assert content(tmp_path / "arrow") == before
    assert "is not an export" in refused(output=tmp_path / "bad", overwrite=True)
    export_data(ExportDataConfig(data=made["a"], output=tmp_path / "arrow", overwrite=True))
    assert content(tmp_path / "arrow") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrow", "bad", "file"]


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["many", "one"])
def test_a_merge_is_the_inputs_one_behind_another(made, shards, tmp_path):
    inputs = [made[name] for name in "abd"]
    manifest = merge_data(MergeDataConfig(input=inputs, output=tmp_path / "all", shards=shards))
    for split in ("train", "validation"):
        expected = [document for path in inputs for document in documents(path, split)]
        assert documents(tmp_path / "all", split) == expected
        assert manifest["splits"][split]["documents"] == len(expected)
        assert manifest["splits"][split]["tokens"] == sum(map(len, expected))
        assert open_split(tmp_path / "all", split).tokenizer_sha256 == manifest["tokenizer_sha256"]
    assert manifest["documents"]["kept"] == 60 + 90 + 20
    assert all(path.stat().st_size for path in (tmp_path / "all").glob("*.bin"))  # d has no validation
    assert len(list((tmp_path / "all").glob("train*.bin"))) == (5 if shards == "many" else 1)
    # lineage: each raw file, and each unit's documents where shards.jsonl says
    sources = [json.loads(line) for line in (tmp_path / "all/sources.jsonl").open()]
    whole = [item["path"] for item in sources if not item.get("start")]
    assert whole == ["first.jsonl", "second.jsonl", "fourth.jsonl"]
    assert {item["input"] for item in sources} == {0, 1, 2}
    lines = [json.loads(line) for line in (tmp_path / "all/shards.jsonl").open()]
    assert sorted({item["unit"] for item in sources}) == [0, 1, 2, 3, 4]
    assert {item["unit"] for item in lines} == {item["unit"] for item in sources}
    found = {"train": 0, "validation": 0}
    for item in lines:
        split = item["shard"].partition("-")[0]
        files = IndexedDataset(tmp_path / "all" / split)
        pair = next(one for one in files.pairs if one.bin_path.stem == item["shard"])
        assert pair.bin_path.exists()
        begin = int(pair.pointers[item["first_document"]]) // pair.dtype.itemsize
        tokens = np.frombuffer(memoryview(pair.bin), pair.dtype)[begin : begin + item["tokens"]]
        from hashlib import sha256

        assert sha256(tokens.tobytes()).hexdigest() == item["sha256"]
        found[split] += item["documents"]
    assert found == {split: manifest["splits"][split]["documents"] for split in found}


def test_shards_are_linked_not_copied_and_copied_where_links_cannot_be(made, tmp_path, monkeypatch):
    merge_data(MergeDataConfig(input=[made["a"], made["b"]], output=tmp_path / "linked"))
    ours, theirs = tmp_path / "linked/train-00000-of-00004.bin", made["a"] / "train.bin"
    assert ours.samefile(theirs)

    def cannot(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(merging.os, "link", cannot)
    merge_data(MergeDataConfig(input=[made["a"], made["b"]], output=tmp_path / "copied"))
    assert not (tmp_path / "copied/train-00000-of-00004.bin").samefile(theirs)
    assert content(tmp_path / "copied") == content(tmp_path / "linked")


def test_a_merge_is_reused_merged_again_and_replaced(made, tmp_path):
    config = MergeDataConfig(input=[made["a"], made["b"]], output=tmp_path / "ab")
    first, said = merge_data(config), []
    assert merge_data(config, log=said.append) == first
    assert "used as it is" in said[0]
    assert os.listdir(tmp_path) == ["ab"]
    with pytest.raises(UserError, match="merged from something else"):
        merge_data(MergeDataConfig(input=[made["b"], made["a"]], output=tmp_path / "ab"))
    whole = merge_data(MergeDataConfig(input=[tmp_path / "ab", made["d"]], output=tmp_path / "abd", shards="one"))
    straight = merge_data(MergeDataConfig(input=[made[x] for x in "abd"], output=tmp_path / "all", shards="one"))
    assert whole["splits"] == straight["splits"]
    assert [(tmp_path / name / "shards.jsonl").read_bytes() for name in ("abd", "all")] == [
        (tmp_path / "all/shards.jsonl").read_bytes()] * 2
    merge_data(MergeDataConfig(input=[made["b"]], output=tmp_path / "ab", overwrite=True))
    assert documents(tmp_path / "ab", "train") == documents(made["b"], "train")


def test_other_fractions_are_said(made, tmp_path):
    said: list[str] = []
    merge_data(MergeDataConfig(input=[made["a"], made["d"]], output=tmp_path / "ad"), log=said.append)
    assert len(said) == 1
    assert "validation_fraction 0" in said[0]


def test_every_byte_is_hashed_unless_that_is_left_out(made, tmp_path, monkeypatch):
    from engine.data import prepared

    monkeypatch.setattr(prepared, "HASHED_BYTES", 0)  # opening a large file does not read it
    shutil.copytree(made["b"], tmp_path / "bad")
    with open(tmp_path / "bad/train-00001-of-00003.bin", "r+b") as file:
        file.write(b"\x07\x00")
    config = {"input": [made["a"], tmp_path / "bad"], "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"/bad/train-00001-of-00003\.bin: damaged"):
        merge_data(MergeDataConfig(**config))
    assert merge_data(MergeDataConfig(**config, verify=False))["splits"]["train"]["documents"] > 0


def test_merges_that_are_refused(made, tmp_path):
    def refused(*inputs: Path, **changes) -> str:
        with pytest.raises(UserError) as caught:
            merge_data(MergeDataConfig(**{"input": list(inputs), "output": tmp_path / "out"} | changes))
        return str(caught.value)

    a, b = made["a"], made["b"]
    assert f"{made['c']}: is of another tokenizer than {a} (tokenizer_sha256" in refused(a, made["c"])
    assert "not a prepared directory" in refused(a, tmp_path)
    assert "is named twice" in refused(a, b, a)
    assert "lies in the input" in refused(a, b, output=a / "out")
    assert "lies in the input" in refused(a, b, output=a)
    assert "is not merged data" in refused(a, output=b, overwrite=True)
    shutil.copytree(b, tmp_path / "bad")
    damaged = tmp_path / "bad/train-00001-of-00003.bin"
    bytes_of = bytearray(damaged.read_bytes())
    bytes_of[10] ^= 1
    damaged.write_bytes(bytes_of)
    assert str(damaged) in refused(a, tmp_path / "bad")
    shutil.rmtree(tmp_path / "bad")
    shutil.copytree(a, tmp_path / "bad")
    shutil.copytree(made["c"] / "tokenizer", tmp_path / "bad/tokenizer", dirs_exist_ok=True)
    assert "not the tokenizer of the manifest" in refused(tmp_path / "bad", b)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
