"""Lines that are no part of the text: the furniture of web pages in prose, licence headers in code.

Only whole lines go, and only where the line says nothing else: a sentence about cookies stays.
"""

from __future__ import annotations

import re
from collections import Counter

# A longer line is a paragraph of the text, whatever it mentions.
LONGEST = 200

# Words that are headings or ends of sentences as often ("Search", "register.") are not among them.
_EXACT = {
    "share": "share this|share this post|share this article|share this page|share this story|share on facebook|"
             "share on twitter|share on x|share on linkedin|share on whatsapp|share on pinterest|share via email|tweet|"
             "tweet this|pin it|email this|email this page|print this page|print this article|share this:|"
             "facebook twitter|facebook twitter linkedin|facebook twitter linkedin email|copy link|send to a friend",
    "navigation": "skip to content|skip to main content|skip to navigation|skip navigation|jump to navigation|"
                  "jump to content|jump to search|back to top|back to the top|return to top|scroll to top|main menu|"
                  "toggle navigation|toggle menu|open menu|close menu|search this site|search for:|site map|sitemap|"
                  "next page|previous page|next post|previous post|older posts|newer posts|read more|continue reading|"
                  "show more|show less|load more|view more|view all|see all|see more|click here|learn more|"
                  "related posts|related articles|you may also like|recommended for you|advertisement|advertisements|"
                  "sponsored content|please wait",
    "account": "log in|login|sign in|sign up|log out|sign out|my account|create account|create an account|remember me|"
               "forgot password|forgot password?|forgot your password?|subscribe|subscribe now|add to cart|view cart|"
               "subscribe to our newsletter|sign up for our newsletter|enter your email address|your email address|"
               "leave a comment|leave a reply|post a comment|log in to reply|required fields are marked|"
               "you must be logged in to post a comment",
    "notice": "all rights reserved|privacy policy|terms of use|terms of service|terms and conditions|cookie policy|"
              "cookie settings|cookie preferences|manage cookies|accept all|accept cookies|accept all cookies|"
              "reject all|contact us|about us|powered by wordpress|proudly powered by wordpress",
}  # fmt: skip
_EDGES = " \t\u00a0|\u00bb\u00ab\u203a\u2039>\u2192\u2190\u2191\u25b2\u25bc()[]\u2026"
_SENTENCES = frozenset(["all rights reserved", "you must be logged in to post a comment", "required fields are marked"])


def _spellings() -> dict[str, str]:
    """Line as it may stand on a page -> what it is. Never in lower case: that is the middle of a sentence."""
    found = {}
    for kind, lines in _EXACT.items():
        for line in lines.split("|"):
            for end in ("", ".", " *") if line in _SENTENCES else ("",):
                for spelling in (line.capitalize(), line.title(), line.upper(), "Share on " + line[9:].title()):
                    if spelling.lower() == line:
                        found[spelling + end] = kind
    return found


_KIND_OF = _spellings()
# A word that must be in the line, and what it must then be, both in lower case.
_PATTERNS = {
    "cookie": ("cookies", re.compile(
        r"(?:(?:this|our) (?:web)?(?:site|page) uses|(?:we|we and our partners) use) cookies\b(?:\W*| (?:and|on|"
        r"in order|to (?:improve|ensure|give|provide|offer|enhance|help|make|deliver|personali[sz]e|analy[sz]e|"
        r"understand))\b.*)|"
        r"by (?:continuing|using|browsing|clicking)\b.*\b(?:you|agree|accept|consent)\b.*\bcookies\b.*|"
        r"(?:i )?accept (?:all )?(?:the use of )?cookies\W*")),
    "javascript": ("notice", re.compile(
        r"(?:(?:please |you need to )?(?:enable|turn on|activate) javascript|javascript (?:is|must be) "
        r"(?:disabled|enabled))(?:\W*| (?:in (?:your|this)|to|on|and|for)\b.*)|"
        r"this (?:site|page|website|feature) (?:needs|requires|uses|relies on|works best with) javascript\b.*|"
        r"your browser (?:does not|doesn't|has|must|is not)\b.*\bjavascript\b.*")),
    "will not be published": ("account", re.compile(r"your e-?mail address will not be published\b.*")),
    "\u00a9": ("notice", re.compile(r"(?:copyright )?\u00a9 ?(?:copyright )?\d{4}.{0,80}")),
    "all rights reserved": ("notice", re.compile(
        r"(?:copyright\b(?=.*\d{4}|.*\u00a9|.*\(c\)|[^.]*\. all)|\u00a9|\(c\) ?\d{4}).*\ball rights reserved\b"
        r".{0,40}")),
}  # fmt: skip
_MENU_WORDS = frozenset([
    "home", "about", "about us", "contact", "contact us", "login", "log in", "sign in", "sign up", "register", "search",
    "sitemap", "site map", "privacy", "privacy policy", "terms", "terms of use", "terms of service", "help", "faq",
    "blog", "news", "archive", "archives", "products", "services", "shop", "cart", "my account", "account", "rss",
    "subscribe", "careers", "press", "menu", "support", "download", "downloads", "forum", "forums",
])  # fmt: skip
# One of these is in every menu that is taken for one.
_MENU_SIGNS = ("home", "contact", "log in", "login", "sign in", "privacy")
_MENU_GAP = re.compile(r"\s*[|\u00bb\u203a>\u00b7\u2022]\s*|\s{3,}|\t")


def remove_furniture(text: str) -> tuple[str, Counter[str], str]:
    """Prose without the lines that are web furniture, how many went by kind, and the first of them."""
    lines, found = text.split("\n"), {}
    bare = [line.strip(_EDGES) for line in lines]
    if not _KIND_OF.keys().isdisjoint(bare):
        found = {number: _KIND_OF[line] for number, line in enumerate(bare) if line in _KIND_OF}
    lowered = text.lower()
    words = [word for word in (*_PATTERNS, *_MENU_SIGNS) if word in lowered]
    if words:
        for number, line in enumerate(lowered.split("\n")):
            if len(line) <= LONGEST and number not in found and (kind := _matching(line, words)):
                found[number] = kind
    if not found:
        return text, Counter(), ""
    kept = "\n".join(line for number, line in enumerate(lines) if number not in found)
    return kept, Counter(found.values()), lines[min(found)].strip()


def _matching(line: str, words: list[str]) -> str | None:
    """What a line in lower case is, if it holds one of ``words`` and nothing that a reader wants."""
    for word in words:
        if word in line:
            kind, pattern = _PATTERNS.get(word, ("navigation", None))
            if pattern.fullmatch(line.strip(_EDGES)) if pattern else _is_menu(line):
                return kind
    return None


def _is_menu(line: str) -> bool:
    """Three entries or more, of which half at least are what menus hold. A row of a Markdown table is none."""
    if line.lstrip().startswith("|"):
        return False
    entries = _MENU_GAP.split(line.strip(_EDGES))
    return len(entries) >= 3 and 2 * sum(entry in _MENU_WORDS for entry in entries) >= len(entries)


_KEPT_HEAD = re.compile(r"#!|#.*coding[:=]|<\?")  # a shebang, an encoding, an opening <?php or <?xml
_LINE_COMMENT = re.compile(
    r"[ \t]*(?:#(?![ \t]*(?:include|define|if|ifn?def|pragma|undef|import|error)\b)|//|--|;|%|!)"
)
# What a licence says of itself; a comment about licences, or about what a module does with them, says other things.
_LICENCE = re.compile(
    r"\bcopyright(?:\s*$|\s*(?:\(c\)|\u00a9|:|\d{4}|by\b|(?-i:[A-Z])))|\u00a9 ?\d{4}|\(c\) ?\d{4}|spdx-|"
    r"all rights reserved|^\W*(?:the )?(?:\w+ )?licen[cs]e(?:\s*:|\s*$)|licen[cs]ed (?:under|to)\b|"
    r"under (?:the|a|an)\b.{0,60}\blicen[cs]e\b|(?:see|read) (?:the )?licen[cs]e\b|permission is hereby granted|"
    r"redistribution and use", re.IGNORECASE | re.MULTILINE,
)  # fmt: skip


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
