"""Special tokens of a template become ids, the same characters in somebody's message stay characters.

A template's output is one text in which both look alike. Private-use characters of plane 16 keep them apart, each
standing for one character or one token, so that nothing a template does with text (trim, compare, split, JSON) notices:

- ``shield``: in every string of a message, the first character of whatever spells a special token is replaced;
- ``lift``: in the rendered text every special token that is still spelt is the template's and becomes one *twin*
  character; then the shielded characters come back;
- ``Spelling.encode``: the tokenizer knows the twins as added tokens and takes everything else for what it is. The whole
  text is encoded at once, so the borders between tokens are exactly those of the rendered text.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from engine.data.chat.conversation import BadRow
from engine.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

# Plane 16: a row that holds one of these characters is refused (nobody writes them), so none can forge a token.
_SHIELDS, _TWINS = 0x100000, 0x101000
GENERATION_START, GENERATION_END = "\U0010d000", "\U0010d001"
_MARKERS = 0x10E000
MAX_MESSAGES = 0x1F00
_REFUSED = re.compile("[\ud800-\udfff\U00100000-\U0010ffff]")
MARKER = re.compile("[\U0010e000-\U0010ffff]")

Encoded = tuple[np.ndarray, np.ndarray]  # ids int32 [n], character ranges int64 [n, 2]


def marker(message: int) -> str:
    """The character that says "inside message number ``message``"."""
    assert message < MAX_MESSAGES
    return chr(_MARKERS + message)


def message_of(character: str) -> int:
    """The message that a marker stands for."""
    return ord(character) - _MARKERS


class Spelling(ABC):
    """A tokenizer's special tokens, and its encoding of text in which some of them are twins.

    ``specials`` are token -> id, those that never come from text. Added tokens that a tokenizer finds in any text, such
    as Qwen's ``</think>``, are text here.
    """

    def __init__(self, specials: dict[str, int]):
        self.specials = {name: token for name, token in specials.items() if name}
        names = sorted(self.specials, key=lambda name: (-len(name), name))
        self._names = {name: chr(_TWINS + i) for i, name in enumerate(names)}
        self._twins = {twin: name for name, twin in self._names.items()}
        assert len(names) < 0xB000, "more special tokens than private-use characters"
        first = sorted({name[0] for name in names})
        self._shields = {character: chr(_SHIELDS + i) for i, character in enumerate(first)}
        self._unshield = {ord(shield): character for character, shield in self._shields.items()}
        # Looked up by first character and length: a pattern of 6,000 names (Gemma) takes 60 us for every "<".
        self._first = re.compile("|".join(map(re.escape, first)) or r"(?!)")
        self._lengths = {c: sorted({len(name) for name in names if name[0] == c}, reverse=True) for c in first}

    def shield(self, text: str) -> str:
        """``text`` in which nothing spells a special token. BadRow if it holds a private-use character of plane 16, or
        half a surrogate pair, which is no character."""
        bad = _REFUSED.search(text)
        if bad:
            what = "half a surrogate pair" if bad[0] < "\ue000" else "a private-use character of plane 16"
            raise BadRow("not_text", f"holds {what} (U+{ord(bad[0]):04X})")
        # Every place where one starts, overlapping ones too: "<s<s>" must not leave a "<s>" behind.
        return self._first.sub(lambda at: self._shields[at[0]] if self._at(text, at.start()) else at[0], text)

    def _at(self, text: str, place: int) -> str | None:
        """The longest special token that ``text`` spells at ``place``."""
        for length in self._lengths[text[place]]:
            if text[place : place + length] in self._names:
                return text[place : place + length]
        return None

    def shield_all(self, value: Any) -> Any:
        """A copy of JSON data, every string (keys too) shielded."""
        if isinstance(value, str):
            return self.shield(value)
        if isinstance(value, dict):
            return {self.shield(key) if isinstance(key, str) else key: self.shield_all(one)
                    for key, one in value.items()}  # fmt: skip
        if isinstance(value, (list, tuple)):
            return [self.shield_all(one) for one in value]
        return value

    def twins(self, text: str) -> str:
        """Rendered text with every special token that it spells as its twin; shields stay."""
        parts, done = [], 0
        for at in self._first.finditer(text):
            name = self._at(text, at.start()) if at.start() >= done else None
            if name is not None:
                parts += [text[done : at.start()], self._names[name]]
                done = at.start() + len(name)
        return "".join([*parts, text[done:]])

    def plain(self, text: str) -> str:
        """The shielded characters back, twins stay. As long as ``text``."""
        return text.translate(self._unshield)

    def written(self, text: str) -> str:
        """For people: twins and shields as they are spelt."""
        return "".join(self._twins.get(character, character) for character in self.plain(text))

    def is_twin(self, character: str) -> bool:
        return character in self._twins

    def name(self, twin: str) -> str:
        """The special token that a twin stands for."""
        return self._twins[twin]

    @cached_property
    def twin_class(self) -> re.Pattern[str]:
        """Matches one twin."""
        return re.compile(f"[{chr(_TWINS)}-{chr(_TWINS + max(len(self._twins), 1) - 1)}]")

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids of texts with twins, and for each id the range of characters that it stands for."""

    def encode(self, text: str) -> Encoded:
        return self.encode_batch([text])[0]


def spelling(tokenizer: Tokenizer) -> Spelling:
    """The spelling of either kind of tokenizer."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _HuggingFace(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _SentencePiece(tokenizer)


class _HuggingFace(Spelling):
    def __init__(self, tokenizer: HuggingFaceTokenizer):
        data = json.loads(tokenizer.text)
        data |= {"truncation": None, "padding": None}
        data["post_processor"] = None  # it would add tokens, and a byte-level one trims the offsets
        if data.get("model", {}).get("dropout"):
            data["model"]["dropout"] = None
        self._model = tokenizers.Tokenizer.from_str(json.dumps(data))
        added = list(self._model.get_added_tokens_decoder().items())
        # The tokenizer's own end of documents is special to us even where the file does not say so.
        special = {token.content: i for i, token in added if token.special or token.content == tokenizer.eod_token}
        special.setdefault(tokenizer.eod_token, tokenizer.eod_id)
        super().__init__(special)
        flags = {token.content: token for _, token in added}
        twins = []
        for name, twin in self._names.items():
            like = flags.get(name)
            same = {"single_word": like.single_word, "lstrip": like.lstrip, "rstrip": like.rstrip} if like else {}
            twins.append(tokenizers.AddedToken(twin, special=False, normalized=False, **same))
        self._model.add_tokens(twins)
        self._model.encode_special_tokens = True
        twin_ids = {twin: self._model.token_to_id(twin) for twin in self._twins}
        self._ids = {i: self.specials[self._twins[twin]] for twin, i in twin_ids.items() if i is not None}
        self._first_twin = min(self._ids, default=None)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._encoded(one) for one in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def _encoded(self, encoding: tokenizers.Encoding) -> Encoded:
        ids = np.array(encoding.ids, np.int64)
        ranges = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        if self._first_twin is not None:
            for place in np.flatnonzero(ids >= self._first_twin):
                ids[place] = self._ids[int(ids[place])]
        return ids.astype(np.int32), ranges


class _SentencePiece(Spelling):
    def __init__(self, tokenizer: SentencePieceTokenizer):
        import sentencepiece
        import sentencepiece.sentencepiece_model_pb2 as messages

        pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
        special = {pieces.id_to_piece(i): i for i in range(len(pieces)) if pieces.is_control(i)}
        special[tokenizer.eod_token] = tokenizer.eod_id
        super().__init__(special)
        # A word starts at the text's start, not after each special token: there no space is put in front.
        proto = messages.ModelProto.FromString(tokenizer.proto)  # type: ignore[attr-defined]
        proto.normalizer_spec.add_dummy_prefix = False
        self._at_start = pieces
        self._behind = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> Encoded:
        ids, ranges, place = [], [], 0
        for part in re.split(f"({self.twin_class.pattern})", text):
            if self.is_twin(part):
                ids.append(self.specials[self.name(part)])
                ranges.append((place, place + 1))
            elif part:
                self._piecewise(self._at_start if place == 0 else self._behind, part, place, ids, ranges)
            place += len(part)
        return np.array(ids, np.int32), np.array(ranges, np.int64).reshape(-1, 2)

    def _piecewise(self, model: Any, part: str, place: int, ids: list[int], ranges: list) -> None:
        import sentencepiece.sentencepiece_pb2 as messages

        # This form of the answer exists in every version; its ranges are in bytes.
        raw = model.encode(part, out_type="serialized_proto", add_bos=False, add_eos=False)
        bytes_of = [len(character.encode()) for character in part]
        character = np.repeat(np.arange(len(part)), bytes_of)
        total = len(character)
        pieces = messages.SentencePieceText.FromString(raw).pieces  # type: ignore[attr-defined]
        for piece in pieces:
            begin = character[piece.begin] if piece.begin < total else len(part)
            end = character[piece.end - 1] + 1 if piece.end > piece.begin else begin
            ids.append(piece.id)
            ranges.append((place + int(begin), place + int(end)))
