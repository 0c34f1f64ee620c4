"""Repairs give exactly the text they should, rules drop exactly at their threshold, code keeps its shape."""

from __future__ import annotations

import json
import unicodedata

import pytest
import text_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from engine._text import scan
from engine.config.cleaning import CleaningConfig
from engine.data import cleaning_rules
from engine.data.cleaning import RULES, Cleaner, CleaningReport, Limits, repair, rules_of, select_rules
from engine.data.cleaning_rules import FINEWEB, GOPHER, MAX_RUN
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


MANY = "".join(f"word{number} " for number in range(200))


def lines(count: int, repeated: int) -> str:
    """``count`` lines of one length, of which ``repeated`` stood before."""
    return "".join(f"this is line {max(i, repeated):04}\n" for i in range(count))


@pytest.mark.parametrize(
    ("rule", "kind", "dropped", "kept"),
    [
        ("empty", "prose", " \n\t\u3000" * 10, PROSE),
        ("too_short", "code", "x" * 15, "x" * 16),
        ("too_long", "prose", MANY[:1000] + "x", MANY[:1000]),
        ("unreadable", "code", "\ufffd" * 11 + "a" * 89, "\ufffd" * 10 + "a" * 90),
        ("few_letters", "prose", "a 12345678 90 123", "ab 1234567890 12345678"),
        ("few_letters", "prose", "12 34 56 78 90 12 34 56", "12 天地玄黄 宇宙洪荒 日月盈昃"),
        ("few_letters", "prose", "a" * 9 + " " + "1" * 82, "a" * 9 + " " + "1" * 81),
        ("mostly_links", "prose", "look here https://example.com/page", "look there https://example.com/page"),
        ("repeated_lines", "prose", lines(20, 15), lines(20, 14)),
        ("repeated_lines", "prose", lines(10, 9), lines(9, 8)),
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
    before, after = ("words and ", " words") if unit == "a" else ("and words", "words")
    cleaner = Cleaner()
    assert cleaner.clean(before * MAX_RUN + unit * MAX_RUN + after + "\n" * 10_000, "code", "f") is not None
    assert cleaner.clean(before * 9 + unit * (MAX_RUN + 1) + after, "prose", "f") is None
    assert cleaner.report.dropped == {"long_run": 1}


@pytest.mark.parametrize("sentence", ["天地玄黄、宇宙洪荒。", "ภาษาไทย", "むかし、竹取の翁", "ភាសាខ្មែរ", "མི་སྐད་"])
def test_scripts_without_spaces_have_no_long_runs(sentence):
    for more, dropped in (("", False), ("x" * (len(sentence) + 1), True)):
        cleaner = Cleaner(rules=tuple(rule for rule in RULES if rule.name == "long_run"))
        cleaner.clean((sentence + more) * (MAX_RUN // len(sentence) + 1), "prose", "f")
        assert bool(cleaner.report.dropped) is dropped


GOOD = {
    "formulas": "E = mc^2; a^2 + b^2 = c^2; \u222b_0^1 x^2 dx = 1/3; \u2211_{n=1}^\u221e 1/n^2 = \u03c0\u00b2/6",
    "a table": "| year | population |\n|---|---|\n| 1990 | 248,709,873 |\n| 2000 | 281,421,906 |\n| 2010 | 308,745 |",
    "a song": "We will, we will rock you\n" * 8 + "Buddy, you are a boy\nPlaying in the street\nGonna be a man\n",
    "a note": "Sound server\n\nWeb site:\n\thttps://www.example.org/sound\n\nGit:\n\thttps://git.example.org/sound/\n",
    "a greeting": "\U0001f600\U0001f603 I love this! " + "\U0001f389" * 20,
}  # fmt: skip


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_small_good_documents_stay(text):
    assert Cleaner().clean(text, "prose", "f") == text


TEXT_PIECES = st.sampled_from([
    "word", " ", "\n", "the same line\n", "http://a.b/c", "www.x.y", "://", "1234", "\ufffd", "\u4e2d", "#", "x" * 12,
    "\r",    "\x00", "\ud800", "e\u0301", "\x0c", "\u3000", "\u00bd", " ",
])  # fmt: skip


@settings(max_examples=400)
@given(st.lists(TEXT_PIECES, max_size=60).map("".join), st.sampled_from(["prose", "code"]))
def test_verdicts_are_those_of_the_rules_in_python(text, kind):
    mended, repairs = repair(text, kind)
    expected = reference.verdict(mended, kind, 5, 150, MAX_RUN)
    cleaner = Cleaner(limits=Limits(5, 150))
    cleaned = cleaner.clean(text, kind, "f")
    if cleaner.report.dropped["repeated_words"]:
        assert expected is None  # it comes after all of these
        return
    assert cleaner.report.dropped == ({} if expected is None else {expected: 1})
    assert cleaned == (mended if expected is None else None)
    assert cleaner.report.repairs == (dict.fromkeys(repairs, 1) if expected is None else {})


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


NUMBERS = [f"{word}{n}" for n in range(20) for word in ("one", "two", "three", "four", "five", "six")]
SENTENCES = [
    "The river was high that spring, and nobody in the village dared to cross it.",
    "When the mill had stopped, they walked along the bank to see what was left of the bridge.",
    "An old man sat there with his dog; he had seen worse, he said, but not in thirty years.",
    "By noon the water began to fall, and the first boats were pulled up to the houses again.",
    "Children carried stones for the wall, which would not have held another night.",
]
GOOD = "\n".join(SENTENCES)


def dropped_by(text: str, config: CleaningConfig) -> str | None:
    cleaner = Cleaner(config)
    cleaner.clean(text, "prose", "f")
    return next(iter(cleaner.report.dropped), None)


@pytest.mark.parametrize(
    ("rule", "dropped", "kept"),
    [
        # 5 words, then again and again: of 50 words 45 are repeated; of 20 + 30 words, 25.
        (
            "repeated_words",
            "buy some cheap good watches " * 10,
            " ".join(NUMBERS[:20]) + " buy some cheap good pens" * 6,
        ),
        ("repeated_words", "buy some cheap good watches " * 10, "buy some cheap good watches " * 9),
        ("gopher_words", " ".join(GOOD.split()[:49]), " ".join(GOOD.split()[:50])),
        ("gopher_word_length", GOOD + " a b c d" * 60, GOOD + " a b c d" * 2),
        ("gopher_word_length", " ".join(NUMBERS[i] + "abcdefg" for i in range(60)), " ".join(NUMBERS[:60])),
        ("gopher_symbols", GOOD + " # " * 12, GOOD + " #" * 7),
        ("gopher_symbols", GOOD + "... and" * 12, GOOD + "... and" * 7),
        ("gopher_bullets", "\n".join(f"- {line}" for line in SENTENCES), GOOD + "\n- one"),
        ("gopher_ellipsis_lines", "...\n".join(SENTENCES), GOOD + "\nAnd so on\u2026"),
        ("gopher_alphabetic", GOOD + " 1234 5678" * 12, GOOD + " 1234 5678" * 2),
        ("gopher_stop_words", " ".join(NUMBERS) + " the", " ".join(NUMBERS) + " the of"),
        ("gopher_lines", GOOD + "\nIt fell again." * 4, GOOD + "\nIt fell again." * 2),
        ("gopher_lines", GOOD + f"\n{SENTENCES[1]}\n{SENTENCES[3]}", GOOD + "\n" + SENTENCES[4]),
        ("gopher_repetition", GOOD + " the bank of the river" * 10, GOOD),
    ],
)
def test_gopher_rules(rule, dropped, kept):
    config = CleaningConfig(quality="gopher")
    assert dropped_by(dropped, config) == rule
    assert dropped_by(kept, config) != rule
    assert dropped_by(GOOD, config) is None
    assert dropped_by(dropped, CleaningConfig()) in (None, "repeated_words")


@pytest.mark.parametrize(
    ("rule", "dropped"),
    [
        ("fineweb_line_ends", "\n".join(line[:-1].replace(";", "").replace(",", "") for line in SENTENCES)),
        ("fineweb_short_lines", GOOD + "".join(f"\n{word.title()} was there." for word in NUMBERS[::11])),
        ("fineweb_lines", GOOD.replace("\n", "\nAntidisestablishmentarianism!\n", 3)),
    ],
)
def test_fineweb_rules(rule, dropped):
    assert dropped_by(dropped, CleaningConfig(quality="fineweb")) == rule
    assert dropped_by(dropped, CleaningConfig(quality="gopher")) is None
    assert dropped_by(GOOD, CleaningConfig(quality="fineweb")) is None


def test_paragraphs_that_stood_before():
    # Of ten lines two stood before, which is as much as is allowed; in one paragraph, or as two of six.
    first, last = "\n".join(SENTENCES[:4]), "\n\n".join(["It fell.", "So it did.", "It fell.", "So it did."])
    config = CleaningConfig(quality="gopher")
    assert dropped_by(f"{first}\n\n{last}", config) == "gopher_paragraphs"
    assert dropped_by(f"{first}\n\n{last}".replace("\n\n", "\n"), config) is None


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", *NUMBERS[:25]]), max_size=60))
def test_gopher_repetition_keeps_the_published_limits(words):
    text = " ".join(words)
    total, top, duplicate = reference.repetition(text, [2, 3, 4], [5, 6, 7, 8, 9, 10])
    limits = [0.20, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    expected = any(found > limit * total for found, limit in zip(top + duplicate, limits, strict=True))
    assert cleaning_rules.Page(text, scan(text), Limits()).gopher_repetition == expected


def test_number_of_addresses():
    text = PROSE * 3 + " https://a.example/x www.b.example" * 2
    assert dropped_by(text, CleaningConfig(max_urls=4)) is None
    assert dropped_by(text, CleaningConfig(max_urls=3)) == "many_urls"


def test_rules_that_a_configuration_turns_on():
    assert rules_of(CleaningConfig()) == RULES
    assert rules_of(CleaningConfig(quality="gopher")) == RULES + GOPHER
    full = CleaningConfig(quality="fineweb", max_urls=1, language=["en", "de"])
    names = [rule.name for rule in rules_of(full)]
    assert names == [rule.name for rule in [*RULES, *GOPHER, *FINEWEB]][: len(RULES)] + ["many_urls", "language"] + [
        rule.name for rule in GOPHER + FINEWEB
    ]
    assert len(set(names)) == len(names)
    described = {rule.name: rule.description for rule in rules_of(full)}
    assert described["language"].endswith("de, en")
    assert "gopher_bullets" not in [rule.name for rule in select_rules(["gopher_bullets"], full)]
    assert all(rule.kinds == cleaning_rules.PROSE for rule in rules_of(full)[len(RULES) :])


REPORTS = st.builds(
    lambda drops, repairs, lines: report_of(drops, repairs, lines),
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.text(max_size=3)), max_size=6),
    st.lists(st.sampled_from(["newlines", "nfc"]), max_size=4),
    st.lists(st.tuples(st.sampled_from(["x", "y"]), st.integers(0, 5)), max_size=6),
)


def report_of(drops: list, repairs: list, lines: list) -> CleaningReport:
    report = CleaningReport()
    for rule, text in drops:
        report.drop(rule, f"file:{len(text)}", text)
    report.repairs.update(repairs)
    for name, count in lines:
        report.lines.add(name, count, "file", "line")
        report.masked.add(name, count, "file")
        report.contamination.add(name, 1, "other")
    return report


def copied(report: CleaningReport) -> CleaningReport:
    return CleaningReport.from_json(json.loads(json.dumps(report.as_json())))


@given(REPORTS, REPORTS, REPORTS)
def test_reports_merge_associatively(one, two, three):
    left, right = copied(one), copied(two)
    left.merge(two)
    left.merge(three)
    right.merge(three)
    first = copied(one)
    first.merge(right)
    assert left.as_json() == first.as_json()
    empty = CleaningReport()
    empty.merge(one)
    assert empty.as_json() == one.as_json() == copied(one).as_json()


@given(
    st.lists(st.sampled_from(["short", PROSE, PROSE.replace("\n", "\r\n"), "12 34 56 78 90 12 34 56", "x"]), max_size=9)
)
def test_merged_parts_are_the_whole(texts):
    whole, joined = Cleaner(), CleaningReport()
    for number, text in enumerate(texts):
        part = Cleaner()
        assert part.clean(text, "prose", f"f{number}") == whole.clean(text, "prose", f"f{number}")
        joined.merge(copied(part.report))
    assert joined.as_json() == whole.report.as_json()
    assert joined.as_manifest(RULES) == whole.as_manifest()
