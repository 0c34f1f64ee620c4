"""What a tokenizer.json must say for `engine._tokenize` to give its ids, and the encoder made of it.

Byte-level BPE as all current language models have it. Anything else is refused with a reason, and the library encodes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tokenizers

from engine import _tokenize
from engine._tokenize import Pattern

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_NAME = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3, GPT-4 (cl100k) and ours; Qwen 2 and 3; GPT-4o (o200k) and GPT-OSS; Mistral's Tekken; GPT-2.
SPLITS = {
    _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST: Pattern.LLAMA3,
    _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST: Pattern.QWEN2,
    f"{_WORD}{_CONTRACTIONS}?|{_NAME}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _SLASHES: Pattern.GPT4O,
    f"{_WORD}|{_NAME}" + r"|\p{N}" + _SLASHES: Pattern.TEKKEN,
    _GPT2: Pattern.GPT2,
}


class NotFast(Exception):
    """Why a tokenizer.json is left to the library."""


def build(model: tokenizers.Tokenizer) -> _tokenize.Encoder:
    """The encoder with the same ids as ``model.encode_batch_fast(texts, add_special_tokens=False)``.

    ``model`` must spell special tokens out (``encode_special_tokens``), as ours do. Raises NotFast with the reason.
    """
    content = json.loads(model.to_str())
    if len(content["model"].get("vocab", ())) != model.get_vocab_size(with_added_tokens=False):
        raise NotFast("ids that two tokens share")  # the file that it writes lacks one of them
    normal_form = _normal_form(content["normalizer"])
    pattern = _pattern(content["pre_tokenizer"])
    byte_ids, merges, words = _model(content["model"])
    raw, normalized = _added(model, normal_form)
    return _tokenize.Encoder(pattern, byte_ids, merges, words, raw, normalized, normal_form)


def _normal_form(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is not None and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
        normalizer = steps[0] if len(steps) == 1 else {"type": "a sequence"} if steps else None
    if normalizer is not None and normalizer["type"] != "NFC":
        raise NotFast(f"normalizer {normalizer['type']}")
    return normalizer is not None


def _pattern(pre_tokenizer: dict[str, Any] | None) -> Pattern:
    if pre_tokenizer is None:
        raise NotFast("no pre_tokenizer")
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps or [{"type": "an empty sequence"}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise NotFast("pre_tokenizer without ByteLevel at its end, or with add_prefix_space")
    if last.get("use_regex", True):
        if not splits:
            return Pattern.GPT2
        if len(splits) == 1 and splits[0]["type"] == "Digits" and splits[0]["individual_digits"]:
            return Pattern.DIGITS_GPT2
    elif len(splits) == 1 and splits[0]["type"] == "Split":
        # Each pattern covers any text, so what it does not match can be removed as well as kept: there is nothing.
        way = (splits[0]["behavior"], bool(splits[0]["invert"]))
        found = SPLITS.get(splits[0]["pattern"].get("Regex", ""))
        if found is not None and way in {("Isolated", False), ("Removed", True)}:
            return found
    raise NotFast("pre_tokenizer with another way to split")


def _model(model: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[bytes, int]]:
    """(id of each byte [256], merges [n, 3], words that are not merged)."""
    if model["type"] != "BPE":
        raise NotFast(f"model {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(name):
            raise NotFast(f"model with {name}")
    vocabulary: dict[str, int] = model["vocab"]
    if vocabulary and max(vocabulary.values()) >= 2**31:
        raise NotFast("ids of more than 31 bits")
    if model.get("byte_fallback") and any(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise NotFast("model with byte_fallback")
    alphabet = byte_alphabet()
    byte_ids = np.array([vocabulary.get(character, -1) for character in alphabet], np.int32)
    merges = np.empty((len(model["merges"]), 3), np.int32)
    for rank, (left, right) in enumerate(model["merges"]):
        merges[rank] = vocabulary[left], vocabulary[right], vocabulary[left + right]
    words: dict[bytes, int] = {}
    if model.get("ignore_merges"):
        values = {character: byte for byte, character in enumerate(alphabet)}
        for token, number in vocabulary.items():
            if all(character in values for character in token):
                words[bytes(values[character] for character in token)] = number
    return byte_ids, merges, words


def _added(model: tokenizers.Tokenizer, normal_form: bool) -> tuple[list[tuple], list[tuple]]:
    """Added tokens that are looked for in the raw text, and those in the normalised one."""
    found: tuple[list[tuple], list[tuple]] = ([], [])
    contents = set()
    for number, token in model.get_added_tokens_decoder().items():
        content = token.content
        if token.normalized and normal_form and model.normalizer is not None:
            content = model.normalizer.normalize_str(content)
        if not content:
            continue
        if (content, token.normalized) in contents:
            raise NotFast("added tokens that are spelt alike")
        contents.add((content, token.normalized))
        flags = (token.special, token.single_word, token.lstrip, token.rstrip)
        found[token.normalized].append((content.encode(), number, *flags))
    return found


def byte_alphabet() -> list[str]:
    """The character that stands for each byte: printable ones for themselves, the others from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in shown)
    characters = dict(zip(shown, map(chr, shown), strict=True))
    characters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(256)]
