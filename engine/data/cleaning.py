"""Cleaning: repairs that mend a document, masks, and quality rules that drop it. Each names itself in the manifest.

    repair -> web furniture or licence header -> masks -> rules -> evaluation sets

One scan in C++ says what a document measures; a step that changes the text has it measured again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from engine._text import scan
from engine.config.cleaning import CleaningConfig, DecontaminationConfig, PersonalDataConfig
from engine.config.prepare import PrepareConfig
from engine.data.cleaning_lines import remove_furniture, remove_licence_header
from engine.data.cleaning_repair import MENDS, mojibake_fixer, repair
from engine.data.cleaning_report import EXCERPT_CHARACTERS, SAMPLES_PER_RULE, CleaningReport
from engine.data.cleaning_rules import BOTH, RULES, Kind, Limits, Page, Rule, rules_of, select_rules
from engine.data.contamination import Contamination, load
from engine.data.personal_data import mask

__all__ = [
    "EXCERPT_CHARACTERS", "RULES", "SAMPLES_PER_RULE", "Cleaner", "CleaningReport", "Contamination", "Kind", "Limits",
    "Rule", "repair", "rules_of", "select_rules",
]  # fmt: skip


@dataclass
class _Done:
    """What was changed in one document; it counts once the document is kept."""

    repairs: list[str]
    lines: dict[str, int] = field(default_factory=dict)
    first_line: str = ""
    masked: dict[str, int] = field(default_factory=dict)


class Cleaner:
    """Repairs and judges one document after the other, keeping the counts in ``report``.

    ``rules`` are ``select_rules``'s. Building one reads the evaluation sets: once a process is enough. To join the work
    of several: ``one.report.merge(another.report)`` in the order of the documents, then ``one.as_manifest()``.

    Raises:
        UserError: an evaluation set cannot be used, or ftfy is wanted and missing.
    """

    def __init__(
        self,
        config: CleaningConfig | None = None,
        *,
        limits: Limits | None = None,
        rules: tuple[Rule, ...] | None = None,
        personal_data: PersonalDataConfig | None = None,
        decontaminate: DecontaminationConfig | None = None,
    ):
        self.config = config or CleaningConfig()
        self.limits = limits or Limits()
        self.rules = rules_of(self.config) if rules is None else rules
        self.report = CleaningReport()
        self.masks = tuple(personal_data.mask) if personal_data else ()
        self.contamination = load(decontaminate) if decontaminate and decontaminate.sets else None
        self._rules_of = {kind: [rule for rule in self.rules if kind in rule.kinds] for kind in BOTH}
        self._fix_mojibake = mojibake_fixer() if self.config.mojibake else None
        changing = {"prose": self.config.mojibake or self.config.boilerplate, "code": self.config.licence_headers}
        self._changing = {kind: bool(self.masks) or changing[kind] for kind in BOTH}
        for name in self.masks:
            self.report.masked.found[name] = 0  # a filter that finds nothing still says so
        if self.contamination is not None:
            self.rules = (*self.rules, self.contamination.rule) if self.contamination.drops else self.rules
            for item in self.contamination.sets:
                self.report.contamination.found[item.name] = 0

    @classmethod
    def of(cls, config: PrepareConfig) -> Self:
        """The cleaner that `mainspring prepare` was asked for."""
        return cls(
            config.cleaning, limits=Limits(config.min_characters, config.max_characters),
            rules=select_rules(config.skip_rule, config.cleaning),
            personal_data=config.personal_data, decontaminate=config.decontaminate,
        )  # fmt: skip

    def clean(self, text: str, kind: Kind, source: str, *, truncated: bool = False) -> str | None:
        """The document to keep, or None where a rule dropped it; ``truncated`` says that it was too long to read."""
        counts, done = scan(text), _Done([])
        if counts.mend & MENDS[kind]:
            text, done.repairs = repair(text, kind)
            counts = scan(text)
        if truncated:
            self.report.drop("too_long", source, text)
            return None
        if self._changing[kind]:
            changed = self._change(text, kind, done)
            counts = counts if changed == text else scan(changed)
            text = changed
        page = Page(text, counts, self.limits)
        for rule in self._rules_of[kind]:
            if rule.drops(page):
                self.report.drop(rule.name, source, text)
                return None
        if self.contamination is not None and self._is_contaminated(text, source):
            return None
        if self._changing[kind] or done.repairs:
            self._count(done, source)
        return text

    def as_manifest(self) -> dict[str, Any]:
        """The ``cleaning`` entry of manifest.json: what ``report`` counts, and the evaluation sets it looked for."""
        entry = self.report.as_manifest(self.rules)
        if self.contamination is not None:
            entry["contamination"] = self.contamination.as_manifest(entry.get("contamination", {}))
        return entry

    def _change(self, text: str, kind: Kind, done: _Done) -> str:
        """What is optional: mojibake, furniture, licence header, masks."""
        if kind == "prose" and self._fix_mojibake is not None:
            fixed = self._fix_mojibake(text)
            if fixed != text:
                text = repair(fixed, kind)[0]
                done.repairs.append("mojibake")
        if kind == "prose" and self.config.boilerplate:
            text, lines, done.first_line = remove_furniture(text)
            done.lines.update(lines)
        if kind == "code" and self.config.licence_headers:
            text, removed, done.first_line = remove_licence_header(text)
            if removed:
                done.lines["licence"] = removed
        if self.masks:
            text, masked = mask(text, kind, self.masks)
            done.masked.update(masked)
        return text

    def _is_contaminated(self, text: str, source: str) -> bool:
        assert self.contamination is not None
        hits = self.contamination.find(text)
        for hit in hits:
            self.report.contamination.add(hit.name, 1, source, hit.excerpt)
        if not hits or not self.contamination.drops:
            return False
        self.report.drop(self.contamination.rule.name, source, text)
        return True

    def _count(self, done: _Done, source: str) -> None:
        self.report.repairs.update(done.repairs)
        for name, count in done.lines.items():
            self.report.lines.add(name, count, source, done.first_line[:EXCERPT_CHARACTERS])
        for name, count in done.masked.items():
            self.report.masked.add(name, count, source)  # no excerpt: it would be the secret
