"""Parquet, Arrow and saved datasets as documents: the same in any pieces, and nothing lost silently."""

from __future__ import annotations

import hashlib
import io
import sys
from types import SimpleNamespace

import pytest
from readings import config, read, refused, rows_of, write

from engine.data.formats import tables
from engine.data.sources import list_files
from engine.data.units import plan_units
from engine.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
for part in ("feather", "ipc", "parquet"):
    pytest.importorskip(f"pyarrow.{part}")

TEXTS = [f"document {number} é天" for number in range(1000)]


# ---- Parquet and Arrow ----------------------------------------------------------------------------------------------


def parquet(path, table, **options):
    pyarrow.parquet.write_table(table, path, **{"row_group_size": 100} | options)


def arrow_file(path, table):
    pyarrow.feather.write_feather(table, path, compression="lz4", chunksize=100)


def arrow_stream(path, table):
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=100)


TABLES = pytest.mark.parametrize(("name", "writes"), [
    ("a.parquet", parquet), ("a.feather", arrow_file), ("a.arrow", arrow_stream)])  # fmt: skip


@TABLES
@pytest.mark.parametrize("size", ["one", "some", "all"])
def test_a_table_is_the_same_in_any_pieces(tmp_path, name, writes, size, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH_ROWS", 70)
    path = tmp_path / "in" / name
    path.parent.mkdir()
    writes(path, pyarrow.table({"id": range(1000), "text": TEXTS, "more": TEXTS}))
    groups = tables.row_groups(path, "parquet" if name == "a.parquet" else "arrow")
    assert [rows for rows, _ in groups] == [100] * 10
    cfg = config(path, unit_mb={"one": 1, "some": 3.5 * groups[0][1] / 1e6, "all": 1e-5}[size])
    units = plan_units(list_files(cfg), cfg)
    assert len(units) in {"one": [1], "some": [4, 5], "all": [10]}[size]
    assert {piece.start % 100 for unit in units for piece in unit.slices} == {0}
    documents, quarantine, reader = read(cfg)
    assert rows_of(documents) == list(enumerate(TEXTS, 1))
    assert (quarantine, reader.records) == ([], 1000)
    first = units[0].slices[0]
    assert len(list(reader.read(first))) == (first.end or 1000)
    assert (reader.sha256, reader.size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@TABLES
def test_an_arrow_file_under_a_limit_on_addresses_is_read_from_its_beginning(tmp_path, name, writes, monkeypatch):
    def denied(path):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pyarrow, "memory_map", denied)
    path = tmp_path / "in" / name
    path.parent.mkdir()
    writes(path, pyarrow.table({"text": TEXTS}))
    assert rows_of(read(config(path, unit_mb=0.00001))[0]) == list(enumerate(TEXTS, 1))


@TABLES
def test_columns_of_other_types(tmp_path, name, writes):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    writes(path, pyarrow.table({
        "text": pyarrow.array([b"bytes \xc3\xa9", b"\xff", None], pyarrow.binary()),
        "large": pyarrow.array(["a", None, "b"], pyarrow.large_string()),
        "meta": [{"body": "x", "n": 1}, {"body": None, "n": 2}, None],
        "meta.note": ["p", "q", "r"],
        "words": pyarrow.array(["u", "v", "u"]).dictionary_encode(),
    }))
    for field, wanted, bad in (
        ("text", [(1, "bytes é")], [(2, "not_utf8"), (3, "text_not_a_string")]),
        ("large", [(1, "a"), (3, "b")], [(2, "text_not_a_string")]),
        ("meta.body", [(1, "x")], [(2, "text_not_a_string"), (3, "no_text_field")]),
        ("meta.note", [(1, "p"), (2, "q"), (3, "r")], []),
        ("words", [(1, "u"), (2, "v"), (3, "u")], []),
    ):
        documents, quarantine, _ = read(config(path, text_field=field))
        assert (rows_of(documents), refused(quarantine)) == (wanted, bad)


def test_text_in_a_table_that_is_not_utf8_costs_its_own_row(tmp_path):
    broken = pyarrow.StringArray.from_buffers(
        3, pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xffb"))
    path = tmp_path / "in" / "a.arrow"
    path.parent.mkdir()
    arrow_stream(path, pyarrow.table({"text": broken}))
    documents, quarantine, _ = read(config(path))
    assert (rows_of(documents), refused(quarantine)) == ([(1, "a"), (3, "b")], [(2, "not_utf8")])


@TABLES
def test_a_table_cut_short(tmp_path, name, writes):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    writes(path, pyarrow.table({"text": TEXTS}))
    raw = path.read_bytes()
    for at in (0, 5, len(raw) // 2, len(raw) - 9):
        path.write_bytes(raw[:at])
        documents, quarantine, _ = read(config(path.parent, unit_mb=0.00001))
        assert rows_of(documents) == list(enumerate(TEXTS, 1))[: len(documents)]
        # An Arrow stream without its end mark is whole where it ends between two batches.
        assert [item["line"] for item in quarantine] == [None] or (name == "a.arrow" and len(documents) == 1000)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"not a whole (Parquet|Arrow) file .* Fetch or write it again"):
        read(config(path))


def test_batches_are_small_where_documents_are_large(tmp_path, monkeypatch):
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    parquet(path, pyarrow.table({"text": [str(n) * 1000 for n in range(10)]}), use_dictionary=False)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 3000)
    sizes = []
    taken = tables._rows
    monkeypatch.setattr(tables, "_rows", lambda batches, number: taken(
        (sizes.append(batch.num_rows) or batch for batch in batches), number))
    assert len(read(config(path))[0]) == 10
    assert max(sizes) <= 3


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_without_pyarrow_the_line_to_install_it_is_said(tmp_path, monkeypatch, name):
    path = write(tmp_path / "in", name, b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=rf"{name}: .* files need pyarrow\. pip install pyarrow"):
        read(config(path.parent))


# ---- datasets -------------------------------------------------------------------------------------------------------


def save(root, names, texts=TEXTS[:30], shards=3):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": texts})
    if names:
        datasets.DatasetDict({name: one.select([k]) for k, name in enumerate(names)}).save_to_disk(root)
    else:
        one.save_to_disk(root, num_shards=shards)


def test_a_saved_dataset(tmp_path):
    save(tmp_path / "in", [])
    arrow_stream(tmp_path / "in/cache-0123.arrow", pyarrow.table({"text": ["a row a second time"]}))
    for folder in (tmp_path / "in", tmp_path.__class__(f"hf:{tmp_path}/in"), tmp_path):
        documents, quarantine, _ = read(config(folder, output=tmp_path / "out"))
        assert [text for _, text in documents] == TEXTS[:30]
        # In a folder of other things its own descriptions are files like any other.
        assert len(quarantine) == (2 if folder == tmp_path else 0)
    with pytest.raises(UserError, match="one dataset without splits, so none is 'test'"):
        read(config(tmp_path.__class__(f"hf:{tmp_path}/in:test"), output=tmp_path / "out"))


def test_splits_of_a_saved_dataset(tmp_path):
    save(tmp_path / "in", ["train", "test"])
    name = tmp_path.__class__
    for split, text in (("train", TEXTS[0]), ("test", TEXTS[1])):
        assert [t for _, t in read(config(name(f"hf:{tmp_path}/in:{split}"), output=tmp_path / "out"))[0]] == [text]
    with pytest.raises(UserError, match=r"several splits \(there are train, test\)\. Give one: hf:.*/in:train"):
        read(config(tmp_path / "in"))
    with pytest.raises(UserError, match=r"no split 'dev' \(there are train, test\)"):
        read(config(name(f"hf:{tmp_path}/in:dev"), output=tmp_path / "out"))
    save(tmp_path / "only", ["all"])
    assert [text for _, text in read(config(tmp_path / "only"))[0]] == TEXTS[:1]


@pytest.mark.parametrize(("given", "asked"), [
    ("someone/stories", ("someone/stories", None, "train")),
    ("someone/stories:test", ("someone/stories", None, "test")),
    ("someone/stories:small:test", ("someone/stories", "small", "test")),
])  # fmt: skip
def test_a_dataset_of_the_hub(tmp_path, monkeypatch, given, asked):
    datasets = pytest.importorskip("datasets")
    arrow_stream(tmp_path / "cached.arrow", pyarrow.table({"text": TEXTS[:5]}))
    calls = []

    def load(path, name, *, split):
        calls.append((path, name, split))
        return SimpleNamespace(cache_files=[{"filename": str(tmp_path / "cached.arrow")}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents, _, _ = read(config(tmp_path.__class__(f"hf:{given}"), output=tmp_path / "out"))
    assert [text for _, text in documents] == TEXTS[:5]
    assert calls == [asked]


@pytest.mark.parametrize("name", ["someone/x:train[:10%]", "a:b:c:d"])
def test_a_part_of_a_split_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="no name of a dataset on the hub, nor a folder"):
        list_files(config(tmp_path.__class__(f"hf:{name}"), output=tmp_path / "out"))


def test_the_message_of_an_io_error_of_a_table_is_the_systems(tmp_path, monkeypatch):
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    parquet(path, pyarrow.table({"text": TEXTS}))

    class Failing(io.FileIO):
        def __init__(self, *args, **kwargs):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Failing)
    _, quarantine, _ = read(config(path.parent))
    assert [(item["reason"], item["detail"]) for item in quarantine] == [("unreadable", "Input/output error")]
