"""Byte-level BPE, the ids of Hugging Face's tokenizers (csrc/tokenize)."""

from collections.abc import Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Pattern(Enum):
    """How text is cut into words; the regular expressions stand in csrc/tokenize/split.hpp."""

    LLAMA3 = ...
    QWEN2 = ...
    GPT2 = ...
    DIGITS_GPT2 = ...
    GPT4O = ...
    TEKKEN = ...

# (content, id, hidden, single_word, strip_left, strip_right); a hidden one is spelt out like other text.
_Added = tuple[bytes, int, bool, bool, bool, bool]

class Encoder:
    """A byte-level BPE model. Its methods may be called from several threads at once."""

    def __init__(
        self,
        pattern: Pattern,
        byte_ids: NDArray[np.int32],
        merges: NDArray[np.int32],
        words: dict[bytes, int],
        raw: Sequence[_Added],
        normalized: Sequence[_Added],
        normal_form: bool,
    ) -> None:
        """byte_ids [256], -1 for none; merges [n, 3] = (left, right, result) by rank; words that are not merged."""

    def encode(
        self, texts: Sequence[str | bytes], end_id: int, threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(ids of all texts, the number of each; -1 and no ids for a text to normalise first). end_id -1 for none;
        threads 0: the available cores. ValueError for text that is not UTF-8."""

    def encode_spans(
        self, buffer: Buffer, sizes: NDArray[np.int64], end_id: int, threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The same of texts that stand one behind the other in one buffer, of these sizes in bytes."""

    def words(self, text: bytes) -> list[int]:
        """Where the pattern ends each word of a text, in bytes."""

def surely_normal(text: bytes) -> bool:
    """True only if the text is in normalisation form C; False may also mean that this is not easily told."""

def class_of(point: int) -> int:
    """The class bits of a code point, see csrc/tokenize/unicode.hpp."""

def available_cores() -> int:
    """Cores that this process may use."""
