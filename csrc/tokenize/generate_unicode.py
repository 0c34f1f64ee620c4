"""Writes unicode_tables.inc: what every code point is to the tokenizers that `encoder.cpp` stands in for.

    python csrc/tokenize/generate_unicode.py

The classes are asked of Hugging Face's own regex engine, code point by code point, so that both agree on it whatever
Unicode version each of them has. The composition tables are Python's; code points that it does not know count as
"not normal", which sends a text with them to the library. tests/data/test_fast_bpe.py holds the file against both.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

# One bit each; unicode.hpp names them.
CLASSES = [r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"[\p{Lm}\p{Lo}]", r"\p{N}", r"\s", r"\p{M}", r"[\p{P}\p{S}]"]
WORD = 1 << len(CLASSES)
# Of the second table; below them the canonical combining class.
MAYBE, NEVER, DIGIT, COMPOSED = 0x100, 0x200, 0x400, 0x800
POINTS = [*range(0xD800), *range(0xE000, 0x110000)]
FILE = Path(__file__).with_name("unicode_tables.inc")


def classes() -> bytearray:
    """The bits of all code points, surrogates 0."""
    found, text = bytearray(0x110000), "".join(map(chr, POINTS))
    for bit, pattern in enumerate(CLASSES):
        matches = pre_tokenizers.Split(Regex(pattern + "+"), "removed", invert=True).pre_tokenize_str(text)
        for _, (start, end) in matches:
            for place in range(start, end):
                found[POINTS[place]] |= 1 << bit
    for point in word_characters():
        found[point] |= WORD
    return found


def word_characters() -> Iterator[int]:
    r"""Code points that are ``\w`` to the engine that looks around an added token with ``single_word``."""
    model = tokenizers.Tokenizer(models.BPE({"#": 0}, []))
    model.add_tokens([AddedToken("#", single_word=True, normalized=False)])
    # The model's own "#" and the added one have the same id: what tells them apart is the text between.
    model.pre_tokenizer = pre_tokenizers.Split(Regex("#"), "removed")
    for first in range(0, len(POINTS), 1 << 16):
        some = POINTS[first : first + (1 << 16)]
        batch = model.encode_batch_fast([chr(point) + "#" for point in some if point != ord("#")])
        yield from (p for p, found in zip((p for p in some if p != ord("#")), batch, strict=True) if not found.ids)


def digits() -> set[int]:
    """What the `Digits` pre-tokenizer cuts off. Its Unicode is newer than the patterns', so it knows a few more."""
    text = "".join(f"a{chr(point)}" for point in POINTS)
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(text)
    return {ord(piece) for piece, (start, end) in pieces if start % 2 and end == start + 1}


def more() -> list[int]:
    """`normal_forms`, and DIGIT for those that only the `Digits` pre-tokenizer takes for a number."""
    numbers = {point for point, bits in enumerate(classes()) if bits & 1 << CLASSES.index(r"\p{N}")}
    assert numbers <= digits(), "a number that Digits does not know: DigitsGpt2 in split.hpp relies on it"
    found = normal_forms()
    for point in digits() - numbers:
        found[point] |= DIGIT
    return found


def normal_forms() -> list[int]:
    """Combining class of each code point, with MAYBE (it may compose with what stands before), NEVER in NFC text, or
    COMPOSED (of a letter and marks, say)."""
    seconds = {second for _, second, _ in compositions()} | {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    found = [0] * 0x110000
    for point in POINTS:
        character = chr(point)
        if unicodedata.category(character) == "Cn" or unicodedata.normalize("NFC", character) != character:
            found[point] = NEVER
        else:
            composed = unicodedata.normalize("NFD", character) != character
            found[point] = unicodedata.combining(character) | MAYBE * (point in seconds) | COMPOSED * composed
    return found


def compositions() -> list[tuple[int, int, int]]:
    """(first, second, composed), Hangul syllables left out: they follow from arithmetic."""
    pairs = []
    for point in POINTS:
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            first, second = (int(part, 16) for part in parts)
            if unicodedata.normalize("NFC", chr(first) + chr(second)) == chr(point):
                pairs.append((first, second, point))
    return sorted(pairs)


def _rows(numbers: list[int]) -> str:
    lines = (", ".join(map(str, numbers[at : at + 32])) for at in range(0, len(numbers), 32))
    return "".join(f"    {line},\n" for line in lines)


def _two_stages(name: str, kind: str, values: list[int]) -> str:
    blocks: dict[tuple[int, ...], int] = {}
    index = [blocks.setdefault(tuple(values[at : at + 256]), len(blocks)) for at in range(0, len(values), 256)]
    flat = [value for block in blocks for value in block]
    return (f"constexpr uint8_t k{name}Block[{len(index)}] = {{\n{_rows(index)}}};\n"
            f"constexpr {kind} k{name}[{len(flat)}] = {{\n{_rows(flat)}}};\n")  # fmt: skip


def main() -> int:
    """Writes the file."""
    pairs = [first << 32 | second for first, second, _ in compositions()]
    FILE.write_text(
        f"// Written by generate_unicode.py (tokenizers {tokenizers.__version__}, Unicode {unicodedata.unidata_version}"
        " for normal forms). Do not edit.\n"
        + _two_stages("Class", "uint8_t", list(classes())) + _two_stages("More", "uint16_t", more())
        + f"constexpr uint64_t kComposed[{len(pairs)}] = {{\n{_rows(pairs)}}};\n"
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
