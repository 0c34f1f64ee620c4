"""The quality rules: each a name, a description with its threshold, and a verdict on what a document measures.

The safe ones are on by default and drop what is certainly junk. Those of Gopher (Rae et al. 2021, arXiv 2112.11446,
section A.1.1) and FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6) keep the published thresholds; they are
for web pages and drop many a good list, table or log. A line counts without the blanks at its ends, a word is what
stands between blanks, and shares of characters in words leave blanks out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from engine._text import Statistics, repetition
from engine.config.cleaning import CleaningConfig
from engine.data import cleaning_language as languages
from engine.errors import UserError

Kind = Literal["prose", "code"]
PROSE: tuple[Kind, ...] = ("prose",)
BOTH: tuple[Kind, ...] = ("prose", "code")

# One "word" of this length is base64 or minified, and a single unit of work for any BPE; so is a gap.
MAX_RUN = 100_000
# Thai, Lao, Tibetan, Burmese, Khmer; kana and Chinese characters with their punctuation, and those of the other planes.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3001-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)
GOPHER_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
GOPHER_DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class Limits:
    """Lengths in characters."""

    min_characters: int = 16
    max_characters: int = 10_000_000


class Page:
    """A document under judgement: its text, counts, and what only some rules ask for."""

    def __init__(self, text: str, counts: Statistics, limits: Limits):
        self.text, self.counts, self.limits = text, counts, limits

    @cached_property
    def language(self) -> languages.Guess:
        return languages.guess(self.text)

    @cached_property
    def repeated(self) -> float:
        """Share of characters in words that are within five words that stood before."""
        total, _, duplicate = repetition(self.text, [], [5])
        return duplicate[0] / max(1, total)

    @cached_property
    def gopher_repetition(self) -> bool:
        total, top, duplicate = repetition(self.text, list(GOPHER_TOP), list(GOPHER_DUPLICATE))
        limits = [*GOPHER_TOP.values(), *GOPHER_DUPLICATE.values()]
        return any(found > limit * total for found, limit in zip([*top, *duplicate], limits, strict=True))


@dataclass(frozen=True)
class Rule:
    """``drops(page)`` is true for a document that must go."""

    name: str
    description: str
    kinds: tuple[Kind, ...]
    drops: Callable[[Page], bool]


def _few_letters(page: Page) -> bool:
    # Of the characters that show: columns of figures, ASCII art. A formula, and a table that says something, have more.
    # Any script's letters count.
    return 10 * page.counts.letters < page.counts.characters - page.counts.spaces


def _mostly_links(page: Page) -> bool:
    return page.counts.schemes > 0 and 10 * page.counts.url_characters > 7 * page.counts.characters


def _repeated_lines(page: Page) -> bool:
    # Not half: a file of many licences repeats their lines, as a song does its refrain.
    counts = page.counts
    return counts.lines >= 10 and 10 * counts.repeated_line_characters > 7 * counts.line_characters


def _long_run(page: Page) -> bool:
    if page.counts.longest_space > MAX_RUN:
        return True
    if page.counts.longest_word <= MAX_RUN:
        return False
    # A book in a script that is written without spaces may stand in one line.
    return any(len(run) > MAX_RUN and 2 * len(_UNSPACED.findall(run)) < len(run) for run in page.text.split())


def _repeated_words(page: Page) -> bool:
    return page.counts.words >= 50 and page.repeated > 0.8


# In the order they are tried; the first that hits names the drop.
SAFE: tuple[Rule, ...] = (
    Rule("empty", "nothing but whitespace", BOTH, lambda page: page.counts.words == 0),
    Rule("too_short", "fewer than min_characters", BOTH,
         lambda page: page.counts.characters < page.limits.min_characters),
    Rule("too_long", "more than max_characters", BOTH,
         lambda page: page.counts.characters > page.limits.max_characters),
    Rule("unreadable", "over a tenth are replacement characters", BOTH,
         lambda page: page.counts.replacements > 0.1 * page.counts.characters),
    Rule("long_run", f"over {MAX_RUN:,} characters without a space, or of nothing else", BOTH, _long_run),
    Rule("few_letters", "under a tenth of the visible characters are letters", PROSE, _few_letters),
    Rule("mostly_links", "over seven tenths is web addresses", PROSE, _mostly_links),
    Rule("repeated_lines", "over seven tenths is lines that stood before", PROSE, _repeated_lines),
    Rule("repeated_words", "over four fifths, of 50 words or more, is five words that stood before", PROSE,
         _repeated_words),
    # Nobody wrote that by hand: Python's standard library has a mean of 36.
    Rule("minified", "lines of over 500 characters on average", ("code",),
         lambda page: page.counts.characters > 500 * (page.counts.newlines + 1)),
)  # fmt: skip

GOPHER: tuple[Rule, ...] = (
    Rule("gopher_words", "under 50 or over 100,000 words", PROSE,
         lambda page: not 50 <= page.counts.words <= 100_000),
    Rule("gopher_word_length", "words of under 3 or over 10 characters on average", PROSE,
         lambda page: not 3 * page.counts.words <= page.counts.characters - page.counts.spaces
         <= 10 * page.counts.words),
    Rule("gopher_symbols", "over one # or one ellipsis for every ten words", PROSE,
         lambda page: max(page.counts.hashes, page.counts.ellipses) > 0.1 * page.counts.words),
    Rule("gopher_bullets", "over nine tenths of the lines start with a bullet", PROSE,
         lambda page: page.counts.bullet_lines > 0.9 * page.counts.lines),
    Rule("gopher_ellipsis_lines", "over three tenths of the lines end with an ellipsis", PROSE,
         lambda page: page.counts.ellipsis_lines > 0.3 * page.counts.lines),
    Rule("gopher_alphabetic", "under four fifths of the words have a letter", PROSE,
         lambda page: page.counts.alphabetic_words < 0.8 * page.counts.words),
    Rule("gopher_stop_words", "fewer than two function words of any known language", PROSE,
         lambda page: page.language.function_words < 2),
    Rule("gopher_lines", "over 0.3 of the lines, or 0.2 of their characters, stood before", PROSE,
         lambda page: page.counts.repeated_lines > 0.3 * page.counts.lines
         or page.counts.repeated_line_characters > 0.2 * page.counts.line_characters),
    Rule("gopher_paragraphs", "over 0.3 of the paragraphs, or 0.2 of their characters, stood before", PROSE,
         lambda page: page.counts.repeated_paragraphs > 0.3 * page.counts.paragraphs
         or page.counts.repeated_paragraph_characters > 0.2 * page.counts.line_characters),
    Rule("gopher_repetition", "too much is one 2- to 4-gram, or 5- to 10-grams that stood before (table A1)", PROSE,
         lambda page: page.gopher_repetition),
)  # fmt: skip

FINEWEB: tuple[Rule, ...] = (
    Rule("fineweb_line_ends", "at most 0.12 of the lines end a sentence", PROSE,
         lambda page: page.counts.ended_lines <= 0.12 * page.counts.lines),
    Rule("fineweb_lines", "a tenth of the characters, or more, is in lines that stood before", PROSE,
         lambda page: page.counts.repeated_line_characters >= 0.1 * page.counts.line_characters),
    Rule("fineweb_short_lines", "at least 0.67 of the lines have no more than 30 characters", PROSE,
         lambda page: page.counts.short_lines >= 0.67 * page.counts.lines),
)  # fmt: skip

RULES = SAFE
# Nothing can be made of these; the lengths have flags of their own.
ALWAYS_ON = ("empty", "too_short", "too_long")


def _asked_for(config: CleaningConfig) -> list[Rule]:
    """Rules that stand for an option of their own."""
    rules = []
    if (most := config.max_urls) is not None:
        rules.append(Rule("many_urls", f"over {most:,} web addresses", PROSE, lambda page: page.counts.urls > most))
    if config.language:
        wanted = frozenset(config.language)
        names = ", ".join(sorted(wanted))
        rules.append(Rule("language", f"plainly in none of these languages: {names}", PROSE,
                          lambda page: page.language.plainly_none_of(wanted)))  # fmt: skip
    return rules


def rules_of(config: CleaningConfig) -> tuple[Rule, ...]:
    """All rules that a configuration turns on, in the order they are tried."""
    more = {"safe": (), "gopher": GOPHER, "fineweb": GOPHER + FINEWEB}[config.quality]
    return (*SAFE, *_asked_for(config), *more)


def select_rules(skip: Sequence[str], config: CleaningConfig | None = None) -> tuple[Rule, ...]:
    """``rules_of(config)`` without those named; UserError for a name that is none or cannot be skipped."""
    rules = rules_of(config or CleaningConfig())
    names = [rule.name for rule in rules if rule.name not in ALWAYS_ON]
    for name in skip:
        if name not in names:
            raise UserError(f"no quality rule {name!r} to skip", where="skip_rule", fix=f"Rules: {', '.join(names)}.")
    return tuple(rule for rule in rules if rule.name not in skip)
