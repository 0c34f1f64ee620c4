"""What cleaning did, as counts and a few samples: of one worker's share, merged, as JSON, and for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

EXCERPT_CHARACTERS = 80
SAMPLES_PER_RULE = 3

Samples = dict[str, list[dict[str, str]]]


class Named(Protocol):
    """A rule as far as the manifest needs it."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...


@dataclass
class Tally:
    """Counts of one filter, by what it found: places found, documents they were in, and the first few samples."""

    found: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    samples: Samples = field(default_factory=dict)

    def add(self, name: str, count: int, source: str, excerpt: str | None = None) -> None:
        self.found[name] += count
        self.documents[name] += 1
        _sample(self.samples, name, source, excerpt)

    def merge(self, other: Tally) -> None:
        self.found.update(other.found)
        self.documents.update(other.documents)
        _merge_samples(self.samples, other.samples)

    def as_json(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"documents": self.documents[name], "found": self.found[name], "samples": self.samples.get(name, [])}
            for name in sorted(self.found)
        }

    @classmethod
    def from_json(cls, data: dict[str, dict[str, Any]]) -> Self:
        return cls(
            Counter({name: item["found"] for name, item in data.items()}),
            Counter({name: item["documents"] for name, item in data.items()}),
            {name: item["samples"] for name, item in data.items() if item["samples"]},
        )


@dataclass
class CleaningReport:
    """Counts of documents: each repair made, each rule that dropped, with a few excerpts of what went.

    ``lines``: lines removed by kind. ``masked``: personal data replaced by kind; its samples name the place alone.
    ``contamination``: evaluation sets found. The names a cleaner looks for are there from the start, at zero.
    """

    repairs: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    samples: Samples = field(default_factory=dict)
    lines: Tally = field(default_factory=Tally)
    masked: Tally = field(default_factory=Tally)
    contamination: Tally = field(default_factory=Tally)

    def drop(self, rule: str, source: str, text: str) -> None:
        self.dropped[rule] += 1
        _sample(self.samples, rule, source, text[:EXCERPT_CHARACTERS])

    def merge(self, other: CleaningReport) -> None:
        """Add the counts of ``other``, which comes after this one in the order of the units. Associative."""
        self.repairs.update(other.repairs)
        self.dropped.update(other.dropped)
        _merge_samples(self.samples, other.samples)
        for name in ("lines", "masked", "contamination"):
            getattr(self, name).merge(getattr(other, name))

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``from_json``; the same counts give the same text, whatever their order of arrival."""
        return {
            "repairs": dict(sorted(self.repairs.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "samples": dict(sorted(self.samples.items())),
            "lines": self.lines.as_json(),
            "masked": self.masked.as_json(),
            "contamination": self.contamination.as_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        tallies = {name: Tally.from_json(data[name]) for name in ("lines", "masked", "contamination")}
        return cls(Counter(data["repairs"]), Counter(data["dropped"]), dict(data["samples"]), **tallies)

    def as_manifest(self, rules: Sequence[Named]) -> dict[str, Any]:
        """The ``cleaning`` entry of manifest.json: all ``rules`` in order, those that dropped nothing too."""
        entry: dict[str, Any] = {
            "repairs": dict(sorted(self.repairs.items())),
            "rules": {
                rule.name: {
                    "description": rule.description,
                    "documents": self.dropped[rule.name],
                    "samples": self.samples.get(rule.name, []),
                }
                for rule in rules
            },
        }
        tallies = {"lines": self.lines, "personal_data": self.masked, "contamination": self.contamination}
        return entry | {name: tally.as_json() for name, tally in tallies.items() if tally.found}


def _sample(samples: Samples, name: str, source: str, excerpt: str | None) -> None:
    kept = samples.setdefault(name, [])
    if len(kept) < SAMPLES_PER_RULE:
        kept.append({"source": source} if excerpt is None else {"source": source, "excerpt": excerpt})


def _merge_samples(into: Samples, other: Samples) -> None:
    for name, found in other.items():
        kept = into.setdefault(name, [])
        kept.extend(found[: max(0, SAMPLES_PER_RULE - len(kept))])
