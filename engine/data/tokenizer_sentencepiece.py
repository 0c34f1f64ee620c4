"""A SentencePiece .model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from engine import _tokenize
from engine.data.tokenizer_base import Tokenizer, find_eod, not_a_tokenizer, write_config

_SPACE = "\u2581"  # what SentencePiece writes for a space


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model, unigram or BPE."""

    def __init__(self, proto: bytes, *, where: str, config: dict | None = None, eod_token: str | None = None):
        import sentencepiece  # only here: most tokenizers are tokenizer.json

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise not_a_tokenizer(where, str(error)) from None
        self._proto = proto
        self.config = self._config = config or {}
        self.vocab_size = len(self._model)
        if self.vocab_size == 0:
            raise not_a_tokenizer(where, "its vocabulary is empty")
        vocabulary = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        named = self._config
        if self._model.eos_id() >= 0 and not {"eod_token", "eos_token"} & named.keys():
            named = {"eos_token": self._model.id_to_piece(self._model.eos_id())}
        self.eod_token = find_eod(vocabulary, named, eod_token, where)
        self.eod_id = vocabulary[self.eod_token]
        self._spaces = self._bytes_of_a_space()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode_on(list(texts), 1)

    def _encode_on(self, texts: list[str], threads: int) -> list[list[int]]:
        if not self._spaces or not any(_SPACE in text for text in texts):
            return self._encode_plain(texts, threads)
        # The library takes U+2581 for the space that it writes for. Where all else is kept, this is kept as well.
        parts = [text.split(_SPACE) for text in texts]
        found = iter(self._encode_plain([part for some in parts for part in some], threads))
        joined = []
        for some in parts:
            first, *others = (next(found) for _ in some)
            joined.append([*first, *chain.from_iterable([*self._spaces, *ids] for ids in others)])
        return joined

    def _encode_plain(self, texts: list[str], threads: int) -> list[list[int]]:
        threads = min(threads or _tokenize.available_cores(), max(1, len(texts)))
        return self._model.encode(texts, add_bos=False, add_eos=False, num_threads=threads)

    def _bytes_of_a_space(self) -> list[int]:
        """The ids of U+2581 as bytes where the model keeps all other text as it is, as ours do; else none."""
        probe = "  \ufb01 e\u0301\t "
        ids = [self.token_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if self._model.normalize(probe) != probe.replace(" ", _SPACE) or None in ids:
            return []
        return [token for token in ids if token is not None and self._model.is_byte(token)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def token_id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self._proto)
        write_config(directory, {"eos_token": self.eod_token} | self._config, self.eod_token)

    @property
    def proto(self) -> bytes:
        """The .model as it was read."""
        return self._proto

    @property
    def _content(self) -> bytes:
        return self._proto
