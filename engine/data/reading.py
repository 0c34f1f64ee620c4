"""From files to documents. What cannot be read goes to the quarantine with file, line and reason.

Only a file that the user named is an error at once: when it is not text, or when its first line is no record.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, TextIO

from engine.config.prepare import PrepareConfig
from engine.data.cleaning import EXCERPT_CHARACTERS, Kind
from engine.data.sources import SourceFile, show
from engine.errors import UserError

_CHUNK = 1 << 20
# UTF-16 text and most binary formats that happen to decode are far above, a text with a few stray NULs below.
_MAX_NUL_SHARE = 0.1
_CONVERT = "Convert it to UTF-8 (iconv), or leave it out."


@dataclass(frozen=True)
class Document:
    """``source`` is the file, with ``:line`` for JSONL. A ``truncated`` text stands for one too long to be read."""

    text: str
    kind: Kind
    source: str
    truncated: bool = False


class Quarantine:
    """What could not be read: every item as a line of ``stream``, counts by reason, the first few and the first of each
    reason as samples."""

    def __init__(self, stream: TextIO, max_samples: int = 20):
        self.files = 0
        self.lines = 0
        self.reasons: Counter[str] = Counter()
        self.samples: list[dict] = []
        self._stream = stream
        self._max_samples = max_samples

    def add(self, path: str, line: int | None, reason: str, detail: str, excerpt: str = "") -> None:
        item = {"file": path, "line": line, "reason": reason, "detail": detail, "excerpt": excerpt}
        self.files += line is None
        self.lines += line is not None
        self.reasons[reason] += 1
        if len(self.samples) < self._max_samples or self.reasons[reason] == 1:
            self.samples.append(item)
        self._stream.write(json.dumps(item) + "\n")

    def as_manifest(self) -> dict:
        return {
            "files": self.files,
            "lines": self.lines,
            "reasons": dict(sorted(self.reasons.items())),
            "samples": self.samples,
        }


class Refused(Exception):
    """A file or line that holds nothing of use."""

    def __init__(self, reason: str, detail: str, fix: str = "Mend or remove it."):
        super().__init__(detail)
        self.reason, self.detail, self.fix = reason, detail, fix


class Reader:
    """Reads files one by one. When ``read(file)`` is exhausted, ``sha256`` and ``size`` (bytes) are that file's."""

    def __init__(self, config: PrepareConfig, quarantine: Quarantine):
        self.config = config
        self.quarantine = quarantine
        self.records = 0  # lines of JSONL that are not blank, good and bad
        self.first_bad: str | None = None
        self.sha256 = ""
        self.size = 0

    def read(self, file: SourceFile) -> Iterator[Document]:
        """The file's documents. UserError where the user named this very file and it is not what it should be."""
        self._digest = hashlib.sha256()
        self.size, self.sha256 = 0, ""
        path = show(file.path)
        try:
            with open(file.path, "rb") as stream:
                if file.kind == "jsonl":
                    yield from self._jsonl(file, stream)
                else:
                    yield self._whole(file, stream)
        except Refused as bad:
            self._refuse_file(file, path, bad)
        except OSError as error:
            self._refuse_file(file, path, Refused("unreadable", error.strerror or str(error), "Check its permissions."))
            return
        self.sha256 = self._digest.hexdigest()

    def check_bad_fraction(self) -> None:
        """UserError once more JSONL lines than ``max_bad_fraction`` were unusable. Called after the last file."""
        bad = self.quarantine.lines
        if bad > self.config.max_bad_fraction * self.records:
            raise UserError(
                f"{bad:,} of {self.records:,} JSONL lines are unusable, allowed {self.config.max_bad_fraction:.2%}; "
                f"the first is {self.first_bad}",
                fix="Mend them, or raise --max_bad_fraction.",
            )

    def _refuse_file(self, file: SourceFile, path: str, bad: Refused) -> None:
        if file.direct:
            raise UserError(bad.detail, where=path, fix=bad.fix)
        self.quarantine.add(path, None, bad.reason, bad.detail)

    def _read(self, stream: BinaryIO, size: int) -> bytes:
        raw = stream.read(size)
        self._count(raw)
        return raw

    def _count(self, raw: bytes) -> None:
        self._digest.update(raw)
        self.size += len(raw)

    def _whole(self, file: SourceFile, stream: BinaryIO) -> Document:
        # A character has at most four bytes, so what is beyond this is beyond max_characters too.
        limit = 4 * self.config.max_characters
        raw = self._read(stream, limit)
        while self._read(stream, _CHUNK):
            pass
        truncated = self.size > limit
        text = decode_utf8(raw, final=not truncated)
        if raw.count(0) > _MAX_NUL_SHARE * len(raw):
            raise Refused("not_text", "not a text file (NUL bytes)", _CONVERT)
        return Document(text, _text_kind(file), show(file.path), truncated)

    def _jsonl(self, file: SourceFile, stream: BinaryIO) -> Iterator[Document]:
        path, first = show(file.path), True
        for number, raw in self._lines(stream):
            if raw is not None and not raw.strip():
                continue
            self.records += 1
            try:
                text = self._text_of(raw)
            except Refused as bad:
                if file.direct and first:
                    raise UserError(bad.detail, where=f"{path}:{number}", fix=bad.fix) from None
                self.first_bad = self.first_bad or f"{path}:{number}: {bad.detail}"
                excerpt = b"" if raw is None else raw[:EXCERPT_CHARACTERS]
                self.quarantine.add(path, number, bad.reason, bad.detail, excerpt.decode("utf-8", "backslashreplace"))
            else:
                yield Document(text, self.config.jsonl_kind, f"{path}:{number}")
            first = False

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        """Numbered lines; None for one longer than ``max_line_mb``, which is passed over a chunk at a time."""
        limit = int(self.config.max_line_mb * 1e6)
        number = 0
        while raw := stream.readline(limit):
            number += 1
            self._count(raw)
            if len(raw) < limit or raw.endswith(b"\n"):
                yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                continue
            while not raw.endswith(b"\n") and (raw := stream.readline(_CHUNK)):
                self._count(raw)
            yield number, None

    def _text_of(self, raw: bytes | None) -> str:
        if raw is None:
            raise Refused("line_too_long", f"longer than {self.config.max_line_mb:g} MB", "Raise --max_line_mb.")
        # Without its end: else a cut record is reported at column 1 of the next line.
        record = parse_json(decode_utf8(raw).rstrip("\r\n"))
        if not isinstance(record, dict):
            raise Refused("not_an_object", f"a JSON {_NAMES.get(type(record), 'null')}, not an object with fields")
        name = self.config.text_field
        if name not in record:
            raise Refused("no_text_field", f"no field {name!r} (fields: {_some(record)})", "Name it with --text_field.")
        if not isinstance(record[name], str):
            detail = f"field {name!r} holds {_NAMES.get(type(record[name]), 'null')}, not text"
            raise Refused("text_not_a_string", detail, "Name another with --text_field.")
        return record[name]


_NAMES = {list: "array", dict: "object", str: "string", int: "number", float: "number", bool: "boolean"}


def _text_kind(file: SourceFile) -> Kind:
    assert file.kind != "jsonl"
    return file.kind


def _some(record: dict) -> str:
    names = [name[:40] for name in list(record)[:10]]
    return (", ".join(names) + (", …" if len(record) > 10 else "")) or "none"


def decode_utf8(raw: bytes, *, final: bool = True) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Refused("not_utf8", "UTF-16 text, not UTF-8", "Convert it with: iconv -f UTF-16 -t UTF-8.")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final)
    except UnicodeDecodeError as error:
        detail = f"not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start:,})"
        raise Refused("not_utf8", detail, _CONVERT) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_json(line: str) -> object:
    try:
        return json.loads(line, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Refused("not_json", f"not JSON ({error.msg} at column {error.colno:,})") from None
    except ValueError as error:  # NaN, Infinity, an integer of more than 4300 digits
        raise Refused("not_json", f"not JSON ({error})") from None
    except RecursionError:
        raise Refused("too_deep", "nested too deeply to parse", "Flatten it.") from None
