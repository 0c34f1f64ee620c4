import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def parse_index(idx: Buffer) -> tuple[int, int, int, int, int, int, int]:
    """(dtype code, sequences, document indices, tokens, byte offsets of sizes, pointers and documents). ValueError."""

def index_bytes(sizes: NDArray[np.int32], dtype_code: int) -> bytes:
    """The .idx file of documents with these lengths in tokens, one sequence each."""

def item_size(dtype_code: int) -> int:
    """Bytes a token of this Megatron dtype code takes; 0 for codes that are no integer type."""

def shuffled(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on its four arguments only; all but count unsigned 64-bit."""

def sample_starts(sizes: NDArray[np.int32], order: NDArray[np.int64], stride: int, count: int) -> NDArray[np.int64]:
    """[count, 2]: position in order and offset in that document of token b * stride. IndexError past the end."""

def blend(
    weights: NDArray[np.int64], deficits: NDArray[np.int64], counts: NDArray[np.int64], steps: int
) -> tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(source [steps], its block [steps], deficits and counts after the last step) by the largest deficit."""

def gather(
    bin: Buffer,
    dtype_code: int,
    sizes: NDArray[np.int32],
    pointers: NDArray[np.int64],
    order: NDArray[np.int64] | None,
    pieces: NDArray[np.int64],
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> tuple[int, int]:
    """Fills tokens and labels from pieces [n, 4] = (position, offset, length, out); smallest and largest token read."""

def pack(
    sizes: NDArray[np.int32], order: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(examples row by row, where each row begins in them and, last, their number) by best-fit decreasing; equal sizes
    in the given order, a permutation. ValueError for a size outside [1, capacity]."""
