"""A hint at the language of a document, from its scripts and the function words of each language.

A language identifier (py3langid, fastText) names the language of a sentence; at 1 to 5 MB/s it would be the slowest
part of the path. This one only answers "plainly another language", on whole documents, at hundreds of MB/s, and where
it is not sure, the document stays: Danish passes for Norwegian, and a page of names or code for anything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from engine._text import FunctionWords
from engine.data.function_words import FUNCTION_WORDS

# The order of csrc/text/make_unicode_table.py, from 1 on.
SCRIPTS = (
    "none", "latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "tamil", "thai", "han", "kana",
    "hangul", "other",
)  # fmt: skip
MIN_LETTERS, MIN_WORDS, MIN_KINDS = 50, 20, 6
# A character that is a syllable or a word weighs as much as the letters it stands for.
_WEIGHT = {"han": 3, "kana": 2, "hangul": 2}

LANGUAGES = [language for table in FUNCTION_WORDS.values() for language in table]
SCRIPT_OF = {language: script for script, table in FUNCTION_WORDS.items() for language in table}


@dataclass(frozen=True)
class Guess:
    """What the letters and words of a text say; ``hits``: how many words are function words of each language.

    ``kinds``: how many different ones. ``letters`` as in an alphabet: a Chinese character counts as three.
    """

    letters: int
    script: str
    words: int
    hits: dict[str, int]
    kinds: dict[str, int]

    @property
    def function_words(self) -> int:
        """Of the language that has the most; as many as words where the script's languages are known by no words."""
        known = any(FUNCTION_WORDS.get(self.script, {}).values())
        return max(self.hits.values(), default=0) if known else self.words

    def plainly_none_of(self, wanted: Collection[str]) -> bool:
        """True where most letters are of a script that none of them is written in, or where another language of that
        script has a sixteenth of the words, and twice as many as any of them. Never on a short text, nor for a few
        words again and again: a list of names is full of "de", "van" and "la"."""
        if self.letters < MIN_LETTERS:
            return False
        same = [language for language in wanted if SCRIPT_OF[language] == self.script]
        if not same:
            return True
        if self.words < MIN_WORDS:
            return False
        best = max(self.hits[language] for language in same)
        others = [name for name in self.hits if name not in same and self.kinds[name] >= MIN_KINDS]
        other = max((self.hits[name] for name in others), default=0)
        return 16 * other >= self.words and other > 2 * best


@cache
def _function_words() -> FunctionWords:
    return FunctionWords([_forms(words) for table in FUNCTION_WORDS.values() for words in table.values()])


def _forms(words: str) -> list[str]:
    # Without the Latin letters: "a", "i" and "s" are Czech words, and half of the names in C, HTML and mail addresses.
    longer = [word for word in words.split() if len(word) > 1 or not word.isascii()]
    return sorted({form for word in longer for form in (word, word.capitalize(), word.upper())})


def guess(text: str) -> Guess:
    """The script of most letters, and the function words of its languages, in the first 65,536 characters."""
    counts, words, hits, kinds = _function_words().hints(text)
    letters = {name: count * _WEIGHT.get(name, 1) for name, count in zip(SCRIPTS, counts, strict=True)}
    total = sum(letters.values())
    # Japanese is kana among Chinese characters, and Chinese has none.
    if 10 * letters["kana"] >= letters["han"] + letters["kana"] > 0:
        letters["kana"] += letters.pop("han")
    script = max(letters, key=lambda name: letters[name])
    languages = FUNCTION_WORDS.get(script, {})
    at = [number for number, name in enumerate(LANGUAGES) if name in languages]
    return Guess(
        total, script, words, {LANGUAGES[i]: hits[i] for i in at}, {LANGUAGES[i]: kinds[i] for i in at}
    )  # fmt: skip
