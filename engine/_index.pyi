from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Truncated(Exception):
    """A mapped file that shrank: args are its path and the bytes that are left."""

class Map:
    """A file mapped for reading; a buffer. Keeps no descriptor open. OSError when it cannot be read."""

    def __init__(self, path: str | bytes) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def identity(self) -> tuple[int, int, int, int, int]:
        """(device, inode, bytes, modified and changed in nanoseconds since 1970) when it was opened."""

    def unchanged(self) -> bool:
        """Is the file at the path still this one, with the same times?"""

class Corpus:
    """The documents of pairs (idx, bin, tokens found by check_tables), numbered through. ValueError: not one pair."""

    def __init__(self, pairs: Iterable[tuple[Map, Map, int]]) -> None: ...
    @property
    def documents(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    def group_tokens(self, threads: int = 0) -> NDArray[np.int64]:
        """[ceil(documents / 512)]: tokens of each group of SampleOrder, in one pass over all lengths."""

    def gather(
        self, pieces: NDArray[np.int64], tokens: NDArray[np.int64], labels: NDArray[np.int64], threads: int = 1
    ) -> tuple[int, int]:
        """Fills tokens and labels from pieces [n, 3] = (token in file order, length, out); smallest, largest read."""

class SampleOrder:
    """The blocks of all epochs of a corpus in their order; totals of group_tokens. ValueError: less than one block."""

    def __init__(self, corpus: Corpus, totals: NDArray[np.int64], seq_length: int, seed: int) -> None: ...
    @property
    def blocks(self) -> int:
        """Of an epoch."""

    def locate(self, turns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, block of its row) of the n-th blocks, counted through the epochs."""

    def starts(self, epoch: int, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n, 2]: the document in which a block of the epoch's row begins, and where in it."""

def read_header(idx: Buffer) -> tuple[int, int, int, int, int, int]:
    """(dtype code, sequences, document indices, byte offsets of sizes, pointers and documents). ValueError."""

def check_tables(idx: Buffer, threads: int = 0) -> int:
    """Checks header and every entry; the number of tokens. ValueError names the first wrong entry."""

def item_size(dtype_code: int) -> int:
    """Bytes a token of this Megatron dtype code takes; 0 for codes that are no integer type."""

def shuffled(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on its four arguments only; all but count unsigned 64-bit."""

def permuted(places: NDArray[np.int64], count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.int64]:
    """Where another permutation of range(count) puts these places, each computed by itself. IndexError outside."""

def pieces(positions: NDArray[np.int64], length: int, seq_length: int) -> NDArray[np.int64]:
    """[n, 5] = (0, block, offset in it, length, place in the batch) of rows of a stream of blocks."""

def gather(
    sources: Iterable[SampleOrder],
    pieces: NDArray[np.int64],
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
    threads: int = 1,
) -> list[tuple[int, int]]:
    """Fills tokens and labels from pieces [n, 5] = (source, its n-th block, offset, length, out); what each source's
    smallest and largest token read were, the larger first where nothing was. IndexError outside a block, Truncated."""

def pack(
    sizes: NDArray[np.int32], order: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(examples row by row, where each row begins in them and, last, their number) by best-fit decreasing; equal sizes
    in the given order, a permutation. ValueError for a size outside [1, capacity]."""

def blend_counts(weights: NDArray[np.int64], position: int) -> NDArray[np.int64]:
    """How many of a blend's first blocks each source gives. ValueError unless weights are positive."""

def blend_rank(weights: NDArray[np.int64], source: int, own: int) -> int:
    """The position of a source's own-th block in the blend, at most 2^62."""

def blend_earliest(weights: NDArray[np.int64], own: NDArray[np.int64]) -> int:
    """The source whose own-th block comes before those of the others; -1 where all are negative or never come."""

def blend_range(
    weights: NDArray[np.int64], first: int, count: int, threads: int = 0
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """(source, its own block) of the blocks from first on. IndexError beyond 2^62; threads 0: the available cores."""

def blend_locate(
    weights: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(source, its own block) of blocks anywhere in the blend. IndexError outside [0, 2^62)."""
