"""Decontamination: documents that hold a piece of a named evaluation set.

A leak is ``ngram`` consecutive words (13 as for GPT-3, Brown et al. 2020, appendix C) of an item, in lower case and
without punctuation; a shorter item, of 8 words at least, leaks as a whole. A character of a script without spaces is a
word. What more than ten items of a set share is its wording ("choose the best answer of the following") and no leak.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine._text import Leaks
from engine.config.cleaning import SHORTEST_ITEM, DecontaminationConfig
from engine.data.cleaning_rules import BOTH, Page, Rule
from engine.errors import UserError

_JSON_LINES = (".jsonl", ".ndjson")
_TEXTS = (".txt", ".text", ".md", ".rst")


@dataclass(frozen=True)
class EvaluationSet:
    """What was taken from one file: ``items`` that are looked for, and those too short to be (under 8 words)."""

    name: str
    sha256: str
    items: int
    too_short: int


@dataclass(frozen=True)
class Hit:
    """A piece of the set ``name`` in a document; ``excerpt`` is that piece, in lower case."""

    name: str
    excerpt: str


class Contamination:
    """The evaluation sets of a configuration, read once a process. UserError for one that cannot be used."""

    def __init__(self, config: DecontaminationConfig):
        self.config = config
        self._leaks = Leaks(config.ngram, SHORTEST_ITEM)
        self.sets = [self._read(number, entry) for number, entry in enumerate(config.sets)]
        self.ngrams = self._leaks.finish()
        self.drops = config.action == "drop"
        names = ", ".join(item.name for item in self.sets)
        self.rule = Rule("contaminated", f"{config.ngram} words, or a whole item, of {names}", BOTH, self._hits)

    def find(self, text: str) -> list[Hit]:
        """The first leak of each set, in the order of the text."""
        lowered = text.lower()
        return [Hit(self.sets[number].name, lowered[first:end]) for number, first, end in self._leaks.find(lowered)]

    def as_manifest(self, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What was looked for, each set with what the report says was ``found`` of it."""
        sets, nothing = {}, {"documents": 0, "samples": []}
        for item in self.sets:
            facts = {"sha256": item.sha256, "items": item.items, "too_short": item.too_short}
            sets[item.name] = facts | {name: found.get(item.name, nothing)[name] for name in nothing}
        return {"ngram": self.config.ngram, "action": self.config.action, "ngrams": self.ngrams, "sets": sets}

    def _hits(self, page: Page) -> bool:
        return bool(self.find(page.text))

    def _read(self, number: int, entry: str) -> EvaluationSet:
        name, _, file = entry.partition("=")
        path = Path(file).expanduser()
        where = f"decontaminate: {name}: {path}"
        raw = _bytes_of(path, where)
        items = too_short = 0
        for text in _texts_of(_unpacked(raw, path, where), path, where):
            used = self._leaks.add(text.lower(), number) >= SHORTEST_ITEM
            items, too_short = items + used, too_short + (not used)
        if not items:
            raise UserError(
                f"no text of {SHORTEST_ITEM} words or more", where=where,
                fix="Give JSONL whose records hold the questions as text, or a text file with an item a paragraph.",
            )  # fmt: skip
        return EvaluationSet(name, hashlib.sha256(raw).hexdigest(), items, too_short)


def load(config: DecontaminationConfig) -> Contamination:
    """The same as the class; the last one is kept, for as long as its files are what they were."""
    stamps = []
    for entry in config.sets:
        try:
            facts = Path(entry.partition("=")[2]).expanduser().stat()
            stamps.append((facts.st_ino, facts.st_size, facts.st_mtime_ns))
        except OSError:
            stamps.append(None)  # its reading says what is wrong
    return _load(config.model_dump_json(), tuple(stamps))


@lru_cache(maxsize=1)
def _load(config: str, stamps: tuple) -> Contamination:
    return Contamination(DecontaminationConfig.model_validate_json(config))


def _bytes_of(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be read ({reason})", where=where, fix="Write NAME=PATH of a file.") from None


def _unpacked(raw: bytes, path: Path, where: str) -> bytes:
    try:
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot be unpacked ({error})", where=where, fix="Fetch it again.") from None


def _texts_of(raw: bytes, path: Path, where: str) -> Iterator[str]:
    """Every text of a JSON Lines record by itself, however deep; the paragraphs of a text file."""
    suffix = (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()
    if suffix not in _JSON_LINES + _TEXTS:
        raise UserError(f"{suffix or 'no suffix'} is not read here", where=where, fix="Convert it to .jsonl or .txt.")
    if suffix in _TEXTS:
        text = raw.decode("utf-8", "replace")
        lines = [line if line.strip() else "" for line in text.splitlines()]
        yield from filter(None, "\n".join(lines).split("\n\n"))
        return
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                reason = str(error) or "nested too deeply"
                raise UserError(f"no JSON record ({reason})", where=f"{where}:{number}", fix="Mend the line.") from None
            yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            todo.extend(reversed(item.values()))
        elif isinstance(item, list):
            todo.extend(reversed(item))
