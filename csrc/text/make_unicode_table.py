"""Writes unicode_table.inc: what Python's `unicodedata` says of every code point, as runs of equal properties.

    python csrc/text/make_unicode_table.py > csrc/text/unicode_table.inc

The table is committed, so that a document gets the same verdict under every Python. What Unicode had not assigned when
it was made counts as suspicious, so that Python itself is asked whether it is normalised.
"""

from __future__ import annotations

import sys
import unicodedata

# The same bits stand in unicode.hpp.
SPACE, LETTER, DIGIT, CONTROL, SUSPECT, SINGLE, MARK = (1 << bit for bit in range(7))
SCRIPTS = (
    "LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "THAI", "HAN", "KANA", "HANGUL",
    "OTHER",
)  # fmt: skip
BLOCKS = {"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA", "IDEOGRAPHIC": "HAN"}
# Written without spaces: a character stands for a word.
UNSPACED = {"HAN", "KANA", "THAI", "LAO", "MYANMAR", "KHMER", "TIBETAN"}


def composing() -> set[int]:
    """Code points that may join with the one before them: second halves of decompositions, Hangul vowels and finals."""
    found = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    for point in range(0x110000):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(int(parts[1], 16))
    return found


def properties(point: int, joins: set[int]) -> int:
    """Flags in the low byte, the script of a letter in the high one."""
    char = chr(point)
    category = unicodedata.category(char)
    flags = SPACE * char.isspace() | DIGIT * char.isdecimal() | LETTER * (char.isalnum() and not char.isdecimal())
    if point < 9 or 0x0E <= point < 0x20 or 0x7F <= point < 0xA0 or point == 0xFEFF:
        flags |= CONTROL
    moves = unicodedata.combining(char) or point in joins or unicodedata.normalize("NFC", char) != char
    if category != "Cs" and (moves or category == "Cn"):
        flags |= SUSPECT
    if category in ("Mn", "Mc"):
        flags |= MARK
    if not flags & (LETTER | MARK):
        return flags
    word = unicodedata.name(char, "").split(" ")[0]
    script = BLOCKS.get(word, word)
    if script in UNSPACED:
        flags |= SINGLE
    if not flags & LETTER or category in ("Lm", "No", "Nl"):
        return flags
    return flags | (SCRIPTS.index(script if script in SCRIPTS else "OTHER") + 1) << 8


def main() -> None:
    joins, previous, runs = composing(), None, []
    for point in range(0x110000):
        value = properties(point, joins)
        if value != previous:
            runs.append(f"{{0x{point:X},{value}}}")
            previous = value
    print(f"// Unicode {unicodedata.unidata_version}, made by make_unicode_table.py: first code point, properties.")
    line = ""
    for run in runs:
        if len(line) + len(run) > 118:
            print(line)
            line = ""
        line += run + ","
    print(line)
    print(f"{len(runs)} runs", file=sys.stderr)


if __name__ == "__main__":
    main()
