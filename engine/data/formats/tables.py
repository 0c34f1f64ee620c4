"""Tables: CSV and TSV, Parquet, Arrow files and streams. A batch of rows at a time."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from engine.data.formats.lines import Found, decode_utf8, split_lines
from engine.data.formats.opening import Stream, open_bytes, packing_of
from engine.data.quarantine import Refused
from engine.errors import UserError

_BATCH_BYTES = 8_000_000
_BATCH_ROWS = 4096
_PAGES = 1 << 20  # bytes of a Parquet column read at a time, where a row group may have gigabytes
_AGAIN = "Fetch or write it again."


def separated(stream: Stream, separator: str, limit: int) -> Found:
    """(line on which it starts, record by the names of the header line); an empty field is None.

    A record may go over several lines. One of a line with a stray quote, with bytes that are not UTF-8 or with another
    number of fields is Refused, and the next line begins another.

    Raises:
        Refused: no header line, or a record of several lines whose quote is never closed, is a stray one, or closes
            further on than ``limit``: what follows cannot be told apart.
    """
    csv.field_size_limit(limit)
    lines = _Lines(stream, limit)
    records = csv.reader(lines, delimiter=separator, strict=True)
    header = _header(records, lines)
    while True:
        start = lines.number + 1
        try:
            values = next(records, None)
        except csv.Error as error:
            if lines.number > start or "unexpected end of data" in str(error):
                raise Refused("not_csv", f"not CSV ({error}, from line {start:,} on)") from None
            yield start, Refused("not_csv", f"not CSV ({error})")
            continue
        if values is None:
            return
        trouble, lines.trouble = lines.trouble, None
        if trouble is not None:
            yield start, trouble
        elif len(values) == len(header):
            yield start, {name: value or None for name, value in zip(header, values, strict=True)}
        elif values:
            yield start, Refused("wrong_number_of_fields", f"{len(values)} fields under {len(header)} names")


def _header(records: Iterator[list[str]], lines: _Lines) -> list[str]:
    try:
        header = next(records, None)
    except csv.Error as error:
        raise Refused("not_csv", f"not CSV ({error}, line 1)") from None
    if lines.trouble is not None:
        raise lines.trouble
    if header is None:
        raise Refused("empty", "the file is empty")
    if not any(header):
        raise Refused("no_header", "no header line with the names of the columns", "Add one.")
    return header


class _Lines:
    """Decoded lines of a file with their ends; ``trouble`` is what was wrong with one since it was last set to None."""

    def __init__(self, stream: Stream, limit: int):
        self.number = 0
        self.trouble: Refused | None = None
        self._found = split_lines(stream.read, limit)

    def __iter__(self) -> Iterator[str]:
        for lines in self._found:
            for raw in lines:
                self.number += 1
                try:
                    yield self._decoded(raw) + "\n"
                except Refused as bad:
                    self.trouble = bad
                    yield "\n"

    def _decoded(self, raw: bytes | None) -> str:
        if raw is None:
            raise Refused("line_too_long", "too long a line", "Raise --max_line_mb.")
        return decode_utf8(raw.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else raw)


def row_groups(path: Path, kind: str) -> list[tuple[int, int]]:
    """(rows, uncompressed bytes) of each group that can be read by itself; empty where the file is broken."""
    try:
        if kind == "parquet":
            metadata = _pyarrow(path).parquet.read_metadata(path)
            groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
            return [(group.num_rows, group.total_byte_size) for group in groups]
        with ExitStack() as stack:
            batches = _arrow_batches(path, stack, 0)[1]
            rows = [batch.num_rows for batch in batches]
            return [(count, path.stat().st_size * count // max(sum(rows), 1)) for count in rows]
    except (OSError, ValueError, Refused):
        return []


def parquet_rows(path: Path, start: int = 0, end: int | None = None, column: str | None = None) -> Found:
    """(number, row) of the rows from ``start``, which begins a row group, to ``end``; with ``column`` that one alone.

    Raises:
        Refused: no whole Parquet file, or no such column.
        UserError: pyarrow is missing.
    """
    pyarrow = _pyarrow(path)
    with ExitStack() as stack:
        try:
            source: Any = path
            if packing_of(path):  # read from its end, which a compressed file has only when it was unpacked
                source = _unpacked(path, stack)
            # Ahead is a whole row group by now: 116 MB of buffers where this takes 15.
            reader = pyarrow.parquet.ParquetFile(source, buffer_size=_PAGES, pre_buffer=False)
            file = stack.enter_context(reader)
            columns = None if column is None else [_column(file.schema_arrow.names, column)]
            groups, first, rows = [], 0, 0
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                if rows >= start and (end is None or rows < end):
                    first = first if groups else rows
                    groups.append(number)
                rows += count
            size = _batch_rows(file.metadata, groups)
            batches = file.iter_batches(batch_size=size, row_groups=groups, columns=columns, use_threads=False)
            yield from _rows(batches, first)
        except (pyarrow.ArrowException, OSError) as error:
            raise _broken(error, "Parquet") from None


def _batch_rows(metadata: Any, groups: list[int]) -> int:
    """So many rows that a batch is of about `_BATCH_BYTES`, for documents of a megabyte each as well."""
    size = sum(metadata.row_group(i).total_byte_size for i in groups)
    rows = sum(metadata.row_group(i).num_rows for i in groups)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def arrow_rows(path: Path, start: int = 0, end: int | None = None, column: str | None = None) -> Found:
    """The same of an Arrow (Feather) file or an Arrow stream; ``start`` and ``end`` are borders of record batches."""
    pyarrow = _pyarrow(path)
    with ExitStack() as stack:
        try:
            names, _ = _arrow_batches(path, stack, None)
            wanted = None if column is None else names.index(_column(names, column))
            before = 0
            for batch in _arrow_batches(path, stack, wanted)[1]:
                rows = batch.num_rows
                if end is not None and before >= end:
                    return
                if before >= start:
                    pieces = (batch.slice(at, _BATCH_ROWS) for at in range(0, rows, _BATCH_ROWS))
                    yield from _rows(pieces, before)
                before += rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _broken(error, "Arrow") from None


def _arrow_batches(path: Path, stack: ExitStack, column: int | None) -> tuple[list[str], Iterator[Any]]:
    """Names of the columns, and the record batches, with that one column where one is given."""
    pyarrow = _pyarrow(path)
    options = pyarrow.ipc.IpcReadOptions(included_fields=[] if column is None else [column])
    source: Any
    if packing_of(path):
        source = _unpacked(path, stack)
        head = source.read(6)
        source.seek(0)
    else:
        with open(path, "rb") as raw:
            head = raw.read(6)
        try:
            source = stack.enter_context(pyarrow.memory_map(str(path)))
        except (OSError, MemoryError):  # a limit on the address space: read it from the beginning instead
            source = stack.enter_context(pyarrow.OSFile(str(path)))
    if head == b"ARROW1":
        file = stack.enter_context(pyarrow.ipc.open_file(source, options=options))
        return file.schema.names, (file.get_batch(i) for i in range(file.num_record_batches))
    stream = stack.enter_context(pyarrow.ipc.open_stream(source, options=options))
    return stream.schema.names, iter(stream)


def _unpacked(path: Path, stack: ExitStack) -> IO[bytes]:
    """A compressed file as it was before, on disk."""
    target: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
    stream = stack.enter_context(open_bytes(path))
    while piece := stream.read(_PAGES):
        target.write(piece)
    target.seek(0)
    return target


def _column(names: list[str], column: str) -> str:
    """The column that holds a dotted path: of this very name, or of its first part."""
    for name in (column, column.split(".")[0]):
        if name in names:
            return name
    some = ", ".join(name[:40] for name in names[:10]) + (", …" if len(names) > 10 else "")
    raise Refused("no_text_field", f"no column {column!r} (columns: {some})", "Name it with --text_field.")


def _rows(batches: Iterator[Any], number: int) -> Found:
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (UnicodeDecodeError, ValueError, OverflowError):  # one row at a time: the others are good
            rows = [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield number, row


def _row(batch: Any) -> dict | Refused:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return Refused("not_utf8", "not UTF-8 text")
    except (ValueError, OverflowError) as error:
        return Refused("bad_value", f"holds a value out of range ({error})")


def _broken(error: Exception, name: str) -> Exception:
    """pyarrow says with OSError, without a number, that what it reads is broken."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    problem = " ".join(str(error).split())[:200]
    return Refused(f"not_{name.lower()}", f"not a whole {name} file ({problem})", _AGAIN)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):  # it is there: short of address space, or a library it needs
            problem = f"pyarrow cannot be loaded ({' '.join(str(error).split())[:200]})"
            raise UserError(problem, where=str(path), fix="Give more memory, or mend pyarrow.") from None
        name = path.suffix.lower().strip(".").capitalize()
        raise UserError(f"{name} files need pyarrow", where=str(path), fix="pip install pyarrow") from None
    return pyarrow
