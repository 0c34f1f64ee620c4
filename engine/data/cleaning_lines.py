"""Lines that are no part of the text: the furniture of web pages in prose, licence headers in code.

Only whole lines go, and only where the line says nothing else: a sentence about cookies stays.
"""

from __future__ import annotations

import re
from collections import Counter

# A longer line is a paragraph of the text, whatever it mentions.
LONGEST = 200

_EXACT = {
    "share": "share|share this|share this post|share this article|share this page|share this story|share on facebook|"
             "share on twitter|share on x|share on linkedin|share on whatsapp|share on pinterest|share via email|tweet|"
             "tweet this|pin it|email this|email this page|print this page|print this article|print|like this|"
             "facebook twitter|facebook twitter linkedin|facebook twitter linkedin email|copy link|send to a friend",
    "navigation": "skip to content|skip to main content|skip to navigation|skip navigation|jump to navigation|"
                  "jump to content|jump to search|back to top|back to the top|top of page|return to top|scroll to top|"
                  "home|menu|main menu|toggle navigation|toggle menu|open menu|close menu|search|search this site|"
                  "site map|sitemap|next|previous|next page|previous page|next post|previous post|older posts|"
                  "newer posts|read more|read more...|continue reading|show more|show less|load more|view more|"
                  "view all|see all|see more|click here|learn more|related posts|related articles|you may also like|"
                  "recommended for you|advertisement|advertisements|sponsored|sponsored content|loading|loading...|"
                  "please wait",
    "account": "log in|login|sign in|sign up|register|log out|sign out|my account|create account|create an account|"
               "forgot password|forgot your password|remember me|subscribe|subscribe now|subscribe to our newsletter|"
               "sign up for our newsletter|enter your email address|your email address|leave a comment|leave a reply|"
               "post a comment|add a comment|reply|log in to reply|you must be logged in to post a comment|"
               "your email address will not be published|required fields are marked|add to cart|view cart|checkout",
    "notice": "all rights reserved|privacy policy|terms of use|terms of service|terms and conditions|cookie policy|"
              "cookie settings|cookie preferences|manage cookies|accept|accept all|accept cookies|accept all cookies|"
              "reject all|decline|got it|i agree|contact us|about us|powered by wordpress|proudly powered by wordpress",
}  # fmt: skip
_KIND_OF = {line: kind for kind, lines in _EXACT.items() for line in lines.split("|")}
_EDGES = " \t\u00a0.!:|»«›‹>→←↑▲▼•·*-–—()[]…"  # noqa: RUF001 - signs that stand around such a line

# A word that must be in the line, and what it must then be.
_PATTERNS = {
    "cookie": ("cookies", re.compile(
        r"(?:this|our) (?:web)?(?:site|page) uses cookies\b.*|(?:we|we and our partners) use cookies\b.*|"
        r"by (?:continuing|using|browsing|clicking)\b.*\bcookies\b.*|.*\baccept (?:all )?(?:the use of )?cookies\b.*")),
    "javascript": ("notice", re.compile(
        r"(?:please )?(?:enable|turn on|activate) javascript\b.*|"
        r"(?:this (?:site|page|website|feature)|you need to enable|your browser)\b.*\bjavascript\b.*")),
    "©": ("notice", re.compile(r"(?:copyright )?© ?(?:copyright )?(?:\d{4}).{0,80}")),
    "rights reserved": ("notice", re.compile(r"(?:copyright\b.*|©.*|\(c\).*|.{0,40})\ball rights reserved\b.{0,40}")),
}  # fmt: skip
_MENU_WORDS = frozenset(
    "home|about|about us|contact|contact us|login|log in|sign in|sign up|register|search|sitemap|site map|privacy|"
    "privacy policy|terms|terms of use|terms of service|help|faq|blog|news|archive|archives|products|services|shop|"
    "cart|my account|account|rss|subscribe|careers|press|menu|support|download|downloads|forum|forums".split("|")
)
_MENU_GAP = re.compile(r"\s*[|»›>·•]\s*|\s{3,}|\t")


def remove_furniture(text: str) -> tuple[str, Counter[str], str]:
    """Prose without the lines that are web furniture, how many went by kind, and the first of them."""
    removed: Counter[str] = Counter()
    first, kept = "", []
    lowered = text.lower()
    patterns = [pattern for word, pattern in _PATTERNS.items() if word in lowered]
    for line in text.split("\n"):
        kind = _furniture(line, patterns) if 0 < len(line) <= LONGEST else None
        if kind is None:
            kept.append(line)
        else:
            removed[kind] += 1
            first = first or line.strip()
    return ("\n".join(kept) if removed else text), removed, first


def _furniture(line: str, patterns: list[tuple[str, re.Pattern[str]]]) -> str | None:
    bare = line.strip(_EDGES).lower()
    if not bare:
        return None
    if kind := _KIND_OF.get(bare):
        return kind
    for kind, pattern in patterns:
        if pattern.fullmatch(bare):
            return kind
    return "navigation" if _is_menu(line, bare) else None


def _is_menu(line: str, bare: str) -> bool:
    """Three entries or more, of which half at least are what menus hold. A row of a Markdown table is none."""
    if line.lstrip().startswith("|"):
        return False
    entries = _MENU_GAP.split(bare)
    return len(entries) >= 3 and 2 * sum(entry in _MENU_WORDS for entry in entries) >= len(entries)


_KEPT_HEAD = re.compile(r"#!|#.*coding[:=]|<\?")  # a shebang, an encoding, an opening <?php or <?xml
_LINE_COMMENT = re.compile(r"[ \t]*(?:#(?![ \t]*(?:include|define|if|ifn?def|pragma|undef|import|error)\b)|//|--|;|%|!|\")")
_LICENCE = re.compile(r"copyright|licen[cs]e|spdx-|all rights reserved|\(c\) ?\d{4}", re.IGNORECASE)


def remove_licence_header(code: str) -> tuple[str, int, str]:
    """Code without the comment at its top that states a licence or copyright, how many lines went, and the first."""
    lines = code.split("\n")
    first = 0
    while first < len(lines) and (not lines[first].strip() or _KEPT_HEAD.match(lines[first])):
        first += 1
    end = _comment_end(lines, first)
    if end == first or not _LICENCE.search("\n".join(lines[first:end])):
        return code, 0, ""
    return "\n".join(lines[:first] + lines[end:]), end - first, lines[first].strip()


def _comment_end(lines: list[str], first: int) -> int:
    """The line after the comment that starts at line ``first``; that line itself where none does."""
    if first == len(lines):
        return first
    start = lines[first].lstrip()
    for opening, closing in (("/*", "*/"), ("<!--", "-->"), ("(*", "*)"), ("{-", "-}")):
        if start.startswith(opening):
            for number in range(first, len(lines)):
                _, found, rest = lines[number].partition(closing)
                if found:
                    return number + 1 if not rest.strip() else first  # code behind it: leave all as it is
            return first
    mark = _LINE_COMMENT.match(lines[first])
    if mark is None:
        return first
    sign = mark.group().strip()
    end = first
    while end < len(lines) and lines[end].lstrip().startswith(sign) and _LINE_COMMENT.match(lines[end]):
        end += 1
    return end
