"""The documented order of samples in plain Python: engine/data/samples.py says it in words, this in slow code."""

from __future__ import annotations

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
GROUPS, DOCUMENTS, BLOCKS = 0, 1, 2
TABLE = 2**16  # up to so many places a permutation is a shuffle, above it a Feistel network


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def subkey(key: int, word: int) -> int:
    return mix(((key ^ word) + GOLDEN) & MASK)


def stream_key(seed: int, epoch: int, purpose: int) -> int:
    return subkey(subkey(mix((seed + GOLDEN) & MASK), epoch), purpose)


def shuffled(key: int, count: int) -> list[int]:
    """Fisher and Yates' shuffle with Lemire's unbiased integers."""

    def below(bound):
        nonlocal key
        while True:
            key = (key + GOLDEN) & MASK
            product = mix(key) * bound
            if product & MASK >= 2**64 % bound:
                return product >> 64

    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = below(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def feistel(key: int, count: int, place: int) -> int:
    """Where a network of 8 rounds puts a place; again, while that is outside."""
    bits = (count - 1).bit_length()
    high_bits, low_bits = bits // 2, bits - bits // 2
    keys = [mix((key + GOLDEN * (i + 1)) & MASK) for i in range(8)]
    while True:
        high, low = place >> low_bits, place & (2**low_bits - 1)
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high ^= mix((first + low * GOLDEN) & MASK) >> (64 - high_bits)
            low ^= mix((second + high * GOLDEN) & MASK) >> (64 - low_bits)
        place = high << low_bits | low
        if place < count:
            return place


def permutation(key: int, count: int) -> list[int]:
    return shuffled(key, count) if count <= TABLE else [feistel(key, count, place) for place in range(count)]


def document_order(documents: int, seed: int, epoch: int, group: int = 512) -> list[int]:
    """The documents in the order of an epoch's row of tokens."""
    groups, key, order = -(-documents // group), stream_key(seed, epoch, DOCUMENTS), []
    for g in permutation(stream_key(seed, epoch, GROUPS), groups):
        members = list(range(g, documents, groups))
        order += [members[i] for i in shuffled(subkey(key, g), len(members))]
    return order


def block_order(blocks: int, seed: int, epoch: int) -> list[int]:
    """Which block of the row comes when."""
    return permutation(stream_key(seed, epoch, BLOCKS), blocks)


def row(documents, seed: int, epoch: int) -> list[int]:
    """The row of tokens of an epoch, of documents that can be indexed and have a length."""
    return [int(token) for number in document_order(len(documents), seed, epoch) for token in documents[number]]


def blocks_in_order(documents, seq_length: int, seed: int, epoch: int) -> list[list[int]]:
    """The blocks of an epoch, of S + 1 tokens each, in the order in which they come."""
    tokens = row(documents, seed, epoch)
    count = (len(tokens) - 1) // seq_length
    return [tokens[b * seq_length : (b + 1) * seq_length + 1] for b in block_order(count, seed, epoch)]
