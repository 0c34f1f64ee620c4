"""Ids of many texts in one array, with the number of each: what `Tokenizer.encode_packed` gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np

from engine.errors import UserError

Packed = tuple[np.ndarray, np.ndarray]  # ids int32 [total], lengths int64 [n]
Buffer = bytes | bytearray | memoryview


def pack(found: list[list[int]], end: int | None) -> Packed:
    """One list after another, ``end`` behind each if there is one."""
    tail = () if end is None else (end,)
    lengths = np.array([len(ids) + len(tail) for ids in found], np.int64)
    every = chain.from_iterable(chain(ids, tail) for ids in found)
    return np.fromiter(every, np.int32, count=int(lengths.sum())), lengths


def complete(
    ids: np.ndarray, lengths: np.ndarray, text: Callable[[int], str],
    encode_batch: Callable[[list[str]], list[list[int]]], end: int | None,
) -> Packed:  # fmt: skip
    """Texts that were left out (length -1: they have to be normalised first) are the library's, put where they belong.

    ``text(n)`` is text number n. Writes into ``lengths``.
    """
    numbers = np.flatnonzero(lengths < 0)
    if not len(numbers):
        return ids, lengths
    more, counts = pack(encode_batch([text(int(number)) for number in numbers]), end)
    lengths[numbers] = counts
    places = np.repeat((np.cumsum(lengths) - lengths)[numbers] - (np.cumsum(counts) - counts), counts)
    theirs = np.zeros(len(ids) + len(more), bool)
    theirs[places + np.arange(len(more))] = True
    merged = np.empty(len(theirs), np.int32)
    merged[theirs], merged[~theirs] = more, ids
    return merged, lengths


def check_sizes(buffer: Buffer, sizes: np.ndarray) -> np.ndarray:
    """The sizes as int64. Raises ValueError unless they are those of texts that fill the buffer."""
    sizes = np.ascontiguousarray(sizes, np.int64)
    if sizes.ndim != 1 or (sizes < 0).any() or sizes.sum() != len(buffer):
        raise ValueError("the sizes do not fit the buffer")
    return sizes


def span(buffer: Buffer, sizes: np.ndarray, number: int) -> bytes:
    """Text number ``number`` of those that stand one behind the other."""
    start = int(sizes[:number].sum())
    return bytes(memoryview(buffer)[start : start + int(sizes[number])])


def spans(buffer: Buffer, sizes: np.ndarray) -> list[bytes]:
    """All of them."""
    view, ends = memoryview(buffer), np.cumsum(sizes).tolist()
    return [bytes(view[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]


def as_str(texts: Sequence[str | bytes]) -> list[str]:
    """Each as str. Raises what `utf8` makes a UserError of: for a lone surrogate as well, which is no text either."""
    return [text.encode().decode() if isinstance(text, str) else text.decode() for text in texts]


@contextlib.contextmanager
def utf8() -> Iterator[None]:
    """Makes a UserError of what is said about text that is none."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(str(error), where="text to encode", fix="Repair it first; `mainspring prepare` does") from None
