from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def run_bytes(digests: NDArray[np.uint64]) -> bytes:
    """The file of a unit's digests [documents, 2], sorted."""

def exact_duplicates(paths: list[str], part: int, parts: int) -> NDArray[np.uint32]:
    """[n, 4] (unit, document, first unit, first document) of later copies. ValueError(path, problem) for a bad file."""

class Minhash:
    def __init__(self, permutations: int, words: int, seed: int) -> None: ...
    def sign(self, texts: tuple[str | bytes, ...], threads: int, instruction_set: int = -1) -> NDArray[np.uint32]:
        """[texts, permutations]; all ones for a text without a shingle."""

    def sign_packed(self, buffer: Buffer, lengths: NDArray[np.uint64], threads: int) -> NDArray[np.uint32]:
        """The same for texts one after another in a buffer."""

def instruction_sets() -> int:
    """How many versions of the innermost loop this machine runs, the slowest first."""

def signature_bytes(signatures: NDArray[np.uint32], bands: int, rows: int, settings: int, threads: int = 1) -> bytes:
    """The file of a unit's signatures [documents, permutations]."""

def pairs(
    paths: list[str],
    keep: Callable[[int], NDArray[np.bool_] | None] | None,
    band: int,
    part: int,
    parts: int,
    matches: int,
    settings: int,
) -> bytes:
    """The file of verified pairs of a band's range of keys. ValueError(path, problem) for a bad file."""

def pair_bytes(pairs: NDArray[np.uint32]) -> bytes:
    """The same file of pairs [pairs, 4] that are known, in order: (unit, document, earlier unit, earlier document)."""

def clusters(paths: list[str], units: int, pairs_at_once: int) -> NDArray[np.uint32]:
    """[n, 4] (unit, document, first unit, first document) of what goes. ValueError(path, problem) for a bad file."""

def character(code: int) -> tuple[int, int]:
    """(0 separator, 1 part of a word, 2 word of its own; lower case) of a code point."""

def shingles(text: bytes, words: int) -> NDArray[np.uint64]:
    """Hashes of the runs of so many words; of the single words for 0."""

def header(path: str) -> dict[str, int]:
    """The counts in a file's header, checked. ValueError(path, problem) for a bad file."""
