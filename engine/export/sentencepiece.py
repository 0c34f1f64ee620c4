"""A SentencePiece .model as a tokenizer.json with the same ids, for Transformers, whose tokenizers are of that kind."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from engine.errors import UserError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True)
class Model:
    """What a .model says (sentencepiece_model.proto): pieces as (text, score, type), and how text is normalised."""

    pieces: list[tuple[str, float, int]]
    algorithm: int
    byte_fallback: bool
    suffix_spaces: bool
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message; the library would be one more dependency."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = varint()
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if size is None else size
        value = message[place : place + size]
        place += size
        yield key >> 3, struct.unpack("<f", value)[0] if kind == 5 else value


def parse(proto: bytes) -> Model:
    """The parts of a .model that decide ids."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(proto):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece.get(1, b"").decode(), piece.get(2, 0.0), piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return Model(pieces, trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0)), bool(trainer.get(24, 0)),
                 normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)),
                 bool(normalizer.get(5, 1)))


def _unknown(model: Model) -> int:
    return next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN)


def _merges(model: Model) -> list[tuple[str, str]]:
    """SentencePiece merges whatever makes a piece, the best scored first: each way to split each piece, in that order.
    """
    usable = {text for text, _, kind in model.pieces if kind == _NORMAL}
    scored = [(-score, i, text) for i, (text, score, kind) in enumerate(model.pieces) if kind == _NORMAL]
    found = []
    for _, _, text in sorted(scored):
        ways = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        found += [(left, right) for left, right in ways if left in usable and right in usable]
    return found


def convert(proto: bytes, *, bos: str | None = None) -> tokenizers.Tokenizer:
    """The tokenizer with the same ids; it begins texts with ``bos`` where that is given.

    Raises ``UserError`` for a model of words or characters.
    """
    model = parse(proto)
    names = [text for text, _, _ in model.pieces]
    if model.algorithm == _UNIGRAM:
        core: Any = models.Unigram([(text, score) for text, score, _ in model.pieces], _unknown(model),
                                   model.byte_fallback)
    elif model.algorithm == _BPE and not model.suffix_spaces:
        core = models.BPE({text: i for i, text in enumerate(names)}, _merges(model), unk_token=names[_unknown(model)],
                          fuse_unk=True, byte_fallback=model.byte_fallback)
    else:
        raise UserError("this kind of SentencePiece model has no counterpart in a tokenizer.json", where="tokenizer",
                        fix="Export models whose tokenizer is unigram or BPE")
    found = tokenizers.Tokenizer(core)
    found.normalizer = normalizers.Sequence(_normalizers(model, proto))
    found.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []))
    found.add_tokens([AddedToken(text, normalized=False, special=kind == _CONTROL)
                      for text, _, kind in model.pieces if kind == _CONTROL
                      # Spaces are escaped before SentencePiece looks for these.
                      or (kind == _USER_DEFINED and not (model.escape_spaces and " " in text))])
    if bos is not None:
        found.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, names.index(bos))])
    return found


def _normalizers(model: Model, proto: bytes) -> list[Any]:
    found: list[Any] = []
    if model.charsmap:
        import sentencepiece

        normalised = sentencepiece.SentencePieceProcessor(model_proto=proto).normalize
        if normalised("a\r\nb") == normalised("a\n\nb"):  # the Rust form takes the pair for one character
            found.append(normalizers.Replace("\r\n", "\n\n"))
        found.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        found += [normalizers.Replace(tokenizers.Regex(pattern), by) for pattern, by in ((" {2,}", " "), ("^ | $", ""))]
    if model.dummy_prefix:
        found.append(normalizers.Prepend(" "))
    return [*found, normalizers.Replace(" ", _SPACE)] if model.escape_spaces else found
