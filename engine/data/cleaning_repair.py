"""Repairs: what is mended in a document before it is judged.

Code is never reflowed: its whitespace, form feeds included, and its string literals (hence no NFC) stay as they are;
only line ends are normalised, and characters that no editor shows are removed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from engine.errors import UserError

# The bits of Statistics.mend, and which of them a repair of each kind of text answers.
CARRIAGE_RETURNS, SURROGATES, CONTROLS, PAGE_BREAKS, NOT_NFC = 1, 2, 4, 8, 16
MENDS = {
    "prose": CARRIAGE_RETURNS | SURROGATES | CONTROLS | PAGE_BREAKS | NOT_NFC,
    "code": CARRIAGE_RETURNS | SURROGATES | CONTROLS,
}

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_PAGE_BREAK = re.compile("[\x0b\x0c]")
# UTF-8 read as Latin-1 or Windows-1252: a lead byte's letter, and a continuation byte's sign right behind it.
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2018"
    "\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
)


def repair(text: str, kind: Literal["prose", "code"]) -> tuple[str, list[str]]:
    """The mended text and the names of the repairs that changed it. A second call changes nothing."""
    done = []

    def step(name: str, mended: str) -> None:
        nonlocal text
        if mended != text:
            text = mended
            done.append(name)

    if "\r" in text:
        step("newlines", text.replace("\r\n", "\n").replace("\r", "\n"))
    if not text.isascii():  # checked first: searching 30 MB for surrogates costs more than all the rest
        step("surrogates", _SURROGATE.sub("\ufffd", text))
    step("control_characters", _CONTROL.sub("", text))
    if kind == "prose":
        step("page_breaks", _PAGE_BREAK.sub("\n", text))
        if not unicodedata.is_normalized("NFC", text):
            step("unicode_nfc", unicodedata.normalize("NFC", text))
    return text, done


def mojibake_fixer() -> Callable[[str], str]:
    """Text with wrongly decoded parts mended, by ftfy. UserError where it is not installed."""
    try:
        from ftfy import fix_encoding
    except ImportError:
        raise UserError(
            "needs the ftfy package", where="cleaning.mojibake",
            fix='Install it (pip install "mainspring[data]"), or leave mojibake out.',
        ) from None  # fmt: skip

    def fix(text: str) -> str:
        # Few documents have such a pair at all, and ftfy is slow: it sees these alone.
        return text if text.isascii() or _MOJIBAKE.search(text) is None else fix_encoding(text)

    return fix
