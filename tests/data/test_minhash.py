"""Words, shingles and signatures in C++ against their definitions in Python; the estimate against the truth."""

from __future__ import annotations

import importlib.util
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import _dedup
from engine.config.near_dedup import NearDedupConfig
from engine.data.near_dedup import Signer

ROOM = Path(__file__).resolve().parents[2] / "csrc" / "dedup"
spec = importlib.util.spec_from_file_location("make_unicode", ROOM / "make_unicode.py")
assert spec
assert spec.loader
unicode = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unicode)

BITS = 2**64 - 1
A, B, C = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F


def fold(a: int, b: int) -> int:
    return ((a * b) ^ (a * b >> 64)) & BITS


def words_of(text: str) -> list[str]:
    """Runs of letters, marks and digits in lower case; of some scripts each by itself."""
    words, word = [], ""
    for char in text + " ":
        kind = unicode.kind(ord(char))
        if kind == unicode.WORD:
            word += chr(unicode.lower(ord(char)))
            continue
        words += [word] if word else []
        word = ""
        words += [chr(unicode.lower(ord(char)))] if kind == unicode.SINGLE else []
    return words


def word_hash(word: str) -> int:
    raw = word.encode()
    state = len(raw) * B & BITS
    while len(raw) > 8:
        state = (fold(state ^ int.from_bytes(raw[:8], "little"), C) + A) & BITS
        raw = raw[8:]
    return fold(state ^ int.from_bytes(raw, "little") ^ A, C)


def shingles_of(text: str, width: int) -> list[int]:
    hashes = [word_hash(word) for word in words_of(text)]
    found = []
    for first in range(len(hashes) - width + 1):
        total = 0
        for number in hashes[first : first + width]:
            total = (total * C + number) & BITS
        found.append(fold(total ^ A, B))
    return found


def factors(count: int, seed: int) -> list[int]:
    """splitmix64, the high halves."""
    found = []
    for _ in range(count):
        seed = (seed + A) & BITS
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & BITS
        z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
        found.append((z ^ z >> 31) >> 32)
    return found


def signature_of(text: str, config: NearDedupConfig) -> list[int]:
    shingles = shingles_of(text, config.shingle_words)
    hashes = [[((number & 0xFFFFFFFF) * factor + (number >> 32)) & 0xFFFFFFFF for number in shingles]
              for factor in factors(config.permutations, config.seed)]  # fmt: skip
    return [min(each, default=0xFFFFFFFF) for each in hashes]


def test_every_code_point_is_what_unicodedata_says():
    committed = (ROOM / "unicode_table.inc").read_text()
    if committed.split()[2] == f"{unicodedata.unidata_version};":
        assert unicode.table() == committed
    differ = [code for code in range(0x110000)
              if _dedup.character(code) != (unicode.kind(code), unicode.lower(code))]  # fmt: skip
    # Another Unicode than the table's has characters assigned since or before, and hardly anything else.
    assert len(differ) < (1 if committed.split()[2] == f"{unicodedata.unidata_version};" else 12_000)
    assert [_dedup.character(ord(char)) for char in "aZ_9É"] == [(1, 97), (1, 122), (0, 95), (1, 57), (1, 233)]


LETTERS = "aZz09 .-_'\n\tÄßΣİKȺ한日ぁไา\u0301\U00020000\ue000"
TEXTS = st.text(max_size=120) | st.text(st.sampled_from(LETTERS), max_size=200)
PIECES = [b"ab", b"\xff", b"\xe6\x97", b"\xa5", b"\xc3", b" ", b"\xf0\x9f", "日é".encode()]


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 7))
@example("a" * 500 + " " + "B" * 64 + "c" * 63, 1)
@example("x" * 63 + " y" + "é" * 40, 2)
@example("ab " * 50, 5)
@example("日" * 100, 3)
@example("Ⱥ" * 300, 1)
def test_words_and_shingles(text, width):
    raw = text.encode(errors="surrogatepass")
    assert _dedup.shingles(raw, 0).tolist() == [word_hash(word) for word in words_of(text)]
    assert _dedup.shingles(raw, width).tolist() == shingles_of(text, width)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join))
@example(b"\xe0\x81\xa1b")  # longer than need be
@example(b"\xf0\x80\x81\xa1b")
@example(b"\xc1\xa1b")
@example(b"\xf4\x90\x80\x80b")  # past the last code point
@example(b"\xed\xa0\x80b\xe6\x97")  # a surrogate, and a character cut off
def test_what_is_no_utf8_separates(raw):
    hashes = [word_hash(word) for word in words_of(raw.decode(errors="replace"))]
    assert _dedup.shingles(raw, 0).tolist() == hashes


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), permutations=st.sampled_from([16, 32, 80, 128]), words=st.integers(1, 3),
       seed=st.integers(0, 2**64 - 1))  # fmt: skip
def test_signatures(texts, permutations, words, seed):
    texts = [text.encode(errors="replace").decode() for text in texts]
    config = NearDedupConfig(permutations=permutations, shingle_words=words, seed=seed)
    signer = Signer(config)
    found = signer.sign(texts)
    assert found.dtype == np.uint32
    assert found.shape == (len(texts), permutations)
    assert found.tolist() == [signature_of(text, config) for text in texts]
    raw = [text.encode() for text in texts]
    assert (signer.sign(raw) == found).all()
    lengths = np.array([len(each) for each in raw], np.uint64)
    assert (signer.sign_packed(b"".join(raw), lengths) == found).all()


def test_the_same_with_any_threads_and_instructions():
    rng = np.random.default_rng()
    texts = [" ".join(map(str, rng.integers(0, 1000, size))) for size in rng.integers(0, 300, 500)]
    signer = Signer(NearDedupConfig(permutations=80))
    expected = signer.sign(texts, threads=1)
    assert (expected != 2**32 - 1).any(1).sum() > 400
    assert (signer.sign(texts, threads=5) == expected).all()
    assert (signer.sign(texts, threads=0) == expected).all()
    for number in range(_dedup.instruction_sets()):
        assert (_dedup.Minhash(80, 5, 1).sign(tuple(texts), 1, number) == expected).all()


def test_case_punctuation_and_space_do_not_count():
    signer = Signer(NearDedupConfig())
    texts = ["The quick, brown fox; leaps over", "the QUICK  brown\nfox 'leaps' OVER!", "the quick brown fox leaps up"]
    one, two, other = signer.sign(texts)
    assert (one == two).all()
    assert (one != other).any()
    short = signer.sign(["only four words here", "日本語は"])
    assert (short == 2**32 - 1).all()
    assert (signer.sign(["日本語はと"]) != 2**32 - 1).any()  # five characters, five words


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_the_estimate_has_no_bias_and_the_variance_of_independent_permutations(share):
    """Pairs of sets with a known Jaccard similarity, 128 permutations: means within 4.5 standard errors."""
    rng = np.random.default_rng()
    config = NearDedupConfig(shingle_words=1)
    pairs, size = 1500, 400
    common = round(size * share)
    texts = []
    for _ in range(pairs):
        words = [f"w{number}" for number in rng.choice(10**9, size, replace=False)]
        rest = (size - common) // 2
        texts += [" ".join(words[: common + rest]), " ".join(words[:common] + words[common + rest :])]
    truth = common / size
    signatures = Signer(config).sign(texts, threads=0).reshape(pairs, 2, -1)
    equal = signatures[:, 0] == signatures[:, 1]
    variance = truth * (1 - truth) / 128
    estimates = equal.mean(1)
    assert abs(estimates.mean() - truth) < 4.5 * (variance / pairs) ** 0.5
    assert 0.83 < estimates.var() / variance < 1.2
    # Bands: their numbers agree together as often as independent ones would.
    bands, rows = config.split
    together = equal[:, : bands * rows].reshape(pairs, bands, rows).all(2).any(1).mean()
    expected = 1 - (1 - truth**rows) ** bands
    assert abs(together - expected) < 4.5 * (expected * (1 - expected) / pairs) ** 0.5 + 1e-3


def test_calls_that_make_no_sense():
    signer = Signer(NearDedupConfig())
    assert signer.sign([]).shape == (0, 128)
    with pytest.raises(UnicodeEncodeError):
        signer.sign(["\ud800"])
    with pytest.raises(TypeError, match="a text is str or bytes"):
        signer.sign([1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="longer than the buffer"):
        signer.sign_packed(b"abc", np.array([2, 2]))
    for permutations, words in ((0, 5), (24, 5), (128, 0), (128, 33)):
        with pytest.raises(ValueError, match=r"multiple of 16|1 to 32 words"):
            _dedup.Minhash(permutations, words, 1)
