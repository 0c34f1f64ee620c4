"""From files to documents. What cannot be read goes to the quarantine with file, row and reason.

Only a file that the user named is an error at once: when it is not text, or when its first row is no record.

A row is a line of JSON lines and CSV (where the record starts), an element of a JSON array, a row of a table, an item
of a collector; from 1. In a piece of JSON lines that does not begin its file (`units.Slice`) rows count from 1 at the
piece's first byte, and places say so: ``path+start:row``. `units.LineNumbers` turns them into ``path:row`` afterwards.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from engine.config.prepare import PrepareConfig
from engine.data import collectors
from engine.data.cleaning import Kind
from engine.data.formats import tables
from engine.data.formats.json_array import json_rows
from engine.data.formats.lines import Found, decode_utf8, json_lines, kind_name
from engine.data.formats.opening import Counted, Stream, packing_inside, packing_of, stream_of
from engine.data.quarantine import Quarantine, Refused
from engine.data.sources import SourceFile, show
from engine.data.units import Slice, Unit, plan_units
from engine.errors import UserError

__all__ = ["Document", "Quarantine", "Reader", "Refused", "Slice", "Unit", "check_bad_fraction", "place_of",
           "plan_units"]  # fmt: skip

# UTF-16 text and most binary formats that happen to decode are far above, a text with a few stray NULs below.
_MAX_NUL_SHARE = 0.1
_CONVERT = "Convert it to UTF-8 (iconv), or leave it out."


class Document(NamedTuple):
    """``source`` is the file, with ``:row`` where it has rows. A ``truncated`` text stands for one too long to read."""

    text: str
    kind: Kind
    source: str
    row: int | None = None
    truncated: bool = False


def place_of(piece: Slice, row: int | None) -> str:
    """`Document.source` of a row of this piece."""
    path = show(piece.file.path)
    if row is None:
        return path
    if piece.file.kind == "collector":
        return f"{collectors.place_of(piece.file.path, piece.start)}:{row}"
    return f"{path}+{piece.start}:{row}" if piece.start and piece.file.kind == "jsonl" else f"{path}:{row}"


class Reader:
    """Reads pieces of files one by one.

    When ``read(piece)`` is exhausted, ``sha256`` and ``size`` are those of the raw bytes of the piece, compressed as
    they are; of Parquet and Arrow those of the file with the first piece, of nothing with the others; of a collector
    `Collector.identity` and the bytes of text. ``lines`` is how many lines a piece of JSON lines has, where
    the file was cut. In between ``size`` is how many bytes were read so far.
    """

    def __init__(self, config: PrepareConfig, quarantine: Quarantine):
        self.config = config
        self.quarantine = quarantine
        self.records = 0  # rows, good and bad, of all pieces so far
        self.first_bad: str | None = None
        self.sha256 = ""
        self.lines = 0
        self._size = 0
        self._raw: Counted | None = None
        self._limit = int(min(config.max_line_mb, 1e9) * 1e6)

    def read(self, piece: Slice | SourceFile) -> Iterator[Document]:
        """The documents, in order. UserError where the user named this very file and it is not what it should be."""
        piece = Slice(piece) if isinstance(piece, SourceFile) else piece
        self.sha256, self.lines, self._size, self._raw = "", 0, 0, None
        if piece.file.kind == "collector":
            yield from self._collected(piece)
            return
        before = self.records
        try:
            with open(piece.file.path, "rb", buffering=0) as stream:
                raw = self._raw = Counted(stream, *self._bytes_of(piece, stream))
                try:
                    _check_suffix(piece.file, stream)
                    if piece.file.kind in ("prose", "code"):
                        yield self._whole(piece.file, piece.file.kind, raw)
                    else:
                        yield from self._records(piece, raw)
                except Refused as bad:
                    self._refuse_file(piece.file, bad, self.records - before)
                if piece.file.kind not in ("parquet", "arrow") or piece.start == 0:
                    raw.drain()
                self.sha256 = raw.sha256
        except OSError as error:
            problem = Refused("unreadable", error.strerror or str(error), "Check its permissions.")
            self._refuse_file(piece.file, problem, self.records - before)

    @property
    def size(self) -> int:
        """Raw bytes of this piece that were read so far."""
        return self._size if self._raw is None else self._raw.size

    def check_bad_fraction(self) -> None:
        """UserError once more rows than ``max_bad_fraction`` were unusable. Called after the last file."""
        check_bad_fraction(self.config, self.records, self.quarantine.lines, self.first_bad)

    def _bytes_of(self, piece: Slice, stream: io.RawIOBase) -> tuple[int, int | None]:
        """Where the piece lies. UserError where the file is no longer the one that was cut into pieces."""
        if piece.file.kind != "jsonl" or piece.whole:
            return 0, None
        size = os.fstat(stream.fileno()).st_size
        if piece.start:
            stream.seek(piece.start - 1)
            if stream.read(1) != b"\n":
                size = 0
        if piece.end is not None and size < piece.end:
            raise UserError("was changed while it was read", where=show(piece.file.path),
                            fix="Start again once it is complete.")  # fmt: skip
        return piece.start, piece.end

    def _refuse_file(self, file: SourceFile, bad: Refused, rows: int) -> None:
        behind = f", after {rows:,} rows" if rows else ""
        if file.direct:
            raise UserError(bad.detail + behind, where=show(file.path), fix=bad.fix)
        self.quarantine.add(show(file.path), None, bad.reason, bad.detail + behind)

    def _whole(self, file: SourceFile, kind: Kind, raw: Counted) -> Document:
        # A character has at most four bytes, so what is beyond this is beyond max_characters too.
        limit = 4 * self.config.max_characters
        stream = stream_of(raw, packing_of(file.path))
        content = stream.read_full(limit)
        truncated = bool(stream.read(1))  # or Refused: half of a compressed text is none
        text = decode_utf8(content, final=not truncated)
        if content.count(0) > _MAX_NUL_SHARE * len(content):
            raise Refused("not_text", "not a text file (NUL bytes)", _CONVERT)
        return Document(text, kind, show(file.path), None, truncated)

    def _records(self, piece: Slice, raw: Counted) -> Iterator[Document]:
        """A document of each good row; the others go to the quarantine."""
        file, kind, name = piece.file, self.config.jsonl_kind, self.config.text_field
        start = piece.start if file.kind == "jsonl" else 0
        prefix, first = place_of(piece, 0)[:-1], piece.start == 0
        for row, found in self._rows(piece, raw):
            self.records += 1
            # The usual record needs no more than this line; `_text_of` says what is wrong with any other.
            text = found.get(name) if type(found) is dict else None
            if type(text) is not str:
                try:
                    text = _text_of(found, name, file.kind)
                except Refused as bad:
                    self._refuse_row(file, f"{prefix}{row}", row, bad, first, start)
                    first = False
                    continue
            first = False
            yield Document(text, kind, f"{prefix}{row}", row)

    def _rows(self, piece: Slice, raw: Counted) -> Found:
        file, name = piece.file, self.config.text_field
        if file.kind == "parquet":
            return tables.parquet_rows(file.path, piece.start, piece.end, name)
        if file.kind == "arrow":
            return tables.arrow_rows(file.path, piece.start, piece.end, name)
        stream = stream_of(raw, packing_of(file.path))
        if file.kind == "jsonl":
            read = stream.read if piece.whole else self._counting(stream)
            return json_lines(read, self._limit, first=piece.start == 0)
        if file.kind == "json":
            return json_rows(stream, self._limit, lambda row: _value(row, name) is not _MISSING)
        assert file.kind in ("csv", "tsv"), file.kind
        return tables.separated(stream, "," if file.kind == "csv" else "\t", self._limit)

    def _counting(self, stream: Stream) -> Callable[[int], bytes]:
        def read(size: int) -> bytes:
            chunk = stream.read(size)
            self.lines += chunk.count(b"\n")
            return chunk

        return read

    def _refuse_row(self, file: SourceFile, place: str, row: int, bad: Refused, first: bool, start: int) -> None:
        if file.direct and first:
            raise UserError(bad.detail, where=place, fix=bad.fix) from None
        if first and bad.reason == "no_text_field" and file.kind != "jsonl":
            self.records -= 1
            raise bad  # in a folder, a table or an array of something else; JSON lines are looked at one by one
        self.first_bad = self.first_bad or f"{place}: {bad.detail}"
        self.quarantine.add(show(file.path), row, bad.reason, bad.detail, bad.excerpt, start=start)

    def _collected(self, piece: Slice) -> Iterator[Document]:
        collector = collectors.load(piece.file.path)
        name, kind = self.config.text_field, self.config.jsonl_kind
        for place, row, found in collectors.items(collector, piece.start, piece.end):
            self.records += 1
            try:
                text = found if isinstance(found, str) else _text_of(found, name, "collector")
            except Refused as bad:
                if row == 1:
                    raise UserError(bad.detail, where=f"{place}:{row}", fix=bad.fix) from None
                self.first_bad = self.first_bad or f"{place}:{row}: {bad.detail}"
                self.quarantine.add(place, row, bad.reason, bad.detail, bad.excerpt)
            else:
                self._size += len(text.encode("utf-8", "surrogatepass"))
                yield Document(text, kind, f"{place}:{row}", row)
        self.sha256 = collector.identity()


def check_bad_fraction(config: PrepareConfig, records: int, bad: int, first_bad: str | None) -> None:
    """UserError where more of the ``records`` rows than ``max_bad_fraction`` are unusable; the counts of several
    readers added up, and the first that any of them names."""
    if bad > config.max_bad_fraction * records:
        raise UserError(
            f"{bad:,} of {records:,} records are unusable, allowed {config.max_bad_fraction:.2%}; "
            f"the first is {first_bad}",
            fix="Mend them, or raise --max_bad_fraction.",
        )


def _check_suffix(file: SourceFile, stream: io.RawIOBase) -> None:
    """Refused where what should be text is a compressed file: one item, not a bad record for each of its lines."""
    if packing_of(file.path) is None:
        packing = packing_inside(os.pread(stream.fileno(), 10, 0))
        if packing is not None:
            fix = f"Give it a name that ends in {packing}."
            raise Refused("wrong_suffix", f"holds {packing} data, whatever its name says", fix)


_MISSING = object()


def _value(record: dict, name: str) -> object:
    """The field of this name, else what a dotted path leads to."""
    if name in record:
        return record[name]
    found: object = record
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _text_of(record: object, name: str, kind: str) -> str:
    if isinstance(record, Refused):
        raise record
    if not isinstance(record, dict):
        raise Refused("not_an_object", f"neither text nor a dict with fields ({type(record).__name__})")
    value = _value(record, name)
    if value is _MISSING:
        detail = f"no field {name!r} (fields: {_some(record)})"
        raise Refused("no_text_field", detail, "Name it with --text_field.", _excerpt(record))
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # Parquet files of writers that do not mark text as such
        return decode_utf8(value)
    if value is None and kind in ("csv", "tsv"):  # an empty field
        return ""
    detail = f"field {name!r} holds {kind_name(value)}, not text"
    raise Refused("text_not_a_string", detail, "Name another with --text_field.", _excerpt(record))


def _excerpt(record: dict) -> bytes:
    return repr(record)[:200].encode("utf-8", "backslashreplace")


def _some(record: Iterable[object]) -> str:
    names = [str(name)[:40] for name in record]
    return (", ".join(names[:10]) + (", …" if len(names) > 10 else "")) or "none"
