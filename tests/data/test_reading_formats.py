"""JSON, CSV and TSV, Parquet, Arrow and saved datasets as documents: each with its row, and nothing lost silently."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import config, read, refused

from engine.data.formats import json_array, tables
from engine.data.formats import lines as json_lines
from engine.data.formats.opening import Stream
from engine.data.sources import list_files
from engine.data.units import plan_units
from engine.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
for part in ("feather", "ipc", "parquet"):
    pytest.importorskip(f"pyarrow.{part}")

TEXTS = [f"document {number} é天" for number in range(1000)]


def write(root, name, content):
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root / name


def rows_of(documents) -> list[tuple[int, str]]:
    return [(int(place.rpartition(":")[2]), text) for place, text in documents]


# ---- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "wanted"), [
    ('[{"text": "a"}, {"text": "b"}]', [(1, "a"), (2, "b")]),
    ('{"version": 2, "data": [{"text": "a"}, {"text": "b"}]}', [(1, "a"), (2, "b")]),
    ('{"text": "one\\ndocument", "meta": {"rows": [{"x": 1}]}}', [(1, "one\ndocument")]),
    ('{\n "text": "over",\n "n": 1\n}\n', [(1, "over")]),
    ('{"text": "a"}\n{"text": "b"}\n', [(1, "a"), (2, "b")]),
    ('\n\n{"text": "a"}\n\n \n{"text": "b"}\n{"text": "c"}', [(3, "a"), (6, "b"), (7, "c")]),
    ('{"text": "' + "x" * 3_000_000 + '"}\n{"text": "b"}', [(1, "x" * 3_000_000), (2, "b")]),
    ("[]", []),
])  # fmt: skip
def test_json_of_every_shape(tmp_path, content, wanted):
    path = write(tmp_path / "in", "a.json", content)
    documents, quarantine, reader = read(config(path))
    assert (rows_of(documents), quarantine, reader.records) == (wanted, [], len(wanted))
    assert reader.sha256 == hashlib.sha256(content.encode()).hexdigest()


@settings(deadline=None, max_examples=100)
@given(blanks=st.lists(st.sampled_from(["", " ", " " * 11, "\r", "\t \t"]), max_size=4),
       between=st.lists(st.lists(st.sampled_from(["", " " * 7]), max_size=3), min_size=1, max_size=4),
       indent=st.integers(0, 7), chunk=st.integers(1, 12))  # fmt: skip
def test_json_lines_in_a_json_file_have_their_numbers_in_any_chunks(blanks, between, indent, chunk):
    lines = [*blanks]
    for some in between:
        lines += [" " * indent + '{"text": "a row"}', *some]
    lines.append('{"text": "the last"}')
    with patch.multiple(json_array, _CHUNK=chunk), patch.multiple(json_lines, CHUNK=chunk):
        rows = list(json_array.json_rows(Stream(io.BytesIO("\n".join(lines).encode())), 100))  # type: ignore[arg-type]
    assert rows == [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]


def test_text_inside_another_object_and_a_field_whose_name_has_a_dot(tmp_path):
    lines = [{"a": {"b": "deep"}}, {"a.b": "flat", "a": {"b": "deep"}}, {"a": {"c": 1}}, {"a": "b"}, {"a": {"b": None}}]
    path = write(tmp_path / "in", "a.jsonl", "\n".join(map(json.dumps, lines)))
    documents, quarantine, _ = read(config(path, text_field="a.b"))
    assert rows_of(documents) == [(1, "deep"), (2, "flat")]
    assert [(item["line"], item["detail"]) for item in quarantine] == [
        (3, "no field 'a.b' (fields: a)"), (4, "no field 'a.b' (fields: a)"), (5, "field 'a.b' holds null, not text"),
    ]  # fmt: skip
    one = write(tmp_path / "one", "a.json", '{"a": {"b": "a document"}, "rows": [{"x": 1}]}')
    assert rows_of(read(config(one, text_field="a.b"))[0]) == [(1, "a document")]


def test_an_array_that_breaks_off_keeps_what_came_before(tmp_path):
    write(tmp_path / "in", "a.json", '[{"text": "a"}, {"text": "b"}, 7, {"text": "c"')
    documents, quarantine, _ = read(config(tmp_path / "in"))
    assert rows_of(documents) == [(1, "a"), (2, "b")]
    assert refused(quarantine) == [(3, "not_an_object"), (None, "not_json")]
    assert quarantine[1]["detail"] == "not JSON (Expecting ',' delimiter, row 4), after 3 rows"


@pytest.mark.parametrize(("content", "reason"), [
    ('[{"text": "a"}, {"text": "' + "x" * 4_000_000 + '"}]', "too_long"),
    ('{"rows": [{"text": "' + "x" * 2_000_000 + '"}]}', "too_long"),
    ('{"text": "a"}\n{"text": "' + "x" * 2_000_000 + '"}\n', "line_too_long"),
])  # fmt: skip
def test_what_is_longer_than_allowed(tmp_path, content, reason):
    path = write(tmp_path / "in", "a.json", content)
    documents, quarantine, _ = read(config(tmp_path / "in", max_line_mb=1))
    assert rows_of(documents) == ([(1, "a")] if '"a"' in content else [])
    assert [item["reason"] for item in quarantine] == [reason]
    read(config(path, max_line_mb=5))


def test_a_file_of_something_else_is_one_item_in_a_folder_and_an_error_where_it_is_named(tmp_path):
    """A package.json between the sources, a table of numbers: not a thousand bad records."""
    root = tmp_path / "in"
    write(root, "a.json", json.dumps([{"name": "x"}] * 50))
    write(root, "b.csv", "x,y\n1,2\n3,4\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "m": [3, 4]}), root / "c.parquet")
    pyarrow.feather.write_feather(pyarrow.table({"n": [1, 2]}), root / "d.arrow")
    write(root, "e.json", '{"name": "x", "version": 3}')
    _, quarantine, reader = read(config(root))
    details = ["no field 'text' (fields: name)", "no field 'text' (fields: x, y)", "no column 'text' (columns: n, m)",
               "no column 'text' (columns: n)", "no array of objects in it (fields: name, version)"]  # fmt: skip
    assert [(item["line"], item["detail"]) for item in quarantine] == [(None, detail) for detail in details]
    assert reader.records == 0
    for name, detail in zip("a.json b.csv c.parquet d.arrow e.json".split(), details, strict=True):  # noqa: SIM905
        with pytest.raises(UserError) as error:
            read(config(root / name))
        assert name in str(error.value)
        assert detail in str(error.value)
    assert len(read(config(root / "a.json", text_field="name"))[0]) == 50


# ---- CSV and TSV ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t"])
def test_good_and_bad_records_of_a_table(tmp_path, separator):
    lines = ["\ufeffid,text", "1,one", '2,"over\ntwo lines"', "3,", "4", "5,a,b", "", '6,"stray" quote', "7,seven",
             '"eight",8 "quoted" inside', "9,nine"]  # fmt: skip
    raw = "\r\n".join(lines).replace(",", separator).encode().replace(b"seven", b"se\xffven")
    path = write(tmp_path / "in", f"a.{'csv' if separator == ',' else 'tsv'}", raw)
    documents, quarantine, reader = read(config(path))
    assert rows_of(documents) == [
        (2, "one"), (3, "over\ntwo lines"), (5, ""), (11, '8 "quoted" inside'), (12, "nine")]  # fmt: skip
    assert [(item["line"], item["reason"]) for item in quarantine] == [
        (6, "wrong_number_of_fields"), (7, "wrong_number_of_fields"), (9, "not_csv"), (10, "not_utf8")]  # fmt: skip
    assert quarantine[0]["detail"] == "1 fields under 2 names"
    assert (reader.records, reader.sha256) == (9, hashlib.sha256(raw).hexdigest())


def test_a_line_too_long_in_a_table_costs_its_own_record(tmp_path):
    path = write(tmp_path / "in", "a.csv", "text\na\n" + "x" * 3_000_000 + "\nb\n")
    documents, quarantine, _ = read(config(path, max_line_mb=1))
    assert rows_of(documents) == [(2, "a"), (4, "b")]
    assert refused(quarantine) == [(3, "line_too_long")]


def test_behind_a_field_of_more_lines_than_are_held_nothing_is_taken_for_a_record(tmp_path):
    write(tmp_path / "in", "a.csv", 'text\na\n"' + ("y" * 99 + "\n") * 20_000 + '"\nb\n')
    documents, quarantine, _ = read(config(tmp_path / "in", max_line_mb=1))
    assert rows_of(documents) == [(2, "a")]
    assert [item["detail"] for item in quarantine] == [
        "not CSV (field larger than field limit (1000000), from line 3 on), after 1 rows"]  # fmt: skip


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "the file is empty"), (b"\n1\n", "no header line"), (b'text\na\n"b\nc\n', "from line 3 on"),
    ("text\na\n".encode("utf-16"), "UTF-16 text"), (b"te\xffxt\na\n", "not UTF-8 text"),
])  # fmt: skip
def test_a_table_that_is_none(tmp_path, content, problem):
    path = write(tmp_path / "in", "a.csv", content)
    documents, quarantine, _ = read(config(tmp_path / "in"))
    assert [text for _, text in documents] == (["a"] if b"\nc" in content else [])
    assert [item["line"] for item in quarantine] == [None]
    assert problem in quarantine[0]["detail"]
    with pytest.raises(UserError, match=problem):
        read(config(path))


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
        "words": pyarrow.array(["u", "v", "u"]).dictionary_encode(),
    }))
    for field, wanted, bad in (
        ("text", [(1, "bytes é")], [(2, "not_utf8"), (3, "text_not_a_string")]),
        ("large", [(1, "a"), (3, "b")], [(2, "text_not_a_string")]),
        ("meta.body", [(1, "x")], [(2, "text_not_a_string"), (3, "no_text_field")]),
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
    for given in (tmp_path / "in", tmp_path.__class__(f"hf:{tmp_path}/in"), tmp_path):
        documents, quarantine, _ = read(config(given, output=tmp_path / "out"))
        assert [text for _, text in documents] == TEXTS[:30]
        # In a folder of other things its own descriptions are files like any other.
        assert len(quarantine) == (2 if given == tmp_path else 0)
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
