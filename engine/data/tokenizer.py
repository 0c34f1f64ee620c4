"""Tokenizers behind one interface: tokenizer.json (Hugging Face, read without transformers) and SentencePiece .model.

``encode`` takes text for what it is: no token is added, and a document that spells out ``<|endoftext|>`` does not
end there. A tokenizer's identity is ``sha256``, of its content, wherever it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from engine import _tokenize
from engine.data import fast_bpe
from engine.data.tokenizer_training import EOD, PAD, special_tokens, train_bpe, train_unigram, words
from engine.errors import UserError

# Looked for, in this order, where neither the user nor the tokenizer's own configuration names one.
USUAL_EOD = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
CONFIG = "tokenizer_config.json"
_KINDS = "Give a tokenizer.json, a directory that holds one, or a SentencePiece .model."
# Travel with a Hugging Face tokenizer; none of them changes an id.
COMPANIONS = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")
MODELS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = frozenset([*MODELS, CONFIG, *COMPANIONS])


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
        the result does not depend on it. Bytes must be UTF-8. Raises UserError for text that is not.
        """
        return _pack(self._encode_on(_as_str(texts), threads), end)

    def encode_spans(
        self, buffer: bytes | bytearray | memoryview, sizes: np.ndarray, threads: int = 1, *, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_packed` of texts that stand one behind the other in one buffer; ``sizes``: bytes of each, int64 [n].

        No text is copied or becomes a Python object. The sizes must add up to the buffer's.
        """
        ends = np.cumsum(sizes)
        if (ends[-1] if len(ends) else 0) != len(buffer) or (np.asarray(sizes) < 0).any():
            raise ValueError("the sizes do not fit the buffer")
        view = memoryview(buffer)
        texts = [bytes(view[stop - size : stop]) for stop, size in zip(ends, sizes, strict=True)]
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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. ``text`` is kept as it came, so that saving cannot change its hash."""

    def __init__(self, text: str, *, where: str, config: dict | None = None, eod_token: str | None = None):
        try:
            self._model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the binding raises nothing more precise
            raise _not_a_tokenizer(where, str(error)) from None
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
            raise _not_a_tokenizer(where, "its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_token = _find_eod(vocabulary, self._config, eod_token, where)
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
        with _utf8():
            ids, lengths = self._encoder.encode(texts, -1 if end is None else end, threads)
        return self._with_left_out(ids, lengths, lambda number: _as_str([texts[number]])[0], end)

    def encode_spans(
        self, buffer: bytes | bytearray | memoryview, sizes: np.ndarray, threads: int = 1, *, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self._encoder, str):
            return super().encode_spans(buffer, sizes, threads, end=end)
        sizes = np.ascontiguousarray(sizes, np.int64)
        with _utf8():
            ids, lengths = self._encoder.encode_spans(buffer, sizes, -1 if end is None else end, threads)
        if (lengths >= 0).all():
            return ids, lengths
        view, ends = memoryview(buffer), np.cumsum(sizes)
        return self._with_left_out(ids, lengths, lambda n: str(view[ends[n] - sizes[n] : ends[n]], "utf-8"), end)

    def _with_left_out(
        self, ids: np.ndarray, lengths: np.ndarray, text: Callable[[int], str], end: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts that have to be normalised first (length -1) are the library's, put where they belong."""
        numbers = np.flatnonzero(lengths < 0)
        if not len(numbers):
            return ids, lengths
        found = self.encode_batch([text(int(number)) for number in numbers])
        more, lengths[numbers] = _pack(found, end)
        starts = (np.cumsum(lengths) - lengths)[numbers]
        where = np.repeat(starts - np.cumsum(lengths[numbers]) + lengths[numbers], lengths[numbers])
        where += np.arange(len(more))
        merged = np.empty(len(ids) + len(more), np.int32)
        theirs = np.zeros(len(merged), bool)
        theirs[where] = True
        merged[theirs], merged[~theirs] = more, ids
        return merged, lengths

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

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
        _write_config(directory, defaults | {"eos_token": self.eod_token} | self._config, self.eod_token)

    @property
    def text(self) -> str:
        """The tokenizer.json as it was read."""
        return self._text

    @property
    def _content(self) -> bytes:
        # Sorted and unspaced: a tokenizer.json that was only re-indented is the same tokenizer.
        return json.dumps(json.loads(self._text), sort_keys=True, separators=(",", ":")).encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model, unigram or BPE."""

    def __init__(self, proto: bytes, *, where: str, config: dict | None = None, eod_token: str | None = None):
        import sentencepiece  # only here: most tokenizers are tokenizer.json

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise _not_a_tokenizer(where, str(error)) from None
        self._proto = proto
        self.config = self._config = config or {}
        self.vocab_size = len(self._model)
        if self.vocab_size == 0:
            raise _not_a_tokenizer(where, "its vocabulary is empty")
        vocabulary = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        named = self._config
        if self._model.eos_id() >= 0 and not {"eod_token", "eos_token"} & named.keys():
            named = {"eos_token": self._model.id_to_piece(self._model.eos_id())}
        self.eod_token = _find_eod(vocabulary, named, eod_token, where)
        self.eod_id = vocabulary[self.eod_token]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode_on(list(texts), 1)

    def _encode_on(self, texts: list[str], threads: int) -> list[list[int]]:
        threads = threads or _tokenize.available_cores()
        return self._model.encode(texts, add_bos=False, add_eos=False, num_threads=min(threads, max(1, len(texts))))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def token_id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self._proto)
        _write_config(directory, {"eos_token": self.eod_token} | self._config, self.eod_token)

    @property
    def proto(self) -> bytes:
        """The .model as it was read."""
        return self._proto

    @property
    def _content(self) -> bytes:
        return self._proto


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """From a tokenizer.json, a SentencePiece .model, or a directory (Hugging Face's or a prepared one) that holds one.

    Raises UserError if it is missing, not a tokenizer, or has no end-of-document token and none is given.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("no such tokenizer", where=str(path), fix=_KINDS)
    file = _file_in(path) if path.is_dir() else path
    try:
        content = file.read_bytes()
        config = _config_beside(file, path.is_dir())
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(file), fix="Check its permissions.") from None
    if file.suffix == ".model":
        return SentencePieceTokenizer(content, where=str(file), config=config, eod_token=eod_token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise _not_a_tokenizer(str(file), "it is no text") from None
    tokenizer = HuggingFaceTokenizer(text, where=str(file), config=config, eod_token=eod_token)
    if path.is_dir():
        found = {name: file.with_name(name) for name in COMPANIONS}
        tokenizer.companions = {name: beside.read_bytes() for name, beside in found.items() if beside.is_file()}
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    *,
    specials: int = 16,
    eod_token: str = EOD,
) -> HuggingFaceTokenizer:
    """Train a byte-level tokenizer: ``decode(encode(text)) == text`` for any text, whatever it was trained on.

    ``vocab_size`` (tokens) includes the ``specials`` and the 256 bytes; with little text fewer are learned.
    Raises UserError if there is no room for those.
    """
    if len(words(eod_token)) < 2:
        # The trainer could learn it from text, and every mention would end a document.
        raise UserError(f"{eod_token!r} is an ordinary word", where="eod_token", fix=f"Take one like {EOD}.")
    names = special_tokens(specials, eod_token)
    if vocab_size < 256 + len(names):
        problem = f"{vocab_size} is too small for 256 bytes and {len(names)} special tokens"
        raise UserError(problem, where="vocab_size", fix=f"Set it to at least {256 + len(names)}.")
    train = {"bpe": train_bpe, "unigram": train_unigram}[kind]
    model = train(texts, vocab_size, names)
    return HuggingFaceTokenizer(model.to_str(pretty=True), where=f"trained {kind} tokenizer", eod_token=eod_token)


def _find_eod(vocabulary: dict[str, int], config: dict, wanted: str | None, where: str) -> str:
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


def _file_in(directory: Path) -> Path:
    for folder in (directory, directory / "tokenizer"):
        for name in MODELS:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        "holds no tokenizer.json and no tokenizer.model", where=str(directory),
        fix="Save one there with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…).",
    )  # fmt: skip


def _config_beside(file: Path, in_directory: bool) -> dict:
    # A single file stands for itself: what lies beside it may belong to something else.
    beside = file.with_name(CONFIG)
    if not in_directory or not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        fix = "Mend it, or give the tokenizer file itself."
        raise UserError(f"not JSON ({error})", where=str(beside), fix=fix) from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(beside), fix="Mend it, or give the tokenizer file itself.")
    return config


def _write_config(directory: Path, config: dict, eod_token: str) -> None:
    text = json.dumps(config | {"eod_token": eod_token}, indent=2, ensure_ascii=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def _as_str(texts: Sequence[str | bytes]) -> list[str]:
    with _utf8():
        return [text if isinstance(text, str) else text.decode() for text in texts]


def _pack(found: list[list[int]], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    tail = () if end is None else (end,)
    lengths = np.array([len(ids) + len(tail) for ids in found], np.int64)
    every = chain.from_iterable(chain(ids, tail) for ids in found)
    return np.fromiter(every, np.int32, count=int(lengths.sum())), lengths


@contextlib.contextmanager
def _utf8() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(str(error), where="text to encode", fix="Repair it first; `mainspring prepare` does") from None


def _not_a_tokenizer(where: str, detail: str) -> UserError:
    return UserError(f"not a tokenizer ({detail[:200]})", where=where, fix=_KINDS)
