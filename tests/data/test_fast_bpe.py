"""The C++ tokenizer beside `tokenizers`: the same words and the same ids on whatever text, and a reason where it has
none to give."""

from __future__ import annotations

import functools
import json
import os
import random
import threading
import time
import unicodedata
from collections.abc import Callable
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import _tokenize
from engine.data import fast_bpe
from engine.data.tokenizer import HuggingFaceTokenizer, Tokenizer, train_tokenizer
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("engine/**/*.py"))[:60]]
# In normal form, each with marks or syllables that are only sometimes so.
LANGUAGES = [
    "Việt Nam là một quốc gia nằm ở cực Đông của bán đảo Đông Dương",
    "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน",
    "हिन्दी विश्व की एक प्रमुख भाषा है",
    "বাংলা ভাষা একটি ইন্দো-আর্য ভাষা",
    "اَلْعَرَبِيَّةُ هي أكثر اللغات",
    "עִבְרִית היא שפה",
    "한국어는 대한민국과 조선의 공용어이다",
    "தமிழ் மொழி தமிழர்களின் தாய்மொழி",
    "Ελληνική γλώσσα",
    "Русский язык",
    "日本語は、日本国内や",
]  # fmt: skip
BASE = json.loads(train_tokenizer([*SOURCES[:20], *LANGUAGES * 4], 900).text)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


def tokenizer(**changes) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(BASE | changes), where="test")


def with_model(**changes) -> HuggingFaceTokenizer:
    return tokenizer(model=BASE["model"] | changes)


PATTERNS = {pattern.name: tokenizer(pre_tokenizer=split(regex)) for regex, pattern in fast_bpe.SPLITS.items()} | {
    "BYTE_LEVEL": tokenizer(pre_tokenizer=BYTES | {"use_regex": True}),
    "REMOVED": tokenizer(pre_tokenizer=split(next(iter(fast_bpe.SPLITS)), "Removed", True)),
    "DIGITS_GPT2": tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}]}),
}  # fmt: skip
OURS = PATTERNS["LLAMA3"]
patterns = pytest.mark.parametrize("ours", PATTERNS.values(), ids=PATTERNS)

# What the patterns tell apart, and neighbours of it: long s and Kelvin sign, marks, separators, digits of three kinds.
PARTS = [
    *["'", "'s", "'S", "'\u017f", "'re", "'RE", "'Ll", "'ll", "'vE", "'d", "'M", "'t", "'K", "\u2019s"],
    *["\u017f", "\u212a", "\u0130", "/", "//", "\n", "\r", "\r\n", "\n\n", " ", "  ", "   ", "\t"],
    *["\x0b", "\x1c", "\x1f", "\x85"],
    *["\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff", "a", "bc", "Ab", "ABc", "aB", "é", "É", "ß", "\u01c5"],
    *["\u02b0", "中", "文", "の", "한", "\u1112", "\u0301", "\u0e31", "\u093f", "\u20e3", "1", "23", "456", "7890"],
    *["²", "\u2167", "\u0663", "\u0967", "\U00011de9", "_", "-", "?!", "…", "😀", "👩\u200d👩", "\U0001d7d8"],
    *["\U00010400", "\U00010428", "\ue000", "\u0378", "\U000e0100", "\U0010ffff", "the", " the", "def ", "\0", "\x7f"],
    *["\ufb01", "\ufb06", "<|endoftext|>"],
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), max_size=14).map("".join)


def assert_same(ours: Tokenizer, texts: list[str], **options) -> None:
    expected = ours.encode_batch(texts)
    ids, lengths = ours.encode_packed(texts, **options)
    assert lengths.tolist() == [len(found) for found in expected]
    assert ids.tolist() == [token for found in expected for token in found]


def word_ends_of(ours: HuggingFaceTokenizer, text: str) -> list[int]:
    """Ours, in bytes."""
    assert not isinstance(ours._encoder, str)
    return ours._encoder.words(text.encode())


def word_ends(ours: HuggingFaceTokenizer, text: str) -> list[int]:
    """The library's, in bytes: one character of a byte-level word is one byte."""
    steps = ours._model.pre_tokenizer
    return list(accumulate(len(word) for word, _ in steps.pre_tokenize_str(text)))


def test_which_are_known():
    assert all(ours.fast and ours.slow == "" for ours in PATTERNS.values())


@patterns
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_any_text(ours, text):
    assert word_ends_of(ours, text) == word_ends(ours, text)
    assert_same(ours, [text])


@patterns
def test_all_short_texts(ours):
    """What a pattern does at the end of a text, and each of its branches, without luck."""
    for size in range(1, 5):
        for characters in product(" \na1!'s\u0301" if size == 4 else " \n\ta1!'sLA\u0301/é", repeat=size):
            text = "".join(characters)
            assert word_ends_of(ours, text) == word_ends(ours, text), repr(text)


# Ranges that no pattern looks into: ideographs, syllables, Tangut; nothing is assigned from plane 3 to the tags.
UNIFORM = [(0x3400, 0xA000), (0xAC00, 0xD7A4), (0x17000, 0x18D00), (0x20000, 0x33480),
           (0x33500, 0xE0000), (0xE0200, 0x110000)]


@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in ("REMOVED", "BYTE_LEVEL")])
def test_every_code_point(name):
    # Under the sanitizers, where the library's allocations take ten times as long, no pattern gets them all.
    ours, step = PATTERNS[name], 1 if name == "LLAMA3" and "MAINSPRING_SANITIZED" not in os.environ else 211
    context = "{0}a {0}1{0}" if step > 1 else "{0}B{0} {0}{0}'{0}\n1"
    points = {point for first, end in UNIFORM for point in range(first, end, step if end < 0x33500 else 211)}
    points |= {point for point in range(0x110000) if not any(first <= point < end for first, end in UNIFORM)}
    ordered = sorted(points - {*range(0xD800, 0xE000)})
    for first in range(0, len(ordered), 20_000):  # an error shows less than everything
        text = "".join(context.format(chr(point)) for point in ordered[first : first + 20_000])
        assert word_ends_of(ours, text) == word_ends(ours, text), hex(ordered[first])


@patterns
def test_long_runs(ours):
    runs = [" ", "\n", "1", "a", "!", "é", "中", "'", "\r\n", " \n", "ab", "'s", "A", "aB", "²", "\u0301", "\xa0", " 1"]
    texts = [run * count for run in runs for count in (2, 3, 15, 16, 17, 500)]
    assert_same(ours, texts)
    assert_same(ours, [f"x{text}y{text} " for text in texts])


def test_a_word_of_a_megabyte_takes_no_quadratic_time():
    letters = "".join(random.Random(1).choices("etaoin", k=1_000_000))
    found, lengths = OURS.encode_packed([letters, "a" * 1_000_000, "中" * 300_000])
    assert OURS.decode(found[: lengths[0]].tolist()) == letters  # 10^12 steps if it were quadratic
    assert_same(OURS, [letters[:100_000], "中" * 30_000])


@patterns
def test_text_in_many_languages_and_source(ours):
    assert_same(ours, [*LANGUAGES, *SOURCES, "".join(LANGUAGES)], threads=2)


def test_bytes_that_were_no_text():
    draw = random.Random(2)
    texts = [draw.randbytes(draw.randrange(400)).decode(errors=how) for how in ("replace", "ignore") * 300]
    for ours in PATTERNS.values():
        assert_same(ours, texts)


def test_what_is_remembered_changes_nothing():
    """More words than either memory holds, of lengths on both sides of theirs, seen again and in another order."""
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=draw.choice((1, 3, 7, 14, 15, 16, 40)))) for _ in range(5000)]
    words += [format(draw.getrandbits(48), "x") for _ in range(25_000)]
    words += ["".join(draw.choices("\U00010400\U00010401", k=128)) for _ in range(3000)]  # 10^6 ids, all that is held
    words += ["".join(draw.choices("ab", k=size)) for size in (511, 512, 513)] * 2
    texts = [" ".join(words), *words[:50]]
    one = tokenizer()
    assert_same(one, texts)
    for again in (texts, texts[::-1]):
        assert [ids.tolist() for ids in one.encode_packed(again)] == [ids.tolist() for ids in OURS.encode_packed(again)]


# Shares of work are of half a megabyte: texts of all sizes, below, at and above it, and none at all.
SHARED = ["", *SOURCES, "", "x y " * 140_000, *SOURCES[:9] * 3, ""]


@functools.cache
def shared_ids() -> list[list[int]]:
    return [[*found, 7] for found in OURS.encode_batch(SHARED)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_and_shares_change_nothing(threads):
    ids, lengths = OURS.encode_packed(SHARED, threads, end=7)
    assert lengths.tolist() == list(map(len, shared_ids()))
    assert ids.tolist() == list(chain.from_iterable(shared_ids()))
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)


def test_called_from_several_threads_at_once():
    expected = [OURS.encode_packed(SOURCES[i::4])[0].tolist() for i in range(4)]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = OURS.encode_packed(SOURCES[i::4], 2)[0].tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


def test_spans_of_one_buffer():
    texts = ["", "héllo wörld", "", *SOURCES[:3], "x", ""]
    raw = [text.encode() for text in texts]
    buffer, sizes = b"".join(raw), np.array([len(text) for text in raw])
    unigram = train_tokenizer(SOURCES[:2], 400, "unigram")
    decomposed = b"e\xcc\x81" + buffer
    for ours, given_ in ((OURS, buffer), (unigram, buffer), (tokenizer(normalizer={"type": "NFC"}), decomposed)):
        sizes_now = np.array([*sizes]) if given_ is buffer else np.array([3, *sizes])
        pieces = raw if given_ is buffer else [decomposed[:3], *raw]
        for view in (given_, bytearray(given_), memoryview(given_)):
            found = ours.encode_spans(view, sizes_now, 2, end=0)
            assert [ids.tolist() for ids in found] == [ids.tolist() for ids in ours.encode_packed(pieces, end=0)]
        for wrong in ([len(given_) + 1], [len(given_) - 1], [-1, len(given_) + 1], []):
            with pytest.raises(ValueError, match="the sizes do not fit the buffer"):
                ours.encode_spans(given_, np.array(wrong, np.int64))


def added(content: str, number: int, special: bool = False, **flags: bool) -> dict:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": number, "content": content, "special": special} | usual | flags


ADDED = [
    *BASE["added_tokens"],
    added("<think>", 900), added("<think>\n", 901, normalized=False), added("ink>\n<", 902, normalized=False),
    added("<s>", 903, True, lstrip=True, single_word=True), added("s><", 904), added("word", 905, single_word=True),
    added("left", 906, lstrip=True), added("right", 907, rstrip=True, normalized=False),
    added("both", 908, lstrip=True, rstrip=True, single_word=True), added("    ", 909), added("é", 910),
    added("#", 911, normalized=False), added("## ", 912, normalized=False, rstrip=True), added("<|endoftext|>x", 913),
    added("text|>", 919, normalized=False),  # inside of a special one it is not looked for
    *(added("#abcd"[: 1 + size], 914 + size, normalized=False) for size in (1, 3, 2, 4)),
]  # fmt: skip
ADDED_TEXTS = st.lists(
    st.one_of(st.sampled_from([token["content"] for token in ADDED[-19:]]), st.sampled_from(PARTS),
              st.sampled_from([" ", "\n", "\u2003", "_", "x", "w", "<", "e\u0301", "<|endoftext|>"])), max_size=12,
).map("".join)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(text=ADDED_TEXTS)
@example(text="a text|> b<|endoftext|>text|>")
@example(text="#a#ab#abc#abcd#abcde## ###")
def test_added_tokens(text):
    for ours in _with_added():
        assert_same(ours, [text])


def _with_added(made: list[HuggingFaceTokenizer] = []) -> list[HuggingFaceTokenizer]:  # noqa: B006
    if not made:
        made += [tokenizer(added_tokens=ADDED), tokenizer(added_tokens=ADDED, normalizer={"type": "NFC"})]
    return made


def test_what_a_single_word_is():
    one = tokenizer(added_tokens=[*BASE["added_tokens"], added("#", 900, normalized=False, single_word=True)])
    points = [*range(0x3000), *range(0x3000, 0xD800, 97), *range(0xE000, 0x20000, 53)]
    assert_same(one, [shape.format(chr(point)) for point in points for shape in ("{0}#", "#{0}")])


@pytest.mark.parametrize("content", [" ", "\n", " \n"])
def test_blanks_that_are_tokens(content):
    """The one before has taken what would be the next; one that takes nothing to its left is given twice."""
    right = added("#", 901, normalized=False, rstrip=True)
    for left in (True, False):
        token = added(content, 900, normalized=False, lstrip=left, rstrip=left)
        ours = tokenizer(added_tokens=[*BASE["added_tokens"], token, *([] if left else [right])])
        ends = ("", "a", f"a{content}{content}b", f"#{content}\n")
        assert_same(ours, [content * count + end for count in range(1, 5) for end in ends])


NFC = tokenizer(normalizer={"type": "NFC"})
MARKS = [
    *["e", "a", "\u0301", "\u0323", "\u0308", "é", "ạ", "\u1112", "\u1161", "\u11ab", "하", "한", "ক", "\u09be"],
    *["\u09c7", "\u0bc6", "\u212a", "\u212b", "\ufb01", "\u0f71", "\u0f72", "\u093c", "क", "\u0958", "\u0344"],
    *["\uf900", " ", "\U00011131", "\U00011127", "\U000105d2\u0307"],
]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from(MARKS), st.characters(codec="utf-8")), max_size=8).map("".join))
def test_normal_form(text):
    if _tokenize.surely_normal(text.encode()):
        assert NFC._model.normalizer.normalize_str(text) == text
    assert_same(NFC, [text, "plain", text * 2, LANGUAGES[0]])


def test_normal_form_of_every_code_point_and_pair():
    points = [point for point in range(0x32000) if not 0xD800 <= point < 0xE000]
    normalize = NFC._model.normalizer.normalize_str
    sure = [chr(point) for point in points if _tokenize.surely_normal(chr(point).encode())]
    assert normalize("\n".join(sure)) == "\n".join(sure)
    known = [c for c in map(chr, points) if unicodedata.category(c) != "Cn" and unicodedata.normalize("NFC", c) == c]
    assert set(known) <= set(sure)  # nothing is sent to the library that need not be
    parts = [unicodedata.decomposition(chr(point)) for point in points]
    for pair in (part.split() for part in parts if part and not part.startswith("<")):
        text = "".join(chr(int(point, 16)) for point in pair)
        if normalize(text) != text:
            assert not _tokenize.surely_normal(text.encode()), pair
    hangul = [chr(first) + chr(second) for first, second in product(range(0x1100, 0x1113), range(0x1161, 0x1176))]
    hangul += ["\uac00" + chr(last) for last in range(0x11A8, 0x11C3)]
    assert not any(_tokenize.surely_normal(text.encode()) for text in hangul)
    assert all(_tokenize.surely_normal(text.encode()) for text in LANGUAGES)
    assert not _tokenize.surely_normal("\u0628\u0651\u064b".encode())  # out of order, and neither composes
    assert not _tokenize.surely_normal("\u00c0\u0323".encode())  # the dot belongs before the accent
    assert not _tokenize.surely_normal("a\u0323\u0301 \u0301\u0323".encode())  # out of order


def test_words_that_are_taken_whole():
    whole = ["Ġxyzzy", "xy", "'s", "中", "\u00e4\u00b8\u0143", "x" * 40]
    vocabulary = BASE["model"]["vocab"] | {word: number for number, word in enumerate(whole, 1000)}
    one = with_model(ignore_merges=True, vocab=vocabulary)
    assert one.fast
    texts = ["a xyzzy xy it's 中 " + "x" * 40, "xyzzy", " xyzzy", "xy", "中", "x" * 40, *SOURCES[:5]]
    assert_same(one, texts)
    assert {1000, 1001, 1002, 1004, 1005} <= set(one.encode_packed(texts)[0].tolist())


def test_a_vocabulary_that_lacks_bytes():
    lost = fast_bpe.byte_alphabet()[0xC3]
    merges = [pair for pair in BASE["model"]["merges"] if not any(lost in part for part in pair)]
    one = with_model(vocab={k: v for k, v in BASE["model"]["vocab"].items() if lost not in k}, merges=merges)
    assert one.fast
    assert_same(one, ["é", "aéb", "éé", *LANGUAGES, *SOURCES[:3]])


BPE = BASE["model"]
SLOW: dict[str, Callable[[], HuggingFaceTokenizer]] = {
    "model Unigram": lambda: train_tokenizer(SOURCES[:2], 400, "unigram"),
    "model with end_of_word_suffix": lambda: with_model(end_of_word_suffix="</w>", merges=[]),
    "model with unk_token": lambda: with_model(unk_token="<|pad|>"),
    "model with byte_fallback": lambda: with_model(byte_fallback=True, vocab=BPE["vocab"] | {"<0x41>": 900}),
    "ids that two tokens share": lambda: with_model(vocab=BPE["vocab"] | {"中文": 500}),
    "normalizer NFKC": lambda: tokenizer(normalizer={"type": "NFKC"}),
    "normalizer a sequence": lambda: tokenizer(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
    "no pre_tokenizer": lambda: tokenizer(pre_tokenizer=None),
    "pre_tokenizer without ByteLevel": lambda: tokenizer(pre_tokenizer={"type": "Whitespace"}),
    "or with add_prefix_space": lambda: tokenizer(pre_tokenizer=BYTES | {"add_prefix_space": True, "use_regex": True}),
    "pre_tokenizer with another way": lambda: tokenizer(pre_tokenizer=split(r"\w+|\W+")),
    "another way to split": lambda: tokenizer(pre_tokenizer=split(next(iter(fast_bpe.SPLITS)), "Removed", False)),
}  # fmt: skip


@pytest.mark.parametrize("reason", SLOW)
def test_others_are_left_to_the_library(reason):
    ours = SLOW[reason]()
    assert reason in ours.slow
    assert not ours.fast
    texts = ["Hello wörld, it's 中文 A", "", *SOURCES[:2]]
    assert_same(ours, texts, threads=2)
    ids, lengths = ours.encode_packed([text.encode() for text in texts], end=5)
    assert ids.tolist() == list(chain.from_iterable([*found, 5] for found in ours.encode_batch(texts)))
    assert lengths.sum() == len(ids)


def test_a_file_that_switches_on_dropout_is_fast_without_it():
    assert with_model(dropout=0.5).fast
    assert_same(with_model(dropout=0.5), SOURCES[:3])


@pytest.mark.parametrize("ours", [OURS, SLOW["model Unigram"]()], ids=["fast", "library"])
def test_what_is_no_text(ours):
    draw = random.Random(4)
    leads = [0x7F, 0x80, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    follow = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0]
    raws = [bytes([lead, second, *tail]) for lead in leads for second in follow for tail in (b"", b"\x80", b"\xbf\x80")]
    for size in range(500):
        raws.append(bytes([*b"abcdefgh"[: size % 9], draw.choice(leads), *draw.choices(follow, k=size % 4)]))
    for raw in raws:
        try:
            assert_same(ours, [raw.decode()])
        except UnicodeDecodeError as error:
            with pytest.raises(UserError, match=rf"(at byte|position) {error.start}\b"):
                ours.encode_packed(["fine", raw])
    with pytest.raises(UserError, match="surrogates not allowed"):
        ours.encode_packed(["\ud800"])
    with pytest.raises(UserError, match="text to encode"):
        ours.encode_packed([3])


def test_arguments_of_the_encoder():
    good: dict[str, Any] = {
        "pattern": _tokenize.Pattern.GPT2, "byte_ids": np.zeros(256, np.int32), "merges": np.zeros((0, 3), np.int32),
        "words": {}, "raw": [], "normalized": [], "normal_form": False,
    }  # fmt: skip
    assert _tokenize.Encoder(**good).encode(["ab"], -1, 1)[0].tolist() == [0, 0]
    for wrong in ({"byte_ids": np.zeros(255, np.int32)}, {"merges": np.zeros((2, 2), np.int32)},
                  {"merges": -np.ones((1, 3), np.int32)}, {"raw": [(b"", 1, False, False, False, False)]},
                  {"raw": [(b"x", -1, False, False, False, False)]}):  # fmt: skip
        arguments: dict[str, Any] = good | wrong
        with pytest.raises(ValueError, match=r"byte_ids|merges|merge|added token"):
            _tokenize.Encoder(**arguments)
    with pytest.raises(ValueError, match="no code point"):
        _tokenize.class_of(0x110000)


def test_it_is_a_better_bargain_than_the_library():
    texts = SOURCES * 3
    took = []
    for encode in (OURS.encode_batch, OURS.encode_packed):
        encode(texts)
        started = time.perf_counter()
        encode(texts)
        took.append(time.perf_counter() - started)
    assert took[1] * 2 < took[0]  # 20 times on an idle machine


