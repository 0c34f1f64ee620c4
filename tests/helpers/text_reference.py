"""What the C++ of csrc/text counts, in slow and obvious Python: the reference of its tests."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]+")
LETTER = re.compile(r"[^\W\d_]")
BULLETS = "-*\u2022\u2023\u25e6\u25aa\u25a0\u25cf\u25b6\u2013"
CLOSING = "\"')]\u00bb\u2019\u201d\u300d\u300f\uff09"
ENDS = ".!?:;\u2026\u3002\uff01\uff1f\u0964\u061f\u06d4"


def scan(text: str) -> dict[str, int]:
    """Every field of Statistics but ``mend``."""
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = paragraphs_of(text)
    urls = URL.findall(text)
    return {
        "characters": len(text),
        "letters": len(LETTER.findall(text)),
        "digits": sum(map(str.isdecimal, text)),
        "spaces": sum(map(str.isspace, text)),
        "newlines": text.count("\n"),
        "replacements": text.count("\ufffd"),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("\u2026"),
        "words": len(words),
        "alphabetic_words": sum(LETTER.search(word) is not None for word in words),
        "longest_word": max(map(len, words), default=0),
        "longest_space": max(map(len, re.findall(r"\s+", text)), default=0),
        "schemes": len(re.findall("(?=://)", text)),
        "urls": len(urls),
        "url_characters": sum(map(len, urls)),
        "lines": len(lines),
        "line_characters": sum(map(len, lines)),
        "repeated_lines": len(lines) - len(set(lines)),
        "repeated_line_characters": sum(map(len, lines)) - sum(map(len, set(lines))),
        "paragraphs": len(paragraphs),
        "repeated_paragraphs": len(paragraphs) - len(set(paragraphs)),
        "repeated_paragraph_characters": sum(
            sum(map(len, paragraph)) * (times - 1) for paragraph, times in Counter(paragraphs).items()
        ),
        "short_lines": sum(len(line) <= 30 for line in lines),
        "bullet_lines": sum(line[0] in BULLETS for line in lines),
        "ellipsis_lines": sum(line.endswith(("...", "\u2026")) for line in lines),
        "ended_lines": sum(line[-1] in ENDS or (line[-1] in CLOSING and line[-2:-1] in [*ENDS]) for line in lines),
    }


def paragraphs_of(text: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for line in map(str.strip, text.split("\n")):
        found = [*found[:-1], (*found[-1], line)] if line else [*found, ()]
    return [paragraph for paragraph in found if paragraph]


def repetition(text: str, top: list[int], duplicate: list[int]) -> tuple[int, list[int], list[int]]:
    words = text.split()
    return (
        sum(map(len, words)),
        [most_covering(words, n) for n in top],
        [duplicated(words, n) for n in duplicate],
    )


def most_covering(words: list[str], n: int) -> int:
    times = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return max((count * len("".join(gram)) for gram, count in times.items() if count > 1), default=0)


def duplicated(words: list[str], n: int) -> int:
    seen, characters, i = set(), 0, 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += len("".join(gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "THAI", "LAO", "MYANMAR", "KHMER",
            "TIBETAN")  # fmt: skip


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and marks; a character of an unspaced script, with its marks, is one by itself."""
    words, inside, single = [], False, False
    for char in text:
        mark = unicodedata.category(char) in ("Mn", "Mc")
        if not (mark or char.isalnum()):
            inside = False
            continue
        alone = not mark and not char.isdecimal() and unicodedata.name(char, "").split(" ")[0] in UNSPACED
        if inside and not alone and not (single and not mark):
            words[-1] += char
        else:
            words.append(char)
            inside, single = True, alone
    return words


def leaks(items: list[tuple[str, int]], text: str, n: int, shortest: int) -> set[int]:
    """The sets of which ``text`` holds ``n`` words in a row, or a whole shorter item."""
    grams: Counter[tuple[tuple[str, ...], int]] = Counter()
    for item, number in items:
        words = words_of(item)
        size = min(n, len(words))
        if size >= shortest:
            grams.update({(tuple(words[i : i + size]), number) for i in range(len(words) - size + 1)})
    words = words_of(text)
    return {
        number
        for (gram, number), count in grams.items()
        if count <= 10 and any(tuple(words[i : i + len(gram)]) == gram for i in range(len(words)))
    }


def verdict(text: str, kind: str, shortest: int, longest: int, longest_run: int) -> str | None:
    """The name of the first of the older safe rules that drops a text; no rule that came later is among them."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    runs = [*text.split(), *re.findall(r"\s+", text)]
    shown = len(re.sub(r"\s+", "", text))
    prose = kind == "prose"
    rules = {
        "empty": not text or text.isspace(),
        "too_short": len(text) < shortest,
        "too_long": len(text) > longest,
        "unreadable": text.count("\ufffd") > 0.1 * len(text),
        "long_run": any(len(run) > longest_run for run in runs),
        "few_letters": prose and 10 * len(LETTER.findall(text)) < shown,
        "mostly_links": prose and "://" in text and 10 * sum(map(len, URL.findall(text))) > 7 * len(text),
        "repeated_lines": prose and len(lines) >= 10 and 10 * repeated > 7 * sum(map(len, lines)),
        "minified": not prose and len(text) > 500 * (text.count("\n") + 1),
    }
    return next((name for name, drops in rules.items() if drops), None)
