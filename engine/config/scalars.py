"""Words as values: one reading of numbers, true/false and null, for YAML and the command line (YAML 1.2's schema)."""

from __future__ import annotations

import re
from typing import Any

# PyYAML follows YAML 1.1, where 3e-4 is text, `off` is false, 1:30 is ninety and 010 is eight. None is meant here.
NULL = re.compile(r"(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"[-+]?[0-9][0-9_]{0,400}$")
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


def parse_scalar(text: str) -> Any:
    """``text`` as None, bool, int or float where it reads as one, else unchanged."""
    word = text.strip()
    if NULL.match(word):
        return None
    if BOOL.match(word):
        return word.lower() == "true"
    if INT.match(word):
        return int(word.replace("_", ""))
    if FLOAT.match(word):
        return float(word.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
