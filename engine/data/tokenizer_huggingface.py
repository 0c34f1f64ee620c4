"""A tokenizer.json, read without transformers; `encode_packed` in our own C++ where that gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from engine import _tokenize
from engine.data import fast_bpe, packed
from engine.data.tokenizer_base import Tokenizer, find_eod, not_a_tokenizer, write_config
from engine.data.tokenizer_training import PAD


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. ``text`` is kept as it came, so that saving cannot change its hash."""

    def __init__(self, text: str, *, where: str, config: dict | None = None, eod_token: str | None = None):
        try:
            self._model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the binding raises nothing more precise
            raise not_a_tokenizer(where, str(error)) from None
        self._text = text
        self.config = self._config = config or {}
        self.companions: dict[str, bytes] = {}
        # None of these belongs into pretraining data, and a file can switch on each of them.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        if getattr(self._model.model, "dropout", None):
            self._model.model.dropout = None
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise not_a_tokenizer(where, "its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_token = find_eod(vocabulary, self._config, eod_token, where)
        self.eod_id = vocabulary[self.eod_token]

    @cached_property
    def _encoder(self) -> _tokenize.Encoder | str:
        try:
            return fast_bpe.build(self._model)
        except fast_bpe.NotFast as reason:
            return str(reason)

    @property
    def slow(self) -> str:
        return self._encoder if isinstance(self._encoder, str) else ""

    def encode_packed(
        self, texts: Sequence[str | bytes], threads: int = 1, *, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self._encoder, str):
            return super().encode_packed(texts, threads, end=end)
        with packed.utf8():
            found = self._encoder.encode(texts, -1 if end is None else end, threads)
        return packed.complete(*found, lambda n: packed.as_str([texts[n]])[0], self.encode_batch, end)

    def encode_spans(
        self, buffer: bytes | bytearray | memoryview, sizes: np.ndarray, threads: int = 1, *, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self._encoder, str):
            return super().encode_spans(buffer, sizes, threads, end=end)
        sizes = packed.check_sizes(buffer, sizes)
        with packed.utf8():
            found = self._encoder.encode_spans(buffer, sizes, -1 if end is None else end, threads)
        return packed.complete(*found, lambda n: packed.span(buffer, sizes, n).decode(), self.encode_batch, end)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _encode_on(self, texts: list[str], threads: int) -> list[list[int]]:
        # A batch takes all cores, which is not what a worker process among others is to do.
        return [self.encode(text) for text in texts] if threads == 1 else self.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._text, encoding="utf-8")
        for name, content in self.companions.items():
            (directory / name).write_bytes(content)
        defaults: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.token_id(PAD) is not None:
            defaults["pad_token"] = PAD
        write_config(directory, defaults | {"eos_token": self.eod_token} | self._config, self.eod_token)

    @property
    def text(self) -> str:
        """The tokenizer.json as it was read."""
        return self._text

    @property
    def _content(self) -> bytes:
        # Sorted and unspaced: a tokenizer.json that was only re-indented is the same tokenizer.
        return json.dumps(json.loads(self._text), sort_keys=True, separators=(",", ":")).encode()
