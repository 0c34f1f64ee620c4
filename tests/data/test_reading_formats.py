"""JSON, CSV and TSV as documents: each with its row, and nothing lost silently."""

from __future__ import annotations

import hashlib
import io
import json
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import config, read, refused, rows_of, write

from engine.data.formats import json_array
from engine.data.formats import lines as json_lines
from engine.data.formats.opening import Stream
from engine.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")


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
    parquet.write_table(pyarrow.table({"n": [1, 2], "m": [3, 4]}), root / "c.parquet")
    feather.write_feather(pyarrow.table({"n": [1, 2]}), root / "d.arrow")
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
