"""`mainspring train-tokenizer`: what it writes, what it takes of much text, and every refusal."""

from __future__ import annotations

import json
import random

import pytest

from engine import cli
from engine.data.tokenizer import load_tokenizer, train_tokenizer
from engine.data.train_tokenizer import _Sample
from engine.errors import UserError

TEXTS = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(40)]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / f"in/{i:03}.py").write_text(text)
    rows = [json.dumps({"body": {"text": text}}) for text in ("cafe\u0301 \r\n words", TEXTS[0])]
    (tmp_path / "in/z.jsonl").write_text("\n".join([*rows, "{broken"]))
    return tmp_path


def run(place, *words: object) -> int:
    return cli.run(["train-tokenizer", "--input", str(place / "in"), "--output", str(place / "out"),
                    "--vocab_size", "400", "--text_field", "body.text", "--max_bad_fraction", "0.5",
                    *map(str, words)])  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("form", ["huggingface", "sentencepiece"])
def test_trains_what_the_library_would_of_the_same_text(place, kind, form, capsys):
    assert run(place, "--kind", kind, "--form", form) == 0
    expected = train_tokenizer([*TEXTS, "caf\u00e9 \n words"], 400, kind, specials=32, form=form)
    made, about = load_tokenizer(place / "out"), json.loads((place / "out/training.json").read_text())
    assert made.sha256 == expected.sha256 == about["tokenizer_sha256"]
    assert [made.token_id(name) for name in ("<|endoftext|>", "<|mask|>", "<|tool|>")] == [0, 16, 21]
    assert about["documents"] == {"read": 42, "taken": 41}  # one of them twice
    assert about["bytes"] == sum(map(len, TEXTS)) + len("caf\u00e9 \n words".encode())
    assert (about["files"], about["vocab_size"], about["settings"]["kind"]) == (41, made.vocab_size, kind)
    assert about["quarantine"]["lines"] == 1
    assert f"vocabulary {made.vocab_size}, tokenizer {made.sha256[:12]}" in capsys.readouterr().out


def test_again_replaces_only_when_told_and_only_its_own(place):
    run(place)
    before = (place / "out/training.json").read_bytes()
    with pytest.raises(UserError, match=r"out: exists\. Replace it with --overwrite"):
        run(place)
    assert run(place, "--overwrite") == 0
    assert (place / "out/training.json").read_bytes() == before
    assert run(place, "--overwrite", "--vocab_size", 350) == 0
    assert load_tokenizer(place / "out").vocab_size == 350
    (place / "out/training.json").unlink()
    with pytest.raises(UserError, match="exists and is no tokenizer of train-tokenizer"):
        run(place, "--overwrite")
    assert sorted(path.name for path in place.iterdir()) == ["in", "out"]


def test_refusals(place):
    with pytest.raises(UserError, match=r"vocab_size.*280 has no room for 256 bytes and 32 special tokens"):
        run(place, "--vocab_size", 280)
    with pytest.raises(UserError, match=r"max_bad_fraction"):
        run(place, "--max_bad_fraction", 0.1)
    with pytest.raises(UserError, match="holds the input"):
        cli.run(["train-tokenizer", "--input", str(place / "in"), "--output", str(place)])
    (place / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        cli.run(["train-tokenizer", "--input", str(place / "in"), "--output", str(place / "file")])
    (place / "empty").mkdir()
    (place / "empty/a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"no documents; the first unreadable one is .*a\.txt"):
        cli.run(["train-tokenizer", "--input", str(place / "empty"), "--output", str(place / "out")])
    assert sorted(path.name for path in place.iterdir()) == ["empty", "file", "in"]  # nothing was written


def test_a_sample_depends_on_content_alone():
    draw = random.Random(5)
    texts = [f"{number} " + "x" * draw.randrange(200) for number in range(300)]
    taken = []
    for order in (texts, texts[::-1], draw.sample(texts, len(texts)), texts + texts):
        sample = _Sample(5000, seed=1)
        for text in order:
            sample.add(text)
        assert sample.seen == len(order)
        held = list(sample.texts())
        assert held == [text for text in dict.fromkeys(order) if text in set(held)]  # in the order they came
        assert sample.size == sum(map(len, held)) <= 5000
        assert sample.size > 4600  # the next one did not fit
        taken.append(set(held))
    assert all(some == taken[0] for some in taken)
    other = _Sample(5000, seed=2)
    for text in texts:
        other.add(text)
    assert set(other.texts()) != taken[0]


def test_a_document_larger_than_the_budget_is_still_one():
    sample = _Sample(10, seed=1)
    for text in ("a" * 50, "b" * 50, "c" * 50):
        sample.add(text)
    assert (sample.documents, sample.size) == (1, 50)
