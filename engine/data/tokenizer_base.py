"""What every tokenizer here can do, and what both kinds of them share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from engine.data import packed
from engine.data.tokenizer_training import EOD
from engine.errors import UserError

# Looked for, in this order, where neither the user nor the tokenizer's own configuration names one.
USUAL_EOD = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
CONFIG = "tokenizer_config.json"
KINDS = "Give a tokenizer.json, a directory that holds one, or a SentencePiece .model."


class Tokenizer(ABC):
    """``vocab_size`` counts ids from 0, gaps included; ``eod_id`` ends every document of a prepared directory."""

    vocab_size: int
    eod_id: int
    eod_token: str
    config: dict  # what tokenizer_config.json said, {} without one

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added; control tokens in the text are spelt out."""

    @property
    def slow(self) -> str:
        """Why `encode_packed` is left to the library, "" where our own C++ does it."""
        return "a SentencePiece model"

    @property
    def fast(self) -> bool:
        """Whether `encode_packed` is our own C++, 20 times as fast as the library (figures: docs/data.md)."""
        return not self.slow

    def encode_packed(
        self, texts: Sequence[str | bytes], threads: int = 1, *, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after another int32 [total], how many of each int64 [n]): those of `encode_batch`.

        ``end``: an id to put behind each text, counted with it (``eod_id``, say). ``threads`` 0: the available cores;
        the result does not depend on it (the library, where ``fast`` is false, takes one core or all). Bytes must be
        UTF-8. Raises UserError for text that is not.
        """
        with packed.utf8():
            return packed.pack(self._encode_on(packed.as_str(texts), threads), end)

    def encode_spans(
        self, buffer: bytes | bytearray | memoryview, sizes: np.ndarray, threads: int = 1, *, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_packed` of texts that stand one behind the other in one buffer; ``sizes``: bytes of each, int64 [n].

        No text is copied or becomes a Python object. The sizes must add up to the buffer's.
        """
        texts = packed.spans(buffer, packed.check_sizes(buffer, sizes))
        return self.encode_packed(texts, threads, end=end)

    def _encode_on(self, texts: list[str], threads: int) -> list[list[int]]:
        return self.encode_batch(texts)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, specials included. Bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token by name (a special, say), None if there is none."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write what `load_tokenizer(directory)` reads back with the same ids and the same ``sha256``."""

    @property
    @abstractmethod
    def _content(self) -> bytes: ...

    def encode(self, text: str) -> list[int]:
        """Ids of one text, nothing added."""
        return self.encode_batch([text])[0]

    @cached_property
    def sha256(self) -> str:
        """Hash of the model and of the end-of-document token; the file's place and layout do not matter."""
        return hashlib.sha256(self._content + b"\n" + self.eod_token.encode()).hexdigest()


def find_eod(vocabulary: dict[str, int], config: dict, wanted: str | None, where: str) -> str:
    """The token that ends documents: the wanted one, that of the configuration, a usual one. Raises UserError."""
    if wanted is not None:
        if wanted not in vocabulary:
            fix = "Set --eod_token to one that it has."
            raise UserError(f"no token {wanted!r} to end documents with", where=where, fix=fix)
        return wanted
    for name in ("eod_token", "eos_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
            return token
    for token in USUAL_EOD:
        if token in vocabulary:
            return token
    fix = "Name one of its tokens with --eod_token."
    raise UserError("has no end-of-document token that we know", where=where, fix=fix)


def write_config(directory: Path, config: dict, eod_token: str) -> None:
    """tokenizer_config.json of a saved tokenizer."""
    text = json.dumps(config | {"eod_token": eod_token}, indent=2, ensure_ascii=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def not_a_tokenizer(where: str, detail: str) -> UserError:
    """The error for a file that is something else."""
    return UserError(f"not a tokenizer ({detail[:200]})", where=where, fix=KINDS)
