"""csrc/text counts what a slow Python reference counts, on any text, at any length, in every width of a str."""

from __future__ import annotations

import sys
import threading
import unicodedata
from collections import Counter

import pytest
import text_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from engine._text import FunctionWords, Leaks, Statistics, repetition, scan

FIELDS = [name for name in dir(Statistics) if not name.startswith("_") and name != "mend"]

# Pieces that the counts turn on, so that a few of them in a row meet block borders and each other.
PIECES = [
    "a", "word", "www.", "wwww.x.y", "http://", "https://a.b/c", "://", "http://)", "w", ".", "...", "....", "#",
    " ", "  ", "\n", "\n\n", "\n \t\n", "\t", "\r\n", "\x1c", "\x0b", "\xa0", "7", "0x1f", "\ufffd", "- item", "* b",
    "end.", 'said."', "\u2022 point", "the same line\n", "the same line\n\nagain\n\n", "x" * 40, "\u00e9", "\u2026",
    "\u4e2d\u6587", "\u0660", "\u00bd", "\U0001f600", "\ud800", "\u0301", "\u3002", "Z", "@", "[", "`", "{", "/", ":",
    ";", "\x7f", "\x00",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(st.characters(codec=None), max_size=200)


def counted(text: str | bytes) -> dict[str, int]:
    found = scan(text)
    return {name: getattr(found, name) for name in FIELDS}


@settings(max_examples=400)
@given(TEXTS)
def test_counts(text):
    assert counted(text) == reference.scan(text)


@settings(max_examples=60)
@given(TEXTS, st.sampled_from(["", "\xff", "\u4e2d", "\U0001f600"]))
def test_long_texts_and_every_width(text, wide):
    long = (text * 40)[:5000] + wide
    assert counted(long) == reference.scan(long)


@given(st.text())
def test_bytes_are_utf8(text):
    assert counted(text.encode()) == counted(text)


def test_what_is_no_text():
    with pytest.raises(UnicodeDecodeError):
        scan(b"a\xff")
    for value in (None, 7, ["text"], bytearray(b"x")):
        with pytest.raises(TypeError):
            scan(value)
    assert counted(b"\xed\xa0\x80") == counted("\ud800")


@pytest.mark.parametrize("size", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("char", ["a", " ", ".", "w", "\n", "#", "9", "\u00e9", "\ufffd"])
def test_runs_across_blocks(size, char):
    for text in (char * size, "b" + char * size + "b", char * size + "\nwww.x " + char * size):
        assert counted(text) == reference.scan(text)


@pytest.mark.parametrize("before", range(58, 68))
def test_signs_across_blocks(before):
    for sign in ("...", "....", "www.a", "https://a", "://", "ab", "\n\n", "\r\n", ". .."):
        for rest in ("", " b" * 70):
            text = "x" * (before - 1) + " " + sign + rest
            assert counted(text) == reference.scan(text)


def test_many_lines_and_lengths():
    lines = [f"line {number} " + "y" * (number % 40) for number in range(1000)]
    for text in ("\n".join(lines * 2), "\n\n".join([*lines, *lines[::3]])):
        assert counted(text) == reference.scan(text)
    assert [scan("z" * size).short_lines for size in (29, 30, 31)] == [1, 1, 0]


def test_every_code_point():
    # Under a Python with a newer Unicode, what the table takes for unassigned may be a letter by now.
    assigned = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) != "Cn"]
    table_is_ours = unicodedata.unidata_version == "14.0.0"
    wrong = []
    for char in assigned:
        found = scan(char)
        letter = char.isalnum() and not char.isdecimal()
        if (found.spaces, found.digits, found.letters) != (char.isspace(), char.isdecimal(), letter):
            wrong.append(char)
    assert all(scan(char).mend == 16 for char in wrong)
    assert not (wrong and table_is_ours)


MENDS = {1: "\r", 2: "\ud812", 4: "\x00\x08\x0e\x1f\x7f\x80\x9f\ufeff", 8: "\x0b\x0c"}


@pytest.mark.parametrize("bit", MENDS)
@pytest.mark.parametrize("around", ["", "x" * 70, "\u4e2d" * 70])
def test_what_is_to_be_mended(bit, around):
    for char in MENDS[bit]:
        assert scan(around + char + around).mend == bit
    assert scan(around + " \t\n~" + around).mend == 0


@settings(max_examples=300)
@given(st.text(max_size=30) | st.text("e\u0301\u0327\u1100\u1161\u11a8\u212b\u09c7\u09be\uac00x", max_size=12))
def test_text_without_suspicion_is_nfc(text):
    assert scan(text).mend & 16 or unicodedata.is_normalized("NFC", text)


def test_usual_letters_are_above_suspicion():
    assert scan("Größe, café, Ελληνικά, русский, 中文, 日本語, 한국어, עברית, ไทย, हिन्दी").mend & ~16 == 0
    assert scan("Größe, café, naïve, Ελληνικά, русский, 中文, ありがとう, 한국어").mend == 0


WORDS = st.lists(st.sampled_from(["a", "b", "cc", "\u4e2d", "\u00e9t", "ninewords", "seventeen-letters"]), max_size=60)


@settings(max_examples=200)
@given(WORDS, st.lists(st.integers(1, 12), max_size=4), st.lists(st.integers(1, 12), max_size=4))
def test_repetition(words, top, duplicate):
    text = " \n".join(words)
    assert repetition(text, top, duplicate) == reference.repetition(text, top, duplicate)


def test_repetition_has_bounds():
    words = [f"w{i}" for i in range(1 << 17)]
    assert repetition(" ".join([*words, *words[:1000]]), [1], [1]) == (sum(map(len, words)), [0], [0])
    assert repetition(" ".join([*words[:-5], *words[:5], "more"]), [], [5])[2] == [sum(map(len, words[:5]))]
    for n in (0, -1, 65):
        with pytest.raises(ValueError, match="1 to 64"):
            repetition("a b", [n], [])


def test_threads_do_not_meet():
    text = "some words of a text that is long enough to be scanned without the lock\n" * 2000
    expected, found = counted(text), []
    threads = [threading.Thread(target=lambda: found.append(counted(text))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["der", "Der", "the", "\u0434\u0430", "derr", "l'homme", "\u4e2d"]), max_size=20),
    st.integers(1, 9),
)
def test_function_words(words, times):
    text, lists = " ".join(words * times), [{"der", "Der", "\u0434\u0430"}, {"the", "l"}]
    scripts, total, hits, kinds = FunctionWords([sorted(words) for words in lists]).hints(text)
    found = Counter(reference.words_of(text))
    assert total == found.total()
    assert hits == [sum(min(found[word], max(1, total // 32)) for word in words) for words in lists]
    assert kinds == [len(words & set(found)) for words in lists]
    assert (scripts[2], scripts[10]) == (text.count("\u0434") + text.count("\u0430"), text.count("\u4e2d"))
    assert sum(scripts) == scan(text).letters


def test_hints_are_of_the_beginning():
    scripts, words, hits, kinds = FunctionWords([["x"]]).hints("x " * 40_000)
    assert (scripts[1], words, hits, kinds) == (32_768, 32_768, [1024], [1])
    with pytest.raises(ValueError, match="64"):
        FunctionWords([["a"]] * 65)


SMALL = st.lists(st.sampled_from(["a", "b", "c7", "\u4e2d", "\u0e01\u0e34", "e\u0301"]), max_size=9)


@settings(max_examples=300)
@given(st.lists(st.tuples(SMALL.map(" ".join), st.integers(0, 3)), max_size=6), SMALL.map(", ".join), st.integers(2, 4))
def test_leaks(items, text, n):
    leaks = Leaks(n, 2)
    for item, number in items:
        assert leaks.add(item, number) == len(reference.words_of(item))
    leaks.finish()
    found = leaks.find(text)
    assert {number for number, _, _ in found} == reference.leaks(items, text, n, 2)
    for number, first, last in found:
        assert reference.leaks([(item, i) for item, i in items if i == number], text[first:last], n, 2) == {number}


@given(st.text(max_size=80), st.integers(1, 5))
def test_a_text_leaks_into_itself(text, n):
    leaks = Leaks(n, 1)
    words = leaks.add(text, 63)
    leaks.finish()
    assert words == len(reference.words_of(text))
    assert [number for number, _, _ in leaks.find(f"({text})")] == [63] * (words > 0)


def test_leaks_refuse_what_they_cannot():
    for n, shortest in ((0, 1), (1, 2), (1001, 1), (5, 0)):
        with pytest.raises(ValueError, match="shortest"):
            Leaks(n, shortest)
    leaks = Leaks(3, 3)
    for number in (-1, 64):
        with pytest.raises(ValueError, match="0 to 63"):
            leaks.add("a b c", number)
    with pytest.raises(RuntimeError, match="finish"):
        leaks.find("a")
    assert leaks.finish() == 0
    assert leaks.find("a b c") == []
    with pytest.raises(RuntimeError, match="finish"):
        leaks.add("a b c", 0)
