"""Cleaning: repairs that mend a document, and quality rules that drop it. Each names itself in the manifest.

Code is never reflowed: its whitespace, form feeds included, and its string literals (hence no NFC) stay as they are;
only line ends are normalised, and characters that no editor shows are removed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

from engine.config.cleaning import CleaningConfig, PersonalDataConfig
from engine.config.prepare import PrepareConfig
from engine.data.cleaning_report import EXCERPT_CHARACTERS as EXCERPT_CHARACTERS
from engine.data.cleaning_report import CleaningReport
from engine.errors import UserError

Kind = Literal["prose", "code"]

_CARRIAGE_RETURN = re.compile(r"\r\n?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_PAGE_BREAK = re.compile("[\x0b\x0c]")
_LETTER = re.compile(r"[^\W\d_]")
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]+")
_BLANK = re.compile(r"\s+")


@dataclass(frozen=True)
class Limits:
    """Lengths in characters."""

    min_characters: int = 16
    max_characters: int = 10_000_000


@dataclass(frozen=True)
class Rule:
    """``drops(text, limits)`` is true for a document that must go."""

    name: str
    description: str
    kinds: tuple[Kind, ...]
    drops: Callable[[str, Limits], bool]


def repair(text: str, kind: Kind) -> tuple[str, list[str]]:
    """The mended text and the names of the repairs that changed it. A second call changes nothing."""
    done = []

    def step(name: str, mended: str) -> None:
        nonlocal text
        if mended != text:
            text = mended
            done.append(name)

    if "\r" in text:
        step("newlines", _CARRIAGE_RETURN.sub("\n", text))
    if not text.isascii():  # checked first: searching 30 MB for surrogates costs more than all the rest
        step("surrogates", _SURROGATE.sub("\ufffd", text))
    step("control_characters", _CONTROL.sub("", text))
    if kind == "prose":
        step("page_breaks", _PAGE_BREAK.sub("\n", text))
        if not unicodedata.is_normalized("NFC", text):
            step("unicode_nfc", unicodedata.normalize("NFC", text))
    return text, done


def _long_run(text: str, _: Limits) -> bool:
    # One "word" of this length is base64 or minified, and a single unit of work for any BPE; so is a gap.
    if len(text) <= MAX_RUN:
        return False
    return any(len(word) > MAX_RUN for word in text.split()) or any(
        match.end() - match.start() > MAX_RUN for match in _BLANK.finditer(text)
    )


def _unreadable(text: str, _: Limits) -> bool:
    return text.count("\ufffd") > 0.1 * len(text)


def _few_letters(text: str, _: Limits) -> bool:
    # Of the characters that show: a table of figures, a hex dump, ASCII art. Any script's letters count.
    shown = len(text) - sum(len(blank) for blank in _BLANK.findall(text))
    return len(_LETTER.findall(text)) < 0.25 * shown


def _mostly_links(text: str, _: Limits) -> bool:
    return "://" in text and sum(len(url) for url in _URL.findall(text)) > 0.5 * len(text)


def _repeated_lines(text: str, _: Limits) -> bool:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(lines) < 10:
        return False
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return repeated > 0.5 * sum(map(len, lines))


def _minified(text: str, _: Limits) -> bool:
    # Mean line of 500 characters: nobody wrote that by hand. (Python's standard library has a mean of 36.)
    return len(text) > 500 * (text.count("\n") + 1)


MAX_RUN = 100_000
BOTH: tuple[Kind, ...] = ("prose", "code")

# In the order they are tried; the first that hits names the drop.
RULES: tuple[Rule, ...] = (
    Rule("empty", "nothing but whitespace", BOTH, lambda text, _: not text or text.isspace()),
    Rule("too_short", "fewer than min_characters", BOTH, lambda text, limits: len(text) < limits.min_characters),
    Rule("too_long", "more than max_characters", BOTH, lambda text, limits: len(text) > limits.max_characters),
    Rule("unreadable", "over a tenth are replacement characters", BOTH, _unreadable),
    Rule("long_run", f"over {MAX_RUN:,} characters without a space, or of nothing else", BOTH, _long_run),
    Rule("few_letters", "under a quarter of the visible characters are letters", ("prose",), _few_letters),
    Rule("mostly_links", "over half is web addresses", ("prose",), _mostly_links),
    Rule("repeated_lines", "over half is lines that stood before", ("prose",), _repeated_lines),
    Rule("minified", "lines of over 500 characters on average", ("code",), _minified),
)
# Nothing can be made of these; the lengths have flags of their own.
ALWAYS_ON = ("empty", "too_short", "too_long")


def select_rules(skip: list[str]) -> tuple[Rule, ...]:
    """RULES without those named; UserError for a name that is none or cannot be skipped."""
    names = [rule.name for rule in RULES if rule.name not in ALWAYS_ON]
    for name in skip:
        if name not in names:
            raise UserError(f"no quality rule {name!r} to skip", where="skip_rule", fix=f"Rules: {', '.join(names)}.")
    return tuple(rule for rule in RULES if rule.name not in skip)


class Cleaner:
    """Repairs and judges one document after the other, keeping the counts in ``report``.

    ``rules`` are ``select_rules``'s; ``contamination`` is built once a process, since it holds the evaluation sets.
    """

    def __init__(
        self,
        config: CleaningConfig | None = None,
        *,
        limits: Limits | None = None,
        rules: tuple[Rule, ...] = RULES,
        personal_data: PersonalDataConfig | None = None,
    ):
        self.config = config or CleaningConfig()
        self.limits = limits or Limits()
        self.rules = rules
        self.report = CleaningReport()
        self._rules_of = {kind: [rule for rule in rules if kind in rule.kinds] for kind in BOTH}

    @classmethod
    def of(cls, config: PrepareConfig) -> Self:
        """The cleaner that `mainspring prepare` was asked for. UserError for a rule or evaluation set that is none."""
        return cls(limits=Limits(config.min_characters, config.max_characters), rules=select_rules(config.skip_rule))

    def clean(self, text: str, kind: Kind, source: str, *, truncated: bool = False) -> str | None:
        """The document to keep, or None where a rule dropped it; ``truncated`` says that it was too long to read."""
        text, repairs = repair(text, kind)
        if truncated:
            self.report.drop("too_long", source, text)
            return None
        for rule in self._rules_of[kind]:
            if rule.drops(text, self.limits):
                self.report.drop(rule.name, source, text)
                return None
        self.report.repairs.update(repairs)
        return text

    def as_manifest(self) -> dict[str, Any]:
        """The ``cleaning`` entry of manifest.json for what this cleaner's report counts."""
        return self.report.as_manifest(self.rules)
