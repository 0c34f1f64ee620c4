"""Makes unicode_table.inc from this Python's unicodedata: `cd csrc/dedup; python make_unicode.py > unicode_table.inc`.

Letters, marks and numbers make words; those of scripts written without spaces make a word each.
"""

from __future__ import annotations

import sys
import unicodedata

SEPARATOR, WORD, SINGLE = 0, 1, 2

# Thai, Lao, Tibetan; Myanmar; Khmer; CJK radicals to the end of Han, kana and bopomofo included; compatibility
# ideographs; half-width kana; kana supplements; the ideographic planes.
WITHOUT_SPACES = [(0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x9FFF), (0xF900, 0xFAFF),
                  (0xFF66, 0xFF9D), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF)]  # fmt: skip


def kind(code: int) -> int:
    if unicodedata.category(chr(code))[0] not in "LMN":
        return SEPARATOR
    return SINGLE if any(first <= code <= last for first, last in WITHOUT_SPACES) else WORD


def lower(code: int) -> int:
    """The lower case where it is one character, else the character itself."""
    text = chr(code).lower()
    return ord(text) if len(text) == 1 else code


def table() -> str:
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if kind(code) == SEPARATOR:
            continue
        if ranges and ranges[-1][1] == code - 1 and ranges[-1][2] == kind(code):
            ranges[-1][1] = code
        else:
            ranges.append([code, code, kind(code)])
    pairs = [(code, lower(code)) for code in range(sys.maxunicode + 1) if lower(code) != code]
    lines = [f"// Unicode {unicodedata.unidata_version}; made by make_unicode.py.", "constexpr Range RANGES[] = {"]
    lines += wrap(f"{{{first:#x},{last:#x},{what}}}" for first, last, what in ranges)
    lines += ["};", "constexpr Lower LOWER[] = {", *wrap(f"{{{code:#x},{to:#x}}}" for code, to in pairs), "};"]
    return "\n".join(lines) + "\n"


def wrap(items) -> list[str]:
    lines = [""]
    for item in items:
        if len(lines[-1]) + len(item) > 117:
            lines.append("")
        lines[-1] += f"{item},"
    return lines


if __name__ == "__main__":
    sys.stdout.write(table())
