"""Documents of texts and of JSON lines, and what is said of those that cannot be read."""

from __future__ import annotations

import hashlib
import io
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import config, read, tree

from engine.data.formats import lines as json_lines
from engine.data.quarantine import Quarantine, Refused
from engine.data.reading import Reader
from engine.data.sources import list_files
from engine.errors import UserError


def test_file_content_size_and_hash(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    raw = "\ufeffZeile\r\nß\x00".encode()
    (root / "a.txt").write_bytes(raw)
    documents, quarantine, reader = read(config(root))
    assert (documents, quarantine) == ([(f"{root}/a.txt", "\ufeffZeile\r\nß\x00")], [])
    assert (reader.size, reader.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


BINARY = [
    (b"\x89PNG\r\n\x1a\n\x00\x00", "not_utf8", "not UTF-8 text (byte 0x89 at offset 0)"),
    ("hällo".encode("latin-1"), "not_utf8", "not UTF-8 text (byte 0xe4 at offset 1)"),
    ("hello".encode("utf-16-le"), "not_text", "not a text file (NUL bytes)"),
    ("hello".encode("utf-16"), "not_utf8", "UTF-16 text, not UTF-8"),
    (b"ab\x00\x00\x00", "not_text", "not a text file (NUL bytes)"),
]


@pytest.mark.parametrize(("raw", "reason", "detail"), BINARY)
def test_file_that_is_not_text(tmp_path, raw, reason, detail):
    root = tree(tmp_path / "in", "good.txt")
    (root / "bad.txt").write_bytes(raw)
    documents, quarantine, reader = read(config(root))
    assert documents == [(f"{root}/good.txt", "content of good.txt")]
    assert quarantine == [{"file": f"{root}/bad.txt", "line": None, "reason": reason, "detail": detail, "excerpt": ""}]
    assert reader.quarantine.as_manifest() == {"files": 1, "lines": 0, "reasons": {reason: 1}, "samples": quarantine}
    with pytest.raises(UserError, match=r"bad\.txt: ") as error:
        read(config(root / "bad.txt"))
    assert detail in str(error.value)


def test_file_longer_than_allowed_is_hashed_but_not_held(tmp_path):
    raw = ("é" * 4000 + "x").encode()
    (tmp_path / "long.txt").write_bytes(raw)
    cfg = config(tmp_path / "long.txt", max_characters=1000)
    reader = Reader(cfg, Quarantine(io.StringIO()))
    (document,) = reader.read(list_files(cfg).files[0])
    assert (document.truncated, document.text) == (True, "é" * 2000)
    assert (reader.size, reader.sha256) == (8001, hashlib.sha256(raw).hexdigest())


LINES = [
    (b'{"text": "one"}', "one"),
    (b"", None),
    (b'{"text": "\xff"}', ("not_utf8", "not UTF-8 text (byte 0xff at offset 10)")),
    (b'{"text": "two", "n": NaN}', ("not_json", "not JSON (NaN is not JSON)")),
    (b'{"text": "three"', ("not_json", "not JSON (Expecting ',' delimiter at column 17)")),
    (b'{"text": "\\ud800 four"}', "\ud800 four"),
    (b'["text"]', ("not_an_object", "a JSON array, not an object with fields")),
    (b"null", ("not_an_object", "a JSON null, not an object with fields")),
    (b'{"txt": "a", "id": 1}', ("no_text_field", "no field 'text' (fields: txt, id)")),
    (b'{"text": 5}', ("text_not_a_string", "field 'text' holds number, not text")),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("too_deep", "nested too deeply to parse")),
    (b'{"n": ' + b"9" * 5000 + b"}", ("not_json", None)),
    (b"\x00" * 50, ("not_json", "not JSON (Expecting value at column 1)")),
    (b'{"text": "' + b"x" * 2_000_000 + b'"}', ("line_too_long", "longer than 1 MB")),
    ('{"text": "fünf 😀"}\r'.encode(), "fünf 😀"),
    (b'{"text": "last, no newline"}', "last, no newline"),
]


def test_every_kind_of_line(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    path = root / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _ in LINES))
    documents, quarantine, reader = read(config(root, max_line_mb=1))
    wanted = [(f"{path}:{n}", want) for n, (_, want) in enumerate(LINES, 1) if isinstance(want, str)]
    assert documents == wanted
    bad = [(n, *want) for n, (_, want) in enumerate(LINES, 1) if isinstance(want, tuple)]
    assert [(item["line"], item["reason"]) for item in quarantine] == [(n, reason) for n, reason, _ in bad]
    details = [item["detail"] if detail else None for item, (_, _, detail) in zip(quarantine, bad, strict=True)]
    assert details == [detail for _, _, detail in bad]
    assert reader.records == len(LINES) - 1
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.size == path.stat().st_size
    with pytest.raises(UserError) as error:
        reader.check_bad_fraction()
    assert str(error.value) == (
        f"11 of 15 records are unusable, allowed 1.00%; the first is {path}:3: not UTF-8 text (byte 0xff at "
        "offset 10). Mend them, or raise --max_bad_fraction."
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"text,label", "a.jsonl:2: not JSON (Expecting value at column 1). Mend or remove it."),
        (b'{"body": "x", "id": 1}', "a.jsonl:2: no field 'text' (fields: body, id). Name it with --text_field."),
        (b"\xff\xfe", "a.jsonl:2: UTF-16 text, not UTF-8. Convert it with: iconv"),
    ],
)
def test_named_file_whose_first_line_is_no_record_fails_at_once(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + line + b'\n{"text": "good"}\n' * 1000)
    with pytest.raises(UserError) as error:
        read(config(path, max_bad_fraction=1))
    assert message in str(error.value)


def test_text_field_and_threshold(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 199 + "oops\n")
    documents, quarantine, reader = read(config(path, text_field="body"))
    assert (len(documents), len(quarantine)) == (199, 1)
    reader.check_bad_fraction()  # half a percent
    path.write_text('{"body": "x"}\n' * 98 + "oops\n" * 2)
    _, _, reader = read(config(path, text_field="body"))
    with pytest.raises(UserError, match="2 of 100 records are unusable"):
        reader.check_bad_fraction()


@settings(deadline=None, max_examples=150)
@given(sizes=st.lists(st.integers(0, 40), max_size=12), ended=st.booleans(), limit=st.integers(8, 30),
       chunk=st.integers(1, 50), short=st.integers(1, 50))  # fmt: skip
def test_lines_of_any_length_in_any_chunks(sizes, ended, limit, chunk, short):
    """A line of exactly the limit is read, one byte more is too long, wherever the chunks cut it."""
    found = [b'{"":"' + b"x" * (size - 7) + b'"}' if size >= 7 else b" " * size for size in sizes]
    stream = io.BytesIO(b"\n".join(found) + b"\n" * ended)
    with patch.object(json_lines, "CHUNK", chunk):
        rows = list(json_lines.json_lines(lambda size: stream.read(min(size, short)), limit))
    assert [(number, row.reason if isinstance(row, Refused) else len(row[""])) for number, row in rows] == [
        (number, size - 7 if size <= limit else "line_too_long") for number, size in enumerate(sizes, 1) if size >= 7]


@pytest.mark.parametrize("chunk", range(1, 30))
def test_a_byte_order_mark_belongs_at_the_beginning_alone(chunk):
    stream = io.BytesIO(b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}\n{}")
    with patch.object(json_lines, "CHUNK", chunk):
        rows = list(json_lines.json_lines(stream.read, 100))
    assert [(number, row if isinstance(row, dict) else row.reason) for number, row in rows] == [
        (1, {}), (2, "not_json"), (3, {})]  # fmt: skip
    behind = list(json_lines.json_lines(io.BytesIO(b"\xef\xbb\xbf{}").read, 100, first=False))
    assert [row.reason for _, row in behind] == ["not_json"], "in a piece that does not begin its file"


def test_a_line_of_many_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n{"text": "' + b"x" * 20_000_000 + b'"}\n{"text": "after"}\n')
    documents, quarantine, _ = read(config(path, max_line_mb=10))
    assert documents == [(f"{path}:1", "before"), (f"{path}:3", "after")]
    assert [(item["line"], item["reason"]) for item in quarantine] == [(2, "line_too_long")]
    (_, (source, text), _), quarantine, _ = read(config(path))
    assert (source, len(text), quarantine) == (f"{path}:2", 20_000_000, [])
