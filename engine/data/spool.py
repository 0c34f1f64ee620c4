"""Cleaned documents between the passes of `prepare`: text in a file; in memory a length and a split key each."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Enough text at once to keep all cores busy in the tokenizer, little enough to hold its ids in memory.
_BATCH_BYTES = 4_000_000
_BATCH_DOCUMENTS = 2048


class Spool:
    """UTF-8 documents one after the other in ``path``, in the order of the sources. Lengths in bytes."""

    def __init__(self, path: Path):
        self.path = path
        self.lengths = array.array("Q")
        self._keys = array.array("Q")

    def append(self, stream: BinaryIO, raw: bytes, key: int) -> None:
        stream.write(raw)
        self.lengths.append(len(raw))
        self._keys.append(key)

    @property
    def keys(self) -> np.ndarray:
        """[documents] uint64, see `split_key`."""
        return np.array(self._keys, np.uint64)

    def texts(self) -> Iterator[str]:
        with open(self.path, "rb") as stream:
            for length in self.lengths:
                yield stream.read(length).decode()

    def batches(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the first document, texts)."""
        texts: list[str] = []
        first, size = 0, 0
        for number, text in enumerate(self.texts()):
            texts.append(text)
            size += self.lengths[number]
            if size >= _BATCH_BYTES or len(texts) >= _BATCH_DOCUMENTS:
                yield first, texts
                texts, first, size = [], number + 1, 0
        if texts:
            yield first, texts


def split_key(digest: bytes, seed: int) -> int:
    """A uniform 64-bit number of a document's content and the seed alone: data added later moves no document."""
    return int.from_bytes(hashlib.sha256(str(seed).encode() + b":" + digest).digest()[:8], "big")


def choose_validation(keys: np.ndarray, fraction: float) -> np.ndarray:
    """[documents] bool: held out. Of two or more documents at least one is, and at least one is not.

    Only where the fraction of so few documents would be none, the one with the smallest key is taken.
    """
    if fraction == 0 or len(keys) < 2:
        return np.zeros(len(keys), bool)
    held_out = keys < np.uint64(int(fraction * 2**64))
    if not held_out.any():
        held_out[keys.argmin()] = True
    if held_out.all():
        held_out[keys.argmax()] = False
    return held_out


def choose_sample(spool: Spool, held_out: np.ndarray, budget: float) -> np.ndarray:
    """[documents] bool: training documents of about ``budget`` bytes, chosen by content. At least one."""
    total = float((np.array(spool.lengths, np.float64) * ~held_out).sum())
    share = min(1.0, budget / max(total, 1.0))
    # The low half of the key: the high one decided the split.
    picked = ~held_out & ((spool.keys & np.uint64(0xFFFFFFFF)) < np.uint64(int(share * 2**32)))
    if not picked.any():
        picked[np.flatnonzero(~held_out)[0]] = True
    return picked
