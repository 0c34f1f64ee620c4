"""Rows of a .json file: an array is read an element at a time, so a large one never lies in memory whole. No element,
and no object that is the whole file, may be longer than a JSON line may be."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable

from engine.data.formats.lines import Found, decode_utf8, json_lines, kind_name, no_constant, parse_json
from engine.data.formats.opening import Stream
from engine.data.quarantine import Refused

_CHUNK = 1 << 20  # bytes
# Where an object holds several arrays, the one of these names is meant.
_LISTS = ("data", "rows", "examples", "train", "instances")
# An object with one of these is a row itself.
_FIELDS = ("messages", "conversations", "instruction", "chosen", "text", "prompt")


def json_rows(stream: Stream, limit: int, is_row: Callable[[dict], bool] | None = None) -> Found:
    """(number from 1, row) of an array, of an object with one array, or of JSON lines, which many files called .json
    hold. An object for which ``is_row`` holds, or with one of the usual fields, is a row itself.

    Raises:
        Refused: not JSON, or no array of rows in it. An array that breaks off has given its whole elements before.
    """
    head, number = _next_line(stream, 0)
    head = head.removeprefix(codecs.BOM_UTF8)
    if not head.strip():
        head, number = _next_line(stream, number)
    if not head:
        raise Refused("empty", "the file is empty")
    if head.lstrip().startswith(b"["):
        yield from _elements(head, stream, limit)
        return
    if not head.endswith(b"\n"):
        head += stream.readline(max(0, limit - len(head)))
    following, last = _next_line(stream, number)
    first = _object(head) if following else None
    if first is not None:
        yield number, first
        for more, row in json_lines(_Joined(following, stream).read, limit, first=False):
            yield last - 1 + more, row
        return
    rest = stream.read_full(max(0, limit - len(head) - len(following)) + 1)
    if len(head) + len(following) + len(rest) > limit or stream.read(1):
        detail = f"an object longer than {limit / 1e6:g} MB"
        raise Refused("too_long", detail, "Give its rows as one array, or as JSON lines.")
    yield from _of_object(head + following + rest, is_row)


def _next_line(stream: Stream, number: int) -> tuple[bytes, int]:
    """The next line that is not blank (at most a chunk of it), b"" at the end, and its number, ``number`` being that of
    the line before."""
    begins = True
    while line := stream.readline(_CHUNK):
        number += begins
        if line.strip():
            return line, number
        begins = line.endswith(b"\n")
    return b"", number


class _Joined:
    """What was read already, then the stream."""

    def __init__(self, head: bytes, stream: Stream):
        self._head, self._stream = head, stream

    def read(self, size: int) -> bytes:
        head, self._head = self._head, b""
        return head or self._stream.read(size)


def _object(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _of_object(raw: bytes, is_row: Callable[[dict], bool] | None) -> Found:
    whole = parse_json(decode_utf8(raw))
    if not isinstance(whole, dict):
        raise Refused("no_rows", f"a JSON {kind_name(whole)}, neither an array nor an object")
    if any(name in whole for name in _FIELDS) or (is_row is not None and is_row(whole)):
        yield 1, whole
        return
    lists = [name for name, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    name = next((name for name in _LISTS if name in lists), lists[0] if len(lists) == 1 else None)
    if name is None:
        some = ", ".join(str(name)[:40] for name in list(whole)[:10])
        problem = "several arrays of objects" if lists else "no array of objects"
        raise Refused("no_rows", f"{problem} in it (fields: {some})", "Give a file with one array, or JSON lines.")
    for number, row in enumerate(whole[name], 1):
        yield number, _checked(row)


def _checked(row: object) -> dict | Refused:
    if isinstance(row, dict):
        return row
    return Refused("not_an_object", f"a JSON {kind_name(row)}, not an object with fields")


def _elements(head: bytes, stream: Stream, limit: int) -> Found:
    decoder = json.JSONDecoder(parse_constant=no_constant)
    text = _Text(head, stream)
    text.skip("[")
    number = 0
    if text.next() == "]":
        text.skip("]")
    else:
        while True:
            number += 1
            yield number, _checked(text.element(decoder, number, limit))
            separator = text.next()
            if separator not in (",", "]"):
                what = f"{separator!r} after row {number:,}" if separator else f"the file ends after row {number:,}"
                raise Refused("not_json", f"not JSON ({what})", "Mend it, or fetch it again.")
            text.skip(separator)
            if separator == "]":
                break
    if text.next():
        raise Refused("not_json", f"not JSON (something follows the array of {number:,} rows)")


class _Text:
    """Text of a stream, read as far as needed."""

    def __init__(self, head: bytes, stream: Stream):
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._stream = stream
        self._buffer, self._place, self._more = "", 0, True
        self._feed(head)

    def _feed(self, raw: bytes) -> None:
        self._more = bool(raw)
        try:
            text = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise Refused("not_utf8", f"not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None
        self._buffer, self._place = self._buffer[self._place :] + text, 0

    def next(self) -> str:
        """The next character that is no blank, "" at the end; it stays."""
        while True:
            while self._place < len(self._buffer):
                if not self._buffer[self._place].isspace():
                    return self._buffer[self._place]
                self._place += 1
            if not self._more:
                return ""
            self._feed(self._stream.read(_CHUNK))

    def skip(self, character: str) -> None:
        assert self.next() == character
        self._place += 1

    def element(self, decoder: json.JSONDecoder, number: int, limit: int) -> object:
        """The next element. One that the buffer cuts off is tried again with twice as much, up to ``limit``."""
        self.next()
        wanted = _CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._place)
            except (ValueError, RecursionError) as error:
                if not self._more or isinstance(error, RecursionError):
                    problem = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(":")[0]
                    detail = f"not JSON ({problem}, row {number:,})"
                    raise Refused("not_json", detail, "Mend it, or fetch it again.") from None
                if len(self._buffer) - self._place > limit:
                    detail = f"row {number:,} is not JSON, or longer than {limit / 1e6:g} MB"
                    raise Refused("too_long", detail, "Mend it, or write it as JSON lines.") from None
                self._feed(self._stream.read_full(wanted))
                wanted *= 2
            else:
                # A number at the buffer's end may go on, behind its "." or "e+" too, which alone are none of it.
                if end + 2 < len(self._buffer) or not self._more:
                    self._place = end
                    return value
                self._feed(self._stream.read(_CHUNK))
