"""How documents are cleaned: `--cleaning.*`, `--personal_data.*` and `--decontaminate.*` of `mainspring prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from engine.config.base import Problem, Section, option

# The least number of words that says anything: a shorter evaluation item is a phrase, not a leak (GPT-3 used 8 too).
SHORTEST_ITEM = 8
MAX_SETS = 64

Language = Literal[
    "ar", "bg", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko",
    "nl", "no", "pl", "pt", "ro", "ru", "sr", "sv", "ta", "th", "tr", "uk", "vi", "zh",
]  # fmt: skip
Personal = Literal["email", "ip", "key", "phone"]


class CleaningConfig(Section):
    """What is repaired, removed from and demanded of a document. The defaults drop nothing that is worth reading."""

    quality: Literal["safe", "gopher", "fineweb"] = option(
        "safe", "prose rules: what is certainly junk; or also Gopher's published web filters; or FineWeb's beside them"
    )
    language: list[Language] = option(list, "drop prose that is plainly in none of these languages", "ISO 639-1")
    max_urls: int | None = option(
        None, "prose with more web addresses is dropped; unset: any number", "addresses", ge=0
    )
    boilerplate: bool = option(False, "remove lines of web furniture from prose: cookie banners, share and menu lines")
    licence_headers: bool = option(False, "remove the comment with licence or copyright at the top of code")
    mojibake: bool = option(False, "mend text that was decoded as another encoding; needs ftfy: mainspring[data]")


class PersonalDataConfig(Section):
    """Which personal data is replaced by placeholders."""

    mask: list[Personal] = option(
        list, "replace these: email, ip (IPv4 and IPv6 that are public), key (tokens, private keys), phone (in prose)"
    )


class DecontaminationConfig(Section):
    """Evaluation sets that the data must not hold."""

    sets: list[str] = option(list, "evaluation set to look for, JSONL or text; repeat for several", "NAME=PATH")
    ngram: int = option(13, "consecutive words that count as a leak", "words", ge=SHORTEST_ITEM, le=100)
    action: Literal["drop", "report"] = option("drop", "drop documents that hold a leak, or only count them")

    def problems(self) -> Iterator[Problem]:
        names = [entry.partition("=")[0] for entry in self.sets]
        for entry, name in zip(self.sets, names, strict=True):
            if not name or not entry.partition("=")[2]:
                yield Problem("sets", f"{entry!r} is not NAME=PATH", "Write mmlu=eval/mmlu.jsonl, for example")
            elif names.count(name) > 1:
                yield Problem("sets", f"two sets are called {name!r}", "Give each a name of its own")
                return
        if len(names) > MAX_SETS:
            yield Problem("sets", f"{len(names)} sets, at most {MAX_SETS} are told apart", "Join some of them")
