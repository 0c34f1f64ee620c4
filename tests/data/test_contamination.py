"""Decontamination: what of an evaluation set is found, in which wording, and what is said of a set that is none."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.cleaning import DecontaminationConfig
from engine.data.cleaning import Cleaner
from engine.data.contamination import Contamination, load
from engine.errors import UserError

QUESTION = "Which of the two rivers that meet below the old mill carries more water in a dry summer, and why?"
SHORT = "Name the three rivers that meet at Passau."
RECORDS = [{"question": QUESTION, "choices": ["The left one", "Both"], "meta": {"hint": SHORT}}, {"question": "Why?"}]


def written(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def config(*sets: str, **options) -> DecontaminationConfig:
    return DecontaminationConfig(sets=list(sets), **options)


@pytest.fixture
def rivers(tmp_path: Path) -> Path:
    return written(tmp_path / "rivers.jsonl", RECORDS)


def test_a_leak_in_other_spelling_is_found(rivers):
    found = Contamination(config(f"rivers={rivers}"))
    assert (found.sets[0].items, found.sets[0].too_short, found.ngrams) == (2, 3, 20 - 13 + 1 + 1)
    words = QUESTION.split()
    for leak in (QUESTION, QUESTION.upper(), " \n* ".join(words), " ".join(words[:13]), " ".join(words[7:]), SHORT):
        [hit] = found.find(f"Some say: {leak} Others do not.")
        assert hit.name == "rivers"
        assert hit.excerpt in leak.lower()
        assert len(re.findall(r"\w+", hit.excerpt)) == (8 if leak == SHORT else 13)
    for clean in (
        " ".join(words[:12]),
        " ".join(words[8:]),
        SHORT.replace("Passau", "Bonn"),
        "Why? Both. The left one.",
    ):
        assert found.find(f"Some say: {clean} Others do not.") == []


def test_drop_and_report(rivers, tmp_path):
    mills = tmp_path / "mills.txt"
    mills.write_text("A mill grinds\nas long as the water runs\n \nToo short\n", encoding="utf-8")
    texts = [
        f"They asked: {QUESTION}",
        f"{QUESTION} A mill grinds as long as the water runs.",
        "Nothing of that kind here.",
    ]
    kept = {"drop": [None, None, texts[2]], "report": texts}
    for action, expected in kept.items():
        cleaner = Cleaner(decontaminate=config(f"rivers={rivers}", f"mills={mills}", action=action))
        assert [cleaner.clean(text, "prose", f"f{n}") for n, text in enumerate(texts)] == expected
        manifest = cleaner.as_manifest()
        found = manifest["contamination"]
        assert (found["ngram"], found["action"], found["ngrams"]) == (13, action, 10)
        facts = found["sets"]["mills"]
        assert facts.pop("samples") == [{"source": "f1", "excerpt": "a mill grinds as long as the water runs"}]
        assert facts == {
            "sha256": hashlib.sha256(mills.read_bytes()).hexdigest(),
            "items": 1,
            "too_short": 1,
            "documents": 1,
        }
        assert found["sets"]["rivers"]["documents"] == 2
        assert cleaner.report.dropped == ({"contaminated": 2} if action == "drop" else {})
        rule = manifest["rules"].get("contaminated")
        assert (rule and rule["documents"]) == (2 if action == "drop" else None)
        assert action == "report" or rule["description"] == "13 words, or a whole item, of rivers, mills"
        assert "sets" not in Cleaner(decontaminate=config()).as_manifest()


def test_sets_that_find_nothing_are_named(rivers):
    manifest = Cleaner(decontaminate=config(f"rivers={rivers}")).as_manifest()
    assert manifest["contamination"]["sets"]["rivers"]["documents"] == 0
    assert manifest["rules"]["contaminated"]["documents"] == 0


def test_what_many_items_share_is_no_leak(tmp_path):
    prompt = "Read the passage and choose the best of the four answers that are given below it."
    items = [f"{prompt} The {color} fox of number {number} sleeps." for number, color in enumerate(["red", "grey"] * 6)]
    found = Contamination(config(f"all={written(tmp_path / 'all.jsonl', items)}"))
    assert found.find(prompt) == []
    assert found.find(items[3]) != []
    ten = Contamination(config(f"ten={written(tmp_path / 'ten.jsonl', items[:10])}"))
    assert ten.find(prompt) != []


def test_what_one_item_says_often_is_a_leak(tmp_path):
    found = Contamination(config(f"s={written(tmp_path / 's.jsonl', [f'{QUESTION} ' * 20])}"))
    assert found.find(QUESTION) != []


@pytest.mark.parametrize("name", ["set.jsonl.gz", "set.ndjson", "set.txt.gz", "set.md"])
def test_files_that_are_read(tmp_path, name):
    raw = (json.dumps({"a": [{"b": QUESTION}]}) if "json" in name else QUESTION).encode()
    raw = b"\xef\xbb\xbf" + raw + b"\r\n\n" if name == "set.ndjson" else raw
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    found = Contamination(config(f"s={tmp_path / name}", ngram=20))
    assert found.find(QUESTION)[0].name == "s"
    assert found.sets[0].sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "none.jsonl",
            None,
            r"decontaminate: s: .*none.jsonl: cannot be read \(No such file or directory\)\. Write NAME",
        ),
        ("bad.jsonl", b'{"a": "b"}\n\n{"a": \n', r"bad.jsonl:3: no JSON record \(.*\)\. Mend the line"),
        ("bytes.jsonl", b'"\xff"\n', r"bytes.jsonl:1: no JSON record"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", r"deep.jsonl:1: no JSON record"),
        ("short.txt", b"only six words are in here", r"short.txt: no text of 8 words or more\. Give JSONL"),
        ("empty.jsonl", b"", r"empty.jsonl: no text of 8 words or more"),
        ("set.csv", b"a,b\n", r"set.csv: .csv is not read here\. Convert it to .jsonl or .txt"),
        ("cut.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9],
         r"cut.txt.gz: cannot be unpacked \(.*\)\. Fetch it again"),
        ("no.txt.gz", b"not gzip at all", r"no.txt.gz: cannot be unpacked"),
    ],
)
def test_files_that_are_not(tmp_path, name, raw, message):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        Cleaner(decontaminate=config(f"s={tmp_path / name}"))


def test_configurations_that_are_refused():
    for entry in ("path.jsonl", "=path.jsonl", "name="):
        with pytest.raises(UserError, match=r"sets: '.*' is not NAME=PATH"):
            config(entry)
    with pytest.raises(UserError, match=r"sets: two sets are called 'a'\. Give each"):
        config("a=x", "a=y")
    with pytest.raises(UserError, match="sets: 65 sets"):
        config(*[f"{n}=x" for n in range(65)])
    with pytest.raises(UserError, match="ngram"):
        config(ngram=7)


def test_sets_are_read_once_while_they_stay_the_same(rivers, tmp_path):
    wanted = config(f"rivers={rivers}")
    first = load(wanted)
    assert load(wanted) is first
    written(rivers, [*RECORDS, {"question": "Where does the water go that the mill at the river no longer needs?"}])
    assert load(wanted).sets[0].items == 3
    rivers.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(wanted)


WORDS = st.lists(st.sampled_from(["Ab", "b", "CC", "7", "\u00c9", "\u4e2d"]), max_size=16).map(" ".join)


@given(WORDS, WORDS, WORDS)
def test_any_item_is_found_in_any_text(tmp_path_factory, item, before, after):
    path = tmp_path_factory.mktemp("sets") / "set.jsonl"
    written(path, ["one two three four five six seven eight", item])
    found = Contamination(config(f"s={path}"))
    assert bool(found.find(f"{before} - {item.lower()} - {after}")) or found.sets[0].too_short == 1
    assert found.sets[0].too_short == (len(item.replace("\u4e2d", " \u4e2d ").split()) < 8)
