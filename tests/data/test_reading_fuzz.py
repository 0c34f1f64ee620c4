"""Promise 16: ten thousand malformed lines. The good documents come through exactly, every bad line is in quarantine
with its file and number, and too many of them fail the run. Python's json says which is which."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from readings import config, read

from engine.data.prepare import prepare
from engine.errors import UserError

LINES = 10_000
LONG = 100_000_000  # bytes


def constant(name):
    raise ValueError(name)


def judged(raw: bytes) -> str | bool | None:
    """The text of a good line, False for a bad one, None for a blank one."""
    if not raw.strip():
        return None
    try:
        found = json.loads(raw.decode(), parse_constant=constant)
    except (ValueError, RecursionError):
        return False
    return found["text"] if isinstance(found, dict) and isinstance(found.get("text"), str) else False


def damaged(raw: bytes, fuzz: random.Random) -> bytes:
    """One of the ways in which lines are broken in the wild, or seem to be."""
    at = fuzz.randrange(len(raw) + 1)
    kind = fuzz.randrange(10)
    if kind == 0:  # cut
        return raw[:at]
    if kind == 1:  # bytes that are nowhere in UTF-8, overlong, an encoded surrogate, a mark in the middle, controls
        pieces = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\x1f", b"\r", b"\xf4\x90\x80\x80"]
        return raw[:at] + fuzz.choice(pieces) + raw[at:]
    if kind == 2:  # one bit
        at = min(at, len(raw) - 1)
        return (raw[:at] + bytes([raw[at] ^ 1 << fuzz.randrange(8)]) + raw[at + 1 :]).replace(b"\n", b"")
    if kind == 3:
        values = [b"NaN", b"-Infinity", b"Infinity", b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"01",
                  b"+1", b"9" * 6000, b"1e999", b"-0", b"1.", b"\x00", b"'x'", b'"\\ud83d"', b'"\\udc00\\ud800"',
                  b'"\\x41"', b"[[]]" * 2, b"18446744073709551616"]  # fmt: skip
        return raw.replace(b'"id": ', b'"id": ' + fuzz.choice(values) + b', "n": ', 1)
    if kind == 4:
        return fuzz.choice([b"", b"   ", b"\t", b"\r", b"null", b'"text"', b"[1]", b"{}", b"7", b"\xef\xbb\xbf", b"}{"])
    if kind == 5:  # another field, twice the field (the last counts), two records on a line
        again = raw[:-1] + b', "text": "second"}'
        return fuzz.choice([raw.replace(b'"text"', b'"txt"'), raw[:-1] + b', "text": 5}', again, raw + raw, raw + b",",
                            raw.replace(b'"', b"'")])  # fmt: skip
    if kind == 6:
        return raw.decode(errors="replace").encode(fuzz.choice(["utf-16", "utf-16-le", "latin-1", "utf-7"]), "replace"
                                                   ).replace(b"\n", b"")  # fmt: skip
    return raw + fuzz.choice([b"", b"\r", b" ", b"\x00", b"\t"])


@dataclass
class Fuzzed:
    path: Path
    texts: list[tuple[int, str]]
    bad: list[int]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Fuzzed:
    fuzz, lines = random.Random(16), []
    for number in range(LINES):
        text = "".join(fuzz.choice("aß天😀\n\t\"\\ \x00é}{,") for _ in range(fuzz.randrange(40)))
        text += f" and a document of its own, number {number}"
        raw = json.dumps({"id": number, "text": text}, ensure_ascii=fuzz.random() < 0.5).encode()
        if fuzz.random() < 0.1:
            raw = raw.replace(b'"text": "', b'"text": "\\ud800 ', 1)
        lines.append(damaged(raw, fuzz) if fuzz.random() < 0.6 else raw)
    judgements = [judged(raw) for raw in lines]
    path = tmp_path_factory.mktemp("fuzz") / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join(lines))
    texts = [(number, found) for number, found in enumerate(judgements, 1) if isinstance(found, str)]
    bad = [number for number, found in enumerate(judgements, 1) if found is False]
    assert len(texts) > 5000
    assert len(bad) > 2500
    return Fuzzed(path, texts, bad)


@pytest.mark.parametrize("unit_mb", [64, 0.05])
def test_good_lines_are_documents_and_bad_ones_are_named(fuzzed, unit_mb):
    documents, quarantine, reader = read(config(fuzzed.path.parent, unit_mb=unit_mb))
    assert documents == [(f"{fuzzed.path}:{number}", text) for number, text in fuzzed.texts]
    assert [(item["file"], item["line"]) for item in quarantine] == [(str(fuzzed.path), line) for line in fuzzed.bad]
    assert reader.records == len(fuzzed.texts) + len(fuzzed.bad)


def test_the_same_packed(fuzzed, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl.gz").write_bytes(gzip.compress(fuzzed.path.read_bytes(), 1))
    documents, quarantine, _ = read(config(root))
    assert [text for _, text in documents] == [text for _, text in fuzzed.texts]
    assert [item["line"] for item in quarantine] == fuzzed.bad


def test_through_prepare_with_a_line_of_a_hundred_megabytes(fuzzed, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    lines = fuzzed.path.read_bytes().split(b"\n")
    middle = LINES // 2
    with open(root / "a.jsonl", "wb") as stream:
        stream.write(b"\n".join(lines[:middle]) + b'\n{"text": "')
        stream.write(b"x" * LONG)
        stream.write(b'"}\n' + b"\n".join(lines[middle:]))
    bad = sorted([middle + 1, *(number + (number > middle) for number in fuzzed.bad)])
    settings = {"vocab_size": 300, "workers": 1, "unit_mb": 0.5, "max_line_mb": 10, "min_characters": 0,
                "tokenizer_sample_mb": 0.1}  # fmt: skip
    with pytest.raises(UserError) as error:
        prepare(config(root, **settings))
    assert f"{len(bad):,} of {len(bad) + len(fuzzed.texts):,} records are unusable, allowed 1.00%; the first is " \
           f"{root}/a.jsonl:{bad[0]}: " in str(error.value)  # fmt: skip
    assert not (tmp_path / "out").exists()
    manifest = prepare(config(root, **settings, max_bad_fraction=0.9))
    assert manifest["documents"]["read"] == len(fuzzed.texts)
    assert manifest["quarantine"]["lines"] == len(bad)
    quarantine = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(item["file"], item["line"]) for item in quarantine] == [(f"{root}/a.jsonl", line) for line in bad]
    assert [item["reason"] for item in quarantine if item["line"] == middle + 1] == ["line_too_long"]
