"""JSON lines. Good lines go through orjson; what it refuses goes through Python's parser, which knows why, and which
takes what orjson does not: a lone surrogate, an integer of a thousand digits."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import NoReturn

import orjson

from engine.data.formats.opening import CHUNK
from engine.data.quarantine import Refused

# A row's number, from 1, and what was found there.
Found = Iterator[tuple[int, dict | Refused]]

_CONVERT = "Convert it to UTF-8 (iconv), or leave it out."
_NAMES = {list: "array", dict: "object", str: "string", int: "number", float: "number", bool: "boolean"}


def kind_name(value: object) -> str:
    """A JSON value's type for a person."""
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def split_lines(read: Callable[[int], bytes], limit: int) -> Iterator[list[bytes | None]]:
    """All lines without their ends, many at once; None for one that is longer than ``limit`` bytes, of which no more
    than that was held. ``read(size)`` gives at most ``size`` bytes, none at the end."""
    pieces: list[bytes] = []
    held = 0
    while chunk := read(CHUNK):
        lines: list[bytes | None] = chunk.split(b"\n")  # type: ignore[assignment]
        if len(lines) == 1:
            held += len(chunk)
            pieces = [*pieces, chunk] if held <= limit else []
            continue
        if pieces or held:
            held += len(lines[0] or b"")
            lines[0] = b"".join([*pieces, lines[0] or b""]) if held <= limit else None
        last = lines.pop() or b""
        pieces, held = [last], len(last)
        yield lines
    if held:
        yield [b"".join(pieces) if held <= limit else None]


def json_lines(read: Callable[[int], bytes], limit: int, *, first: bool = True) -> Found:
    """(line, record) of each line that is not blank. ``first``: a byte order mark may stand at the beginning.

    Lines above ``limit`` bytes are Refused, and not held.
    """
    number = 0
    loads, refused = orjson.loads, orjson.JSONDecodeError
    for lines in split_lines(read, limit):
        if first and lines[0]:
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        first = False
        for raw in lines:
            number += 1
            if raw is None or len(raw) > limit:
                size = f"{limit / 1e6:g} MB" if limit >= 1000 else f"{limit} bytes"
                detail = f"longer than {size}"
                yield number, Refused("line_too_long", detail, "Raise --max_line_mb.", raw or b"")
                continue
            try:
                record = loads(raw)
            except refused:
                if not raw.strip():
                    continue
                record = _slow(raw)
            if type(record) is dict or isinstance(record, Refused):
                yield number, record
            else:
                detail = f"a JSON {kind_name(record)}, not an object with fields"
                yield number, Refused("not_an_object", detail, excerpt=raw)


def _slow(raw: bytes) -> object:
    try:
        return parse_json(decode_utf8(raw))
    except Refused as bad:
        return Refused(bad.reason, bad.detail, bad.fix, raw)


def decode_utf8(raw: bytes, *, final: bool = True) -> str:
    """Refused where it is not UTF-8. ``final``: a character cut off at the end is one, else it is left out."""
    try:
        return raw.decode() if final else codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError as error:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Refused("not_utf8", "UTF-16 text, not UTF-8", "Convert it with: iconv -f UTF-16 -t UTF-8.") from None
        detail = f"not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start:,})"
        raise Refused("not_utf8", detail, _CONVERT) from None


def no_constant(name: str) -> NoReturn:
    """For ``parse_constant``: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is not JSON")


def parse_json(line: str) -> object:
    """Refused, with the column, where it is not JSON."""
    try:
        return json.loads(line, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise Refused("not_json", f"not JSON ({error.msg} at column {error.colno:,})") from None
    except ValueError as error:  # NaN, Infinity, an integer of more than 4300 digits
        raise Refused("not_json", f"not JSON ({error})") from None
    except RecursionError:
        raise Refused("too_deep", "nested too deeply to parse", "Flatten it.") from None
