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

# Each pattern starts with characters that are rare in text and leaves what may stand before it to a look back: a
# pattern that starts with a look-behind is tried at every character, at a fifth of the speed.

# Every two-letter domain is a country's; of the others those that people have addresses in. In code `x@w.data` is a
# product of matrices, so the list is not IANA's whole one.
_TOP = "com|org|net|edu|gov|mil|int|info|biz|dev|app|online|email|cloud|tech|ai|io|me|eu|club|xyz|museum|academy|agency"
_DOMAIN = re.compile(
    rf"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.){{1,8}}(?:{_TOP}|[a-z]{{2}}|{_TOP.upper()}))"
    r"(?![\w(\[@-]|\.\w)"
)
_LOCAL = re.compile(r"(?<![\w.+%/-])[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63}\Z")
_LONGEST_LOCAL = 65
_NOBODY = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost)$", re.IGNORECASE)
_NOT_PERSONS = re.compile(r"(?:no-?reply|git|svn)$", re.IGNORECASE)  # git@github.com:... is a place

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = re.compile(rf"[0-9]{{1,3}}\.{_OCTET}\.{_OCTET}\.{_OCTET}(?!\w|\.\w|-\d)")
_BEFORE_IPV4 = re.compile(r"(?:[\w.]|\d-)\Z")
# A word that a version or a place in a text follows, or a product as in a browser's name: Chrome/114.0.0.0.
_VERSION = re.compile(
    r"(?:(?i:\bv|version\w*|release|ver\.?|section|clause|chapter|§|\boid|build|kernel|linux|[=<>~^]=|[<>])\s*[:=]?\s*"
    r"[\"']?|\b[A-Z][A-Za-z]+/)\Z"
)
_HEADING = re.compile(r"[ \t]+[A-Za-z]")
_LONGEST_HEADING = 30
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.\w)")
_BEFORE_IPV6 = re.compile(r"[\w:.]\Z")

# (what must be in the text for a pattern to be tried, the pattern). The prefixes are those the services document.
_PREFIXES = (
    (("AKIA", "ASIA", "AROA", "AIDA"), r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z2-7]{16}\b"),                           # AWS
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),                        # GitHub
    (("github_pat_",), r"\bgithub_pat_[A-Za-z0-9_]{22,255}\b"),
    (("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),                                                        # GitLab
    (("sk-",), r"\bsk-(?=[A-Za-z_-]*\d)(?:ant-|proj-|svcacct-|or-)?[A-Za-z0-9_-]{0,12}[A-Za-z0-9]{20}"      # models
               r"[A-Za-z0-9_-]{0,200}"),
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
)  # fmt: skip
_KEYS = tuple((needles, re.compile(pattern)) for needles, pattern in _PREFIXES)
_PRIVATE = re.compile(
    r"(-----BEGIN (?:[A-Z0-9 ]+ )?PRIVATE KEY(?: BLOCK)?-----)((?:(?!-----).)*)(-----END (?:[A-Z0-9 ]+ )?PRIVATE KEY"
    r"(?: BLOCK)?-----)", re.DOTALL
)  # fmt: skip
_QUOTED = re.compile(r"[\"']([A-Za-z0-9+/=_.~-]{16,200})[\"']")
_SECRET_NAME = re.compile(
    r"(?:api[_-]?key|secret|token(?!iz)|passw(?:or)?d|pwd|auth(?!or(?!i[sz]))|credential|access[_-]?key|"
    r"private[_-]?key)[A-Za-z0-9_-]{0,20}[\"']?\s{0,4}(?:=|:|=>|:=)\s{0,4}\Z", re.IGNORECASE
)  # fmt: skip
_LONGEST_NAME = 48
# Bits a character: words and paths have 2.5 to 3.7, 20 random characters of base64 about 4.1, of hexadecimal 3.4.
_MIN_ENTROPY, _MIN_HEX_ENTROPY = 3.8, 3.0

_PHONE = re.compile(
    r"[+(2-9](?:(?<=\+)[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,8}){1,4}|(?<=\+)[1-9]\d{9,13}|"
    r"(?<=\()\d{3}\) ?\d{3}[-. ]\d{4}|(?<=[2-9])\d{2}([-.])[2-9]\d{2}\1\d{4})(?![\w/]|[-.]\d)"
)
_BEFORE_PHONE = re.compile(r"[\w+./-]\Z")
# A decimal number with its sign, and one in thousands: +12.34, +10 000 000.
_SIGNED = re.compile(r"\+\d+\.\d+|\+\d{1,3}(?:[ .]000)+")
_LEAST_DIGITS = 9  # with the country's code; what has fewer is a list of numbers more often

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


def _follows(pattern: re.Pattern[str], match: re.Match[str], reach: int = 2) -> re.Match[str] | None:
    """What ``pattern``, which ends with \\Z, finds right before the match."""
    return pattern.search(match.string, max(0, match.start() - reach), match.start())


def mask_emails(text: str) -> tuple[str, int]:
    """Addresses of persons, and how many there were."""
    pieces, done, free = [], 0, 0
    for domain in _DOMAIN.finditer(text) if "@" in text else ():
        local = _follows(_LOCAL, domain, _LONGEST_LOCAL)
        if local is None or local.start() < free:  # what stands behind an address is no part of the next one
            continue
        free = domain.end()
        if not (_NOBODY.search(domain[1]) or _NOT_PERSONS.match(local.group())):
            pieces += [text[done : local.start()], EMAIL]
            done = free
    return "".join([*pieces, text[done:]]), len(pieces) // 2


def mask_ips(text: str) -> tuple[str, int]:
    """Public IPv4 and IPv6 addresses, and how many there were."""

    def four(match: re.Match[str]) -> str:
        if _follows(_BEFORE_IPV4, match) or _is_number_of_something(match):
            return match.group()
        return IPV4 if _is_public(match.group(), ipaddress.IPv4Address) else match.group()

    def six(match: re.Match[str]) -> str:
        address = match.group()  # at least three groups: x[2000::2] is a slice
        named = not _follows(_BEFORE_IPV6, match) and len(address.replace("::", ":").split(":")) > 2
        return IPV6 if named and _is_public(address, ipaddress.IPv6Address) else address

    text, fours = _substitute(_IPV4, text, four) if "." in text else (text, 0)
    text, sixes = _substitute(_IPV6, text, six) if ":" in text else (text, 0)
    return text, fours + sixes


def _is_public(address: str, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> bool:
    try:
        parsed = kind(address)
        return parsed.is_global and not parsed.is_multicast
    except ValueError:  # 300.1.1.1, 012.1.1.1, and of the others times and hardware addresses
        return False


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
    text, count = _substitute(_QUOTED, text, _masked_value)
    return text, total + count


def _masked_block(match: re.Match[str]) -> str:
    # The line ends stay, as they were written: real ones, or "\\n" within a string.
    body = match.group(2)
    if not re.search(r"[A-Za-z0-9+/=]{16}", body):
        return match.group()
    gap = next((end for end in ("\\r\\n", "\\n", "\n") if body.startswith(end)), "")
    return f"{match.group(1)}{gap}{KEY}{gap}{match.group(3)}"


def _masked_value(match: re.Match[str]) -> str:
    whole, value = match.group(), match.group(1)
    if whole[0] != whole[-1] or not looks_random(value) or not _follows(_SECRET_NAME, match, _LONGEST_NAME):
        return whole
    return f"{whole[0]}{KEY}{whole[0]}"


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

    def phone(match: re.Match[str]) -> str:
        number = match.group()
        few = sum(map(str.isdigit, number)) < _LEAST_DIGITS
        return number if few or _follows(_BEFORE_PHONE, match) or _SIGNED.fullmatch(number) else PHONE

    return _substitute(_PHONE, text, phone)


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
