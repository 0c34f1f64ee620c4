"""Repairs give exactly the text they should, rules drop exactly at their threshold, code keeps its shape."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.cleaning import MAX_RUN, RULES, Cleaner, Limits, repair, select_rules
from engine.errors import UserError

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds.\n"


@pytest.mark.parametrize(
    ("raw", "mended", "names"),
    [
        ("a\r\nb\rc\n", "a\nb\nc\n", ["newlines"]),
        ("\ufeffa\x00b\x1bc\x7f\x85d", "abcd", ["control_characters"]),
        ("a\x0cb\x0bc", "a\nb\nc", ["page_breaks"]),
        ("cafe\u0301 \u212b", "caf\u00e9 \u00c5", ["unicode_nfc"]),
        ("x\ud800y\udfff", "x\ufffdy\ufffd", ["surrogates"]),
        ("e\x00\u0301", "\u00e9", ["control_characters", "unicode_nfc"]),
        ("plain\ttext \n", "plain\ttext \n", []),
    ],
)
def test_repairs_of_prose(raw, mended, names):
    assert repair(raw, "prose") == (mended, names)


def test_code_keeps_its_whitespace_and_literals():
    code = '\x0cdef f():\t# e\u0301\n\t    return "\u212b"   \n\n\n\x0b'
    assert repair(code, "code") == (code, [])
    assert repair("if x:\r\n\ty\x00\r\n", "code") == ("if x:\n\ty\n", ["newlines", "control_characters"])


@given(st.text(st.characters(codec=None)), st.sampled_from(["prose", "code"]))
def test_repair_is_idempotent_and_encodable(text, kind):
    mended, _ = repair(text, kind)
    assert repair(mended, kind) == (mended, [])
    mended.encode()
    assert "\r" not in mended
    assert "\x00" not in mended
    if kind == "prose":
        assert unicodedata.is_normalized("NFC", mended)


def lines(count: int, repeated: int) -> str:
    """``count`` lines of one length, of which ``repeated`` stood before."""
    return "".join(f"this is line {max(i, repeated):04}\n" for i in range(count))


@pytest.mark.parametrize(
    ("rule", "kind", "dropped", "kept"),
    [
        ("empty", "prose", " \n\t\u3000" * 10, PROSE),
        ("too_short", "code", "x" * 15, "x" * 16),
        ("too_long", "prose", "word " * 200 + "x", "word " * 200),
        ("unreadable", "code", "\ufffd" * 11 + "a" * 89, "\ufffd" * 10 + "a" * 90),
        ("few_letters", "prose", "abcd 12345678 90 123", "abcde 1234567890 12345"),
        ("few_letters", "prose", "12 34 56 78 90 12 34 56", "12 天地玄黄 宇宙洪荒 日月盈昃"),
        ("mostly_links", "prose", "see https://example.com/page now", "see this other page https://example.com/"),
        ("repeated_lines", "prose", lines(20, 11), lines(20, 10)),
        ("minified", "code", "a = 1; " * 71 + "b = 2", "a = 1; " * 71 + "b=2"),
    ],
)
def test_rule_drops_at_its_threshold(rule, kind, dropped, kept):
    cleaner = Cleaner(limits=Limits(min_characters=16, max_characters=1000))
    assert cleaner.clean(kept, kind, "kept") == kept
    assert not cleaner.report.dropped
    assert cleaner.clean(dropped, kind, "file:7") is None
    assert cleaner.report.dropped == {rule: 1}
    assert cleaner.report.samples == {rule: [{"source": "file:7", "excerpt": dropped[:80]}]}


@pytest.mark.parametrize("unit", ["a", " "])
def test_long_run(unit):
    rule = next(rule for rule in RULES if rule.name == "long_run")
    before, after = ("words and ", " words") if unit == "a" else ("and words", "words")
    assert not rule.drops(before * MAX_RUN + unit * MAX_RUN + after, Limits())
    assert rule.drops(before * 9 + unit * (MAX_RUN + 1) + after, Limits())


def test_prose_rules_leave_code_alone():
    table = "TABLE = [\n" + "    (0x00, 0x01, 0x02),\n" * 40 + "]\n"
    cleaner = Cleaner()
    assert cleaner.clean(table, "code", "t.py") == table
    assert cleaner.clean(table, "prose", "t.txt") is None


def test_counts_of_documents_and_few_samples():
    cleaner = Cleaner()
    for number in range(5):
        assert cleaner.clean("short", "prose", f"f{number}") is None
    assert cleaner.clean(PROSE.replace("\n", "\r\n") * 3, "prose", "g") == PROSE * 3
    manifest = cleaner.report.as_manifest(cleaner.rules)
    assert manifest["repairs"] == {"newlines": 1}
    assert manifest["rules"]["too_short"]["documents"] == 5
    assert [sample["source"] for sample in manifest["rules"]["too_short"]["samples"]] == ["f0", "f1", "f2"]
    assert list(manifest["rules"]) == [rule.name for rule in RULES]
    assert sum(rule["documents"] for rule in manifest["rules"].values()) == 5


def test_skipped_rule_does_not_drop():
    rules = select_rules(["few_letters"])
    assert len(rules) == len(RULES) - 1
    assert Cleaner(rules=rules).clean("1234567890 " * 3, "prose", "f") == "1234567890 " * 3
    with pytest.raises(UserError, match=r"skip_rule: no quality rule 'few_leters' to skip\. Rules: unreadable, "):
        select_rules(["few_leters"])
    with pytest.raises(UserError, match="too_long"):
        select_rules(["too_long"])


def test_truncated_document_is_too_long_whatever_its_repair():
    cleaner = Cleaner(limits=Limits(max_characters=100))
    assert cleaner.clean("\r\n" * 60, "prose", "f", truncated=True) is None
    assert cleaner.report.dropped == {"too_long": 1}
