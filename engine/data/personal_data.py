"""Masks: personal data and secrets replaced by placeholders that are as valid where they stand, in code too.

    email   name@firma.de                    -> email@example.com     (RFC 2606: nobody's)
    ip      8.8.4.4, 2a00:1450:4001:…        -> 192.0.2.1, 2001:db8::1 (RFC 5737 and 3849: documentation)
    key     AKIA…, ghp_…, sk-…, a JWT, …     -> MASKED_KEY; of a private key all lines between its marks
    phone   +49 30 901820, (415) 555-2671    -> +1-555-0100           (prose only: in code it may be a number)

What is nobody's stays: example.com, private and loopback addresses, versions (v1.2.3.4), ``key = "changeme"``. A
second masking changes nothing.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

EMAIL, IPV4, IPV6, KEY, PHONE = "email@example.com", "192.0.2.1", "2001:db8::1", "MASKED_KEY", "+1-555-0100"

# Every two-letter domain is a country's; of the others those that people have addresses in. In code `x@w.data` is a
# product of matrices, so the list is not IANA's whole one.
_TOP = "com|org|net|edu|gov|mil|int|info|biz|dev|app|online|email|cloud|tech|ai|io|me|eu|club|xyz|museum|academy|agency"
_EMAIL = re.compile(
    rf"(?<![\w.+%/-])[A-Za-z0-9_][A-Za-z0-9._%+-]{{0,63}}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.){{1,8}}"
    rf"(?:{_TOP}|[a-z]{{2}}|{_TOP.upper()})(?![\w(\[@-]|\.\w)"
)
_NOBODY = re.compile(r"(?:^|[@.])(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost)$", re.IGNORECASE)
_NOT_PERSONS = re.compile(r"(?:no-?reply|git|svn)@", re.IGNORECASE)  # git@github.com:… is a place

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = re.compile(rf"(?<![\w.])(?<!\d-)(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\w|-\d)")
_VERSION = re.compile(r"(?:\bv|version\w*|release|ver\.?|[=<>~^]=|[<>])\s*[:=]?\s*[\"']?$", re.IGNORECASE)
_HEADING = re.compile(r"[ \t]+[A-Za-z]")
_LONGEST_HEADING = 30
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.\w)")

# (what must be in the text for a pattern to be tried, the pattern). The prefixes are those the services document.
_KEYS: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple((needles, re.compile(pattern)) for needles, pattern in (
    (("AKIA", "ASIA", "AROA", "AIDA"), r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z2-7]{16}\b"),                           # AWS
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),                        # GitHub
    (("github_pat_",), r"\bgithub_pat_[A-Za-z0-9_]{22,255}\b"),
    (("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),                                                        # GitLab
    (("sk-",), r"\bsk-(?:ant-|proj-|svcacct-|or-)?[A-Za-z0-9_-]{0,12}[A-Za-z0-9]{20}[A-Za-z0-9_-]{0,200}"),  # model APIs
    (("hf_",), r"\bhf_[A-Za-z0-9]{30,}\b"),                                                         # Hugging Face
    (("AIza",), r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),                                              # Google
    (("ya29.",), r"\bya29\.[A-Za-z0-9_-]{30,}"),
    (("xox",), r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),                                                        # Slack
    (("hooks.slack.com/services/",), r"(?<=hooks\.slack\.com/services/)T[A-Z0-9]+/B[A-Z0-9]+/[A-Za-z0-9]{20,}"),
    (("sk_live_", "rk_live_", "pk_live_"), r"\b[srp]k_live_[A-Za-z0-9]{16,}\b"),                           # Stripe
    (("SG.",), r"\bSG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}"),                                     # SendGrid
    (("npm_",), r"\bnpm_[A-Za-z0-9]{36}\b"),
    (("pypi-",), r"\bpypi-AgE[A-Za-z0-9_-]{50,}"),
    (("dop_v1_",), r"\bdop_v1_[a-f0-9]{64}\b"),                                                       # DigitalOcean
    (("AGE-SECRET-KEY-1",), r"\bAGE-SECRET-KEY-1[0-9A-Z]{58}\b"),
    (("eyJ",), r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}"),                          # JWT
))  # fmt: skip
_PRIVATE = re.compile(
    r"(-----BEGIN (?:[A-Z0-9 ]+ )?PRIVATE KEY(?: BLOCK)?-----)((?:(?!-----).)*)(-----END (?:[A-Z0-9 ]+ )?PRIVATE KEY"
    r"(?: BLOCK)?-----)", re.DOTALL
)  # fmt: skip
_ASSIGNED = re.compile(
    r"(?i)(?:api[_-]?key|secret|token|passw(?:or)?d|pwd|auth|credential|access[_-]?key|private[_-]?key)[A-Za-z0-9_-]{0,20}"
    r"[\"']?\s{0,4}(?:=|:|=>|:=)\s{0,4}[\"']([A-Za-z0-9+/=_.~-]{16,200})[\"']"
)
_ASSIGNED_WORDS = ("key", "secret", "token", "passw", "pwd", "auth", "credential")
# Bits a character: words and paths have 2.5 to 3.7, 20 random characters of base64 about 4.1, of hexadecimal 3.4.
_MIN_ENTROPY, _MIN_HEX_ENTROPY = 3.8, 3.0

_PHONE = re.compile(
    r"(?<![\w+./-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,4}){1,4}|\+[1-9]\d{9,13}|"
    r"\(\d{3}\) ?\d{3}[-. ]\d{4}|[2-9]\d{2}([-.])[2-9]\d{2}\1\d{4})(?![\w/]|[-.]\d)"
)

Mask = Callable[[str], tuple[str, int]]


def _substitute(pattern: re.Pattern[str], text: str, new: Callable[[re.Match[str]], str]) -> tuple[str, int]:
    """Every match replaced by ``new(match)``; where that is the match itself it does not count."""
    changed = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal changed
        replacement = new(match)
        changed += replacement != match.group()
        return replacement

    return pattern.sub(replace, text), changed


def mask_emails(text: str) -> tuple[str, int]:
    """Addresses of persons, and how many there were."""

    def new(match: re.Match[str]) -> str:
        address = match.group()
        return address if _NOBODY.search(address) or _NOT_PERSONS.match(address) else EMAIL

    return _substitute(_EMAIL, text, new) if "@" in text else (text, 0)


def mask_ips(text: str) -> tuple[str, int]:
    """Public IPv4 and IPv6 addresses, and how many there were."""

    def four(match: re.Match[str]) -> str:
        public = ipaddress.IPv4Address(match.group()).is_global and not _is_number_of_something(match)
        return IPV4 if public else match.group()

    def six(match: re.Match[str]) -> str:
        address = match.group()
        try:  # at least three groups: x[2000::2] is a slice
            public = ipaddress.IPv6Address(address).is_global and len(address.replace("::", ":").split(":")) > 2
        except ValueError:
            return address
        return IPV6 if public else address

    text, fours = _substitute(_IPV4, text, four) if "." in text else (text, 0)
    text, sixes = _substitute(_IPV6, text, six) if ":" in text else (text, 0)
    return text, fours + sixes


def _is_number_of_something(match: re.Match[str]) -> bool:
    """A version behind its word or sign, or the number of a heading at the start of its line."""
    text, start = match.string, match.start()
    if _VERSION.search(text, max(0, start - 24), start):
        return True
    line = text[text.rfind("\n", 0, start) + 1 : start]
    small = all(int(part) <= _LONGEST_HEADING for part in match.group().split("."))
    return small and not line.strip() and _HEADING.match(text, match.end()) is not None


def mask_keys(text: str) -> tuple[str, int]:
    """Tokens by their prefix, private keys, and what is assigned to a secret's name and looks random."""
    total = 0
    for needles, pattern in _KEYS:
        if any(needle in text for needle in needles):
            text, count = _substitute(pattern, text, lambda _: KEY)
            total += count
    if "PRIVATE KEY" in text:
        text, count = _substitute(_PRIVATE, text, _masked_block)
        total += count
    lowered = text.lower()
    if any(word in lowered for word in _ASSIGNED_WORDS):
        text, count = _substitute(_ASSIGNED, text, _masked_value)
        total += count
    return text, total


def _masked_block(match: re.Match[str]) -> str:
    # The line ends stay, as they were written: real ones, or "\\n" within a string.
    body = match.group(2)
    if not re.search(r"[A-Za-z0-9+/=]{16}", body):
        return match.group()
    gap = next((end for end in ("\\r\\n", "\\n", "\n") if body.startswith(end)), "")
    return f"{match.group(1)}{gap}{KEY}{gap}{match.group(3)}"


def _masked_value(match: re.Match[str]) -> str:
    value = match.group(1)
    return match.group().replace(value, KEY) if looks_random(value) else match.group()


def looks_random(value: str) -> bool:
    """True for a string with a digit, letters, and the entropy of chance: no words, paths or placeholders."""
    if not any(map(str.isdigit, value)) or not any(map(str.isalpha, value)):
        return False
    hexadecimal = re.fullmatch(r"[0-9a-fA-F]+", value) is not None
    return entropy(value) >= (_MIN_HEX_ENTROPY if hexadecimal else _MIN_ENTROPY)


def entropy(value: str) -> float:
    """Bits a character, of the characters' frequencies in the string itself."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def mask_phones(text: str) -> tuple[str, int]:
    """Telephone numbers as they are written for people, and how many there were."""
    return _substitute(_PHONE, text, lambda _: PHONE)


MASKS: dict[str, Mask] = {"key": mask_keys, "email": mask_emails, "ip": mask_ips, "phone": mask_phones}


def mask(text: str, kind: Literal["prose", "code"], names: Iterable[str]) -> tuple[str, Counter[str]]:
    """``text`` with the named kinds of personal data replaced, and how many of each were."""
    found: Counter[str] = Counter()
    wanted = set(names)
    for name, masked in MASKS.items():
        if name in wanted and not (name == "phone" and kind == "code"):
            text, count = masked(text)
            if count:
                found[name] = count
    return text, found
