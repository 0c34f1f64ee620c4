"""Rows of every kind of file, the order of files, and what cannot be read: named by file and row, nothing else lost."""

from __future__ import annotations

import gzip
import io
import json

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.stages import Source
from engine.data.chat import rows
from engine.data.formats import json_array
from engine.data.formats.opening import Stream
from engine.data.quarantine import Quarantine
from engine.errors import UserError

ROWS = [{"instruction": "é世", "output": "A\nB"}, {"instruction": "Q,2", "output": 'say "x"'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path, **settings):
    noted = io.StringIO()
    found = list(rows.read(Source(path=str(path), **settings), Quarantine(noted)))
    return found, [json.loads(line) for line in noted.getvalue().splitlines()]


def table(separator: str) -> str:
    return f'instruction{separator}output\né世{separator}"A\nB"\n"Q,2"{separator}"say ""x"""\n'


@pytest.mark.parametrize(("name", "content", "places"), [
    ("a.jsonl", LINES, [1, 2]),
    ("a.ndjson", "\n" + LINES, [2, 3]),
    ("a.jsonl", "\ufeff" + LINES, [1, 2]),
    ("a.json", json.dumps(ROWS), [1, 2]),
    ("a.json", "\ufeff  " + json.dumps(ROWS, indent=2), [1, 2]),
    ("a.json", json.dumps({"version": 1, "data": ROWS}), [1, 2]),
    ("a.json", json.dumps({"meta": [1], "stuff": ROWS}, indent=1), [1, 2]),
    ("a.json", LINES, [1, 2]),
    ("a.csv", table(","), [2, 4]),
    ("a.csv", ("\ufeff" + table(",")).replace("\n", "\r\n").replace("A\r\nB", "A\nB"), [2, 4]),
    ("a.tsv", table("\t"), [2, 4]),
])  # fmt: skip
@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_files(tmp_path, name, content, places, suffix, pack):
    path = tmp_path / (name + suffix)
    path.write_bytes(pack(content.encode()))
    found, noted = read(path)
    assert [row for _, row in found] == ROWS
    assert [place for place, _ in found] == [f"{path}:{number}" for number in places]
    assert not noted


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables(tmp_path, packed, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    whole = io.BytesIO()
    messages = [{"messages": [{"role": "user", "content": "Q"}], "n": 1}, {"messages": [], "n": None}]
    table = pyarrow.Table.from_pylist(messages)
    if suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, whole, row_group_size=1)
    else:
        pytest.importorskip("pyarrow.feather").write_feather(table, whole, chunksize=1)
    path = tmp_path / (f"a{suffix}" + ".gz" * packed)
    path.write_bytes(gzip.compress(whole.getvalue()) if packed else whole.getvalue())
    assert read(path) == ([(f"{path}:1", messages[0]), (f"{path}:2", messages[1])], [])
    half = tmp_path / f"half{suffix}"
    half.write_bytes(whole.getvalue()[:-40])
    with pytest.raises(UserError, match=rf"half\{suffix}: not a whole (Parquet|Arrow) file"):
        read(half)


def test_text_is_a_document_a_file_or_what_blank_lines_separate(tmp_path):
    text = "one\ntwo\n\n\n  three\n"
    (tmp_path / "a.txt").write_text(text)
    found, _ = read(tmp_path / "a.txt")
    assert found == [(f"{tmp_path}/a.txt:1", {"text": "one\ntwo"}), (f"{tmp_path}/a.txt:5", {"text": "  three"})]
    assert read(tmp_path)[0] == [(f"{tmp_path}/a.txt:1", {"text": text})]


def test_a_folder_in_order_without_what_is_hidden(tmp_path):
    for name in ("b/2.jsonl", "b/10.jsonl", "a.jsonl", ".hidden/x.jsonl", "c.png", "b/.y.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for _, row in read(tmp_path)[0]] == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert [row["text"] for _, row in read(tmp_path, split="b")[0]] == ["b/10.jsonl", "b/2.jsonl"]
    with pytest.raises(UserError, match="no file of split 'test'"):
        read(tmp_path, split="test")


def test_bad_rows_are_noted_and_the_others_read(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "x"}\n'
    bad = [b"{\n", b'"text"\n', b'{"text": NaN}\n', b'{"text": "\xff"}\n', b"[" * 20000 + b"\n"]
    path.write_bytes(good + b"".join(line + good for line in bad))
    found, noted = read(path)
    assert [place.rpartition(":")[2] for place, _ in found] == ["1", "3", "5", "7", "9", "11"]
    assert [(item["line"], item["reason"]) for item in noted] == [
        (2, "not_json"), (4, "not_an_object"), (6, "not_json"), (8, "not_utf8"), (10, "too_deep")]  # fmt: skip
    assert {item["file"] for item in noted} == {str(path)}


def test_a_line_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_MAX_LINE", 16)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": "' + "x" * 60 + '"}\n{"c": 3}\n')
    found, noted = read(path)
    assert found == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"c": 3})]
    assert [(item["line"], item["reason"]) for item in noted] == [(2, "line_too_long")]


def test_csv_with_other_numbers_of_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3\n4,5,6\n\n7,\n")
    found, noted = read(path)
    assert found == [(f"{path}:2", {"a": "1", "b": "2"}), (f"{path}:6", {"a": "7", "b": None})]
    assert [(item["line"], item["reason"]) for item in noted] == [
        (3, "wrong_number_of_fields"), (4, "wrong_number_of_fields")]  # fmt: skip


BROKEN = {
    "empty.json": b"", "half.json": b'[{"a": 1}, {"a"', "cut.json": b'[{"a": 1},', "open.json": b'[{"a": 1}',
    "more.json": b'[{"a": 1}] x', "between.json": b'[{"a": 1} {"a": 2}]', "text.json": b"hello", "number.json": b"3",
    "two.json": b'{"x": [{"a": 1}], "y": [{"a": 2}]}', "none.json": b'{"x": 1}', "bytes.json": b'[{"a": "\xff"}]',
    "bad.jsonl.gz": b"not gzip", "cut.jsonl.gz": gzip.compress(b'{"a": 1}\n' * 99)[:-9], "nohead.csv": b"\n1,2\n",
    "quote.csv": b'a,b\n1,"2\n3,4\n', "utf16.txt": "hi".encode("utf-16"), "no.parquet": b"PAR1",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_where_named_and_noted_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    (tmp_path / "z.jsonl").write_text('{"good": 1}\n')
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    found, noted = read(tmp_path)
    assert found[-1] == (f"{tmp_path}/z.jsonl:1", {"good": 1})
    assert [item["file"] for item in noted if item["line"] is None] == [str(tmp_path / name)]


def test_rows_of_an_array_that_is_no_array_of_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 2, {"a": 3}]')
    found, noted = read(path)
    assert [row for _, row in found] == [{"a": 1}, {"a": 3}]
    assert [(item["line"], item["reason"]) for item in noted] == [(2, "not_an_object")]
    path.write_text("[]")
    assert read(path) == ([], [])
    path.write_text('{"messages": [{"role": "user"}]}')
    assert [row for _, row in read(path)[0]] == [{"messages": [{"role": "user"}]}]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers() | st.none())),
       chunk=st.integers(1, 9), indent=st.sampled_from([None, 1]))  # fmt: skip
def test_an_array_is_the_same_in_any_chunks(monkeypatch, found, chunk, indent):
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    raw = json.dumps(found, ensure_ascii=True, indent=indent).encode()
    assert list(json_array.json_rows(Stream(io.BytesIO(raw)), 1 << 20)) == list(enumerate(found, 1))


@pytest.mark.parametrize("chunk", range(1, 9))
def test_an_element_that_is_no_object_is_whole_in_any_chunks(monkeypatch, chunk):
    """A number that the buffer cuts off is a number, too."""
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    found = json_array.json_rows(Stream(io.BytesIO(b'[12345, {"a": 1}, true, 1.5, 2e+7, 678]')), 1 << 20)
    assert [(number, row if isinstance(row, dict) else row.reason) for number, row in found] == [
        (number, {"a": 1} if number == 2 else "not_an_object") for number in range(1, 7)]


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="no readable file"):
        read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png: \.png files are not read"):
        read(tmp_path / "a.png")


def test_saved_datasets_and_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == ([(f"{tmp_path}/one:1", ROWS[0]), (f"{tmp_path}/one:2", ROWS[1])], [])
    assert [row for _, row in read(tmp_path / "both")[0]] == ROWS
    assert [row for _, row in read(tmp_path / "both", split="test")[0]] == ROWS[1:]
    with pytest.raises(UserError, match=r"no split 'dev' \(there are train, test\)"):
        read(tmp_path / "both", split="dev")
    assert len({rows.fingerprint(Source(path=str(tmp_path / name), split=split))
                for name, split in (("one", None), ("both", None), ("both", "test"))}) == 3  # fmt: skip


def test_a_dataset_of_the_hub_that_cannot_be_loaded(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"someone/chats: cannot load the dataset \(no network here\)"):
        read("someone/chats")


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(LINES)
    first, second = (Source(path=str(tmp_path / folder)) for folder in ("a", "b"))
    assert rows.fingerprint(first) == rows.fingerprint(second)
    before = rows.fingerprint(second)
    (tmp_path / "b" / "x.jsonl").write_text(LINES[:-2] + "]\n")
    assert rows.fingerprint(second) != before
