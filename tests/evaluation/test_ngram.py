"""The n-gram baselines against a brute-force Python implementation, known corpora, and real text."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter

import numpy as np
import pytest

from engine.errors import UserError
from engine.evaluation import ngram
from engine.evaluation.ngram import Bigram, Unigram, count_pairs, ngram_cross_entropy


def documents(seed: int, vocab_size: int, lengths: list[int], skew: float = 1.3) -> list[np.ndarray]:
    """Random documents in which a token depends on the one before, with a Zipf-like tail; some may be empty."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        draws = np.minimum(rng.zipf(skew, size=length) - 1, vocab_size - 1)
        repeats = rng.random(length) < 0.3
        tokens = np.where(repeats, (np.roll(draws, 1) * 7 + 3) % vocab_size, draws)
        documents.append(tokens.astype(np.uint16))
    return documents


# --- the oracle: dictionaries and loops, straight from the formulas --------------------------------------------------

def brute_discounts(counts: list[int]) -> dict[int, float]:
    n1, n2, n3, n4 = (sum(count == c for count in counts) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
    y = n1 / (n1 + 2 * n2)
    raw = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
    return {0: 0.0} | {c: min(max(raw[c], 0.01), c - 0.01) for c in raw}


def brute_bigram(stream: list[int], vocab_size: int):
    pairs = Counter(itertools.pairwise(stream))
    discounts = brute_discounts(list(pairs.values()))
    contexts = Counter(w for _, w in pairs)
    low = brute_discounts([contexts[w] for w in range(vocab_size)])
    kept = {w: (contexts[w] - low[min(contexts[w], 3)]) / len(pairs) for w in range(vocab_size)}
    free = 1 - sum(kept.values())

    def prob(u: int, w: int) -> float:
        following = {b: count for (a, b), count in pairs.items() if a == u}
        continuation = kept[w] + free / vocab_size
        if not following:
            return continuation
        total = sum(following.values())
        backoff = sum(discounts[min(count, 3)] for count in following.values()) / total
        count = following.get(w, 0)
        return (count - discounts[min(count, 3)]) / total + backoff * continuation

    return prob


def brute_k(stream: list[int], vocab_size: int) -> float:
    """The best k by a plain search over a fine grid."""
    counts = Counter(stream)

    def likelihood(k: float) -> float:
        return sum(c * math.log((c - 1 + k) / (len(stream) - 1 + k * vocab_size)) for c in counts.values())

    return max((10 ** (exponent / 200) for exponent in range(-1200, 601)), key=likelihood)


CASES = {"dense": (20, [300, 0, 200, 1]), "sparse": (400, [150, 1, 1, 250]), "tiny": (10, [3])}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_against_brute_force(case, seed):
    vocab_size, lengths = CASES[case]
    train, validation = documents(seed, vocab_size, lengths), documents(seed + 100, vocab_size, [40, 0, 25])
    train_stream, held_out = np.concatenate(train).tolist(), np.concatenate(validation).tolist()
    result = ngram_cross_entropy(train, validation, vocab_size)

    prob = brute_bigram(train_stream, vocab_size)
    pairs = list(itertools.pairwise(held_out))
    assert result["bigram"] == pytest.approx(-sum(math.log(prob(u, w)) for u, w in pairs) / len(pairs), rel=1e-12)

    k, counts = Unigram.fit(count_pairs(train, vocab_size, "train")).k, Counter(train_stream)
    total = len(train_stream) + k * vocab_size
    expected = -sum(math.log((counts[w] + k) / total) for w in held_out[1:]) / len(pairs)
    assert result["unigram"] == pytest.approx(expected, rel=1e-12)
    assert k == pytest.approx(brute_k(train_stream, vocab_size), rel=0.02)
    assert result["predictions"] == len(held_out) - 1 == 64


@pytest.mark.parametrize("case", CASES)
def test_probabilities_sum_to_one_in_every_context_and_none_is_zero(case):
    vocab_size, lengths = CASES[case]
    counts = count_pairs(documents(0, vocab_size, lengths), vocab_size, "train")
    bigram = Bigram.fit(counts)
    previous, following = np.divmod(np.arange(vocab_size**2), vocab_size)
    prob_uw = bigram.prob(previous, following).reshape(vocab_size, vocab_size)
    np.testing.assert_allclose(prob_uw.sum(1), 1.0, rtol=1e-12)
    assert prob_uw.min() > 0
    prob_v = Unigram.fit(counts).prob_v
    assert prob_v.sum() == pytest.approx(1.0, rel=1e-12)
    assert prob_v.min() > 0


@pytest.mark.parametrize("chunk", [2, 3, 7, 64])
def test_counting_in_chunks_changes_nothing(chunk, monkeypatch):
    train, validation = documents(1, 30, [100, 0, 57, 1, 300]), documents(2, 30, [60])
    whole = ngram_cross_entropy(train, validation, 30)
    monkeypatch.setattr(ngram, "CHUNK_TOKENS", chunk)
    assert ngram_cross_entropy(train, validation, 30) == whole


def test_document_boundaries_are_predicted_and_the_first_token_is_not():
    train = documents(3, 20, [500])
    joined = ngram_cross_entropy(train, [np.array([4, 5, 6, 7, 8])], 20)
    assert ngram_cross_entropy(train, [np.array([4, 5]), np.array([], np.uint16), np.array([6, 7, 8])], 20) == joined
    assert joined["predictions"] == 4
    first = ngram_cross_entropy(train, [np.array([9, 5, 6, 7, 8])], 20)
    assert first["unigram"] == joined["unigram"]  # only the context of token 1 changed, not what is predicted
    assert first["bigram"] != joined["bigram"]


def test_uniform_tokens_cost_log_v_and_a_cycle_costs_nothing():
    rng = np.random.default_rng(0)
    uniform = [rng.integers(0, 16, 200_000).astype(np.uint16)]
    result = ngram_cross_entropy(uniform, [rng.integers(0, 16, 20_000).astype(np.uint16)], 16)
    assert result["unigram"] == pytest.approx(math.log(16), abs=1e-3)
    assert result["bigram"] == pytest.approx(math.log(16), abs=3e-3)
    cycle = [np.tile(np.arange(16, dtype=np.uint16), 2000)]
    result = ngram_cross_entropy(cycle, [np.tile(np.arange(16, dtype=np.uint16), 10)], 16)
    assert result["unigram"] == pytest.approx(math.log(16), abs=1e-3)
    assert result["bigram"] < 0.01


def test_a_markov_chain_comes_near_its_entropy_rate():
    rng = np.random.default_rng(5)
    transition = rng.dirichlet(np.full(40, 0.2), size=40)
    cumulative = transition.cumsum(1)
    stream = [0]
    for draw in rng.random(60_000):
        stream.append(min(int(np.searchsorted(cumulative[stream[-1]], draw)), 39))
    train, held_out = np.array(stream[:50_000]), np.array(stream[50_000:])
    truth = -np.log(transition[held_out[:-1], held_out[1:]]).mean()
    result = ngram_cross_entropy([train], [held_out], 40)
    assert truth < result["bigram"] < truth + 0.03
    assert result["unigram"] > truth + 0.5


def test_on_real_text_the_bigram_beats_the_unigram():
    """This Python's own source, by bytes and by words."""
    folder = os.path.dirname(os.__file__)
    texts = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                texts.append(file.read(20_000))
    train, validation = texts[::2], texts[1::8]

    def tokens(texts: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    by_byte = ngram_cross_entropy(tokens(train), tokens(validation), 256)
    assert 2.0 < by_byte["bigram"] < by_byte["unigram"] - 0.6 < math.log(256) - 1

    frequent = {word: i for i, (word, _) in enumerate(Counter(b" ".join(train).split()).most_common(999))}

    def words(texts: list[bytes]) -> list[np.ndarray]:
        return [np.array([frequent.get(word, 999) for word in text.split()], np.int32) for text in texts]

    by_word = ngram_cross_entropy(words(train), words(validation), 1000)
    assert by_word["bigram"] < by_word["unigram"] - 0.3


def test_four_million_tokens_take_seconds():
    train = [np.concatenate(documents(0, 8192, [4_000_000], skew=1.2))]
    started = time.perf_counter()
    ngram_cross_entropy(train, [train[0][:200_000]], 8192)
    assert time.perf_counter() - started < 10  # 1 s on an idle core


@pytest.mark.parametrize(("train", "validation", "message"), [
    ([[1, 2, 3]], [[1, 10]], "validation split: token id 10 is outside the vocabulary of 10"),
    ([[1, -2, 3]], [[1, 1]], "train split: token id -2 is outside"),
    ([[1, 2, 3]], [[1]], "validation split: fewer than two tokens"),
    ([], [[1, 2]], "train split: fewer than two tokens"),
    ([[]], [[1, 2]], "train split: fewer than two tokens"),
])
def test_bad_input(train, validation, message):
    with pytest.raises(UserError, match=message):
        ngram_cross_entropy([np.array(d, np.int32) for d in train], [np.array(d, np.int32) for d in validation], 10)
