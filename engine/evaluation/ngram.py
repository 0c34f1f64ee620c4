"""Held-out cross-entropy of unigram and bigram models: the baselines a trained network has to be below.

Both are fitted on the training tokens, their constants included, and scored on the predictions the network makes too.
A split is one stream, its documents in file order; token i is predicted from token i-1, across document boundaries as
well, for every i >= 1. The first token of the stream, which nothing precedes, is not predicted. So a stream of n tokens
has n-1 predictions, and the result is their mean, in nats per token.

- Unigram: P(w) = (c(w) + k) / (N + k V), with the k that maximises the leave-one-out likelihood of the training tokens,
  sum over w of c(w) log((c(w) - 1 + k) / (N - 1 + k V)).
- Bigram: interpolated modified Kneser-Ney, the strongest of the simple smoothings in Chen and Goodman, "An Empirical
  Study of Smoothing Techniques for Language Modeling" (1998), with their closed-form discounts D1, D2, D3+:
      P(w | u) = (c(u, w) - D(c(u, w))) / c(u) + backoff(u) Q(w)
  where Q is the unigram of continuation counts (in how many different contexts w occurs), discounted in the same
  way and interpolated with 1/V, so that every token has a probability above zero.
  On the standard library's source, BPE of 8,192: 4.582 nats. Witten-Bell over the same Q has 4.577, over the plain
  unigram 4.609, absolute discounting over the plain unigram 4.614; at a vocabulary of 2,048 the order is the same.

Legend: p distinct pairs, v vocabulary, u previous token, w next token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError

CHUNK_TOKENS = 1 << 23  # counted at a time: 64 MB of pair keys, beside the distinct pairs found so far

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Documents(Protocol):
    """What is needed of ``engine.data.IndexedDataset``: its documents, arrays of token ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.integer]: ...


def ngram_cross_entropy(train: Documents, validation: Documents, vocab_size: int) -> dict[str, float]:
    """Mean held-out cross-entropy in nats per token: ``{"unigram": ..., "bigram": ..., "predictions": count}``.

    Raises UserError when a split has fewer than two tokens or a token id outside 0 .. vocab_size - 1.
    """
    train_counts = count_pairs(train, vocab_size, "train")
    held_out = count_pairs(validation, vocab_size, "validation")
    total = held_out.count_p.sum()
    unigram = Unigram.fit(train_counts)
    bigram = Bigram.fit(train_counts)
    # Each distinct pair is scored once and weighted by its count.
    unigram_nats = -np.log(unigram.prob_v[held_out.next_p])
    bigram_nats = -np.log(bigram.prob(held_out.previous_p, held_out.next_p))
    return {"unigram": float(unigram_nats @ held_out.count_p / total),
            "bigram": float(bigram_nats @ held_out.count_p / total),
            "predictions": int(total)}


# --- counting --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PairCounts:
    """Adjacent pairs of a token stream, sorted by (previous, next), and the stream's first token."""

    key_p: Ints  # previous * vocab_size + next
    count_p: Ints
    vocab_size: int
    first_token: int

    @property
    def previous_p(self) -> Ints:
        return self.key_p // self.vocab_size

    @property
    def next_p(self) -> Ints:
        return self.key_p % self.vocab_size

    def tokens_v(self) -> Ints:
        """How often each token occurs in the stream, its first one included."""
        count_v = _sum_by(self.next_p, self.count_p, self.vocab_size)
        count_v[self.first_token] += 1
        return count_v


def count_pairs(documents: Documents, vocab_size: int, name: str) -> PairCounts:
    """Counts adjacent pairs over all documents, concatenated in order, a chunk at a time."""
    key_p, count_p = np.empty(0, np.int64), np.empty(0, np.int64)
    first_token = None
    for chunk in _overlapping_chunks(documents):
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            bad = int(chunk.max() if chunk.max() >= vocab_size else chunk.min())
            raise UserError(f"token id {bad} is outside the vocabulary of {vocab_size}", where=f"{name} split",
                            fix="Use the tokenizer the data was prepared with, or prepare it again")
        first_token = int(chunk[0]) if first_token is None else first_token
        new_key_p, new_count_p = np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True)
        key_p, count_p = _merge(key_p, count_p, new_key_p, new_count_p)
    if first_token is None or not len(key_p):
        raise UserError("fewer than two tokens: nothing to predict", where=f"{name} split", fix="Prepare more data")
    return PairCounts(key_p, count_p, vocab_size, first_token)


def _overlapping_chunks(documents: Documents) -> Iterator[Ints]:
    """The stream in chunks that overlap by one token, so that each pair is in exactly one of them."""
    waiting: list[NDArray[np.integer]] = []
    length = 0
    for index in range(len(documents)):
        waiting.append(documents[index])
        length += len(waiting[-1])
        while length > CHUNK_TOKENS:
            stream = np.concatenate(waiting)
            yield stream[:CHUNK_TOKENS].astype(np.int64)
            waiting = [stream[CHUNK_TOKENS - 1:]]
            length = len(waiting[0])
    if length:
        yield np.concatenate(waiting).astype(np.int64)


def _merge(key_p: Ints, count_p: Ints, new_key_p: Ints, new_count_p: Ints) -> tuple[Ints, Ints]:
    if not len(key_p):
        return new_key_p, new_count_p
    merged_p, where_p = np.unique(np.concatenate([key_p, new_key_p]), return_inverse=True)
    return merged_p, _sum_by(where_p, np.concatenate([count_p, new_count_p]), len(merged_p))


def _sum_by(index_p: Ints, count_p: Ints, size: int) -> Ints:
    """Sums counts by index. bincount adds in float64, which is exact below 2**53."""
    return np.bincount(index_p, weights=count_p, minlength=size).astype(np.int64)


# --- models ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Unigram:
    prob_v: Floats
    k: float

    @classmethod
    def fit(cls, counts: PairCounts) -> Unigram:
        count_v = counts.tokens_v()
        k = _best_k(count_v)
        return cls((count_v + k) / (count_v.sum() + k * counts.vocab_size), k)


def _best_k(count_v: Ints) -> float:
    """The add-k constant of the greatest leave-one-out likelihood, by golden section over log k in [1e-6, 1e3]."""
    # Tokens of equal count are alike: some hundreds of terms instead of one a token.
    count_c, tokens_c = np.unique(count_v[count_v > 0], return_counts=True)
    total, vocab_size = count_v.sum(), len(count_v)

    def loss(log_k: float) -> float:
        k = math.exp(log_k)
        return -float((tokens_c * count_c) @ np.log((count_c - 1 + k) / (total - 1 + k * vocab_size)))

    low, high = math.log(1e-6), math.log(1e3)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class Bigram:
    """Interpolated modified Kneser-Ney over ``counts``."""

    counts: PairCounts
    discounted_p: Floats  # count minus discount
    context_v: Ints  # how often each token is followed by another
    backoff_v: Floats  # weight of the continuation unigram in each context; 1 in one never seen
    continuation_v: Floats

    @classmethod
    def fit(cls, counts: PairCounts) -> Bigram:
        size, previous_p = counts.vocab_size, counts.previous_p
        discounted_p = counts.count_p - _discount(counts.count_p)
        context_v = _sum_by(previous_p, counts.count_p, size)
        kept_v = np.bincount(previous_p, weights=discounted_p, minlength=size)
        backoff_v = np.where(context_v > 0, 1 - kept_v / np.maximum(context_v, 1), 1.0)

        contexts_v = np.bincount(counts.next_p, minlength=size)  # in how many different contexts each token occurs
        continuation_v = (contexts_v - _discount(contexts_v)) / contexts_v.sum()
        continuation_v += (1 - continuation_v.sum()) / size
        return cls(counts, discounted_p, context_v, backoff_v, continuation_v)

    def prob(self, previous_n: Ints, next_n: Ints) -> Floats:
        """P(next | previous) of n pairs of token ids, each in 0 .. vocab_size - 1."""
        key_n = previous_n * self.counts.vocab_size + next_n
        found_n = np.minimum(np.searchsorted(self.counts.key_p, key_n), len(self.counts.key_p) - 1)
        seen_n = self.counts.key_p[found_n] == key_n
        discounted_n = np.where(seen_n, self.discounted_p[found_n], 0.0)
        context_n = np.maximum(self.context_v[previous_n], 1)
        return discounted_n / context_n + self.backoff_v[previous_n] * self.continuation_v[next_n]


def _discount(count_n: Ints) -> Floats:
    """D(c) for each count: 0 at 0, D1, D2, and D3 from 3 on, from the counts of counts (Chen and Goodman, eq. 26).

    Where a corpus is too small or too odd for the formula, c/2 (it needs every n1 .. n4); always within
    [0.01, c - 0.01], so that every context keeps some probability for what it has not seen.
    """
    n = [0, *(np.count_nonzero(count_n == c) for c in (1, 2, 3, 4))]
    discounts = np.array([0.0, 0.5, 1.0, 1.5])
    if all(n[1:]):
        y = n[1] / (n[1] + 2 * n[2])
        discounts[1:] = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
    discounts[1:] = np.clip(discounts[1:], 0.01, np.array([1, 2, 3]) - 0.01)
    return discounts[np.minimum(count_n, 3)]
