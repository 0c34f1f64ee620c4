"""The pieces in which the input is read: they follow from the files and ``unit_mb`` alone, never from the workers.

A large file of JSON lines is cut at line borders without being read, a Parquet or Arrow file at those of its row groups
or record batches. Nothing else is cut: a CSV record may hold line ends, a compressed stream has no middle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.config.prepare import PrepareConfig
from engine.data.formats import tables
from engine.data.formats.opening import packing_of
from engine.data.sources import Listing, SourceFile, show

# Opening a file costs as much as reading about this much: a unit does not hold a million of them.
_FILE_COST = 4096  # bytes
# Text is about this many times as long as a compressed or Parquet file of it.
_EXPANSION = 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Slice:
    """A piece of a file: bytes of JSON lines (``start`` is the first of a line), rows of Parquet and Arrow, parts of a
    collector; 0 and None where it is the whole."""

    file: SourceFile
    start: int = 0
    end: int | None = None

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end is None


@dataclass(frozen=True)
class Unit:
    """One piece of work, read by one process."""

    number: int
    slices: tuple[Slice, ...]

    def to_json(self) -> dict[str, Any]:
        slices = [{**_file_json(piece.file), "start": piece.start, "end": piece.end} for piece in self.slices]
        return {"number": self.number, "slices": slices}

    @classmethod
    def from_json(cls, item: Mapping[str, Any]) -> Unit:
        pieces = [Slice(_file_of(one), one["start"], one["end"]) for one in item["slices"]]
        return cls(item["number"], tuple(pieces))


def _file_json(file: SourceFile) -> dict[str, Any]:
    # A name that is not UTF-8 has lone surrogates in Python, which JSON keeps as escapes.
    return {"path": str(file.path), "input": file.input, "name": file.name, "kind": file.kind, "direct": file.direct}


def _file_of(item: Mapping[str, Any]) -> SourceFile:
    return SourceFile(Path(item["path"]), item["input"], item["name"], item["kind"], item["direct"])


def plan_units(listing: Listing, config: PrepareConfig) -> list[Unit]:
    """The units of all files, in order; each about ``unit_mb`` of text, or one piece that cannot be cut.

    Raises:
        UserError: a Parquet or Arrow file, and no pyarrow to read it.
    """
    limit = max(1, round(config.unit_mb * 1e6))
    units: list[Unit] = []
    pieces: list[Slice] = []
    filled = 0
    for piece, size in (found for file in listing.files for found in _cut(file, limit)):
        if pieces and filled + size > limit:
            units.append(Unit(len(units), tuple(pieces)))
            pieces, filled = [], 0
        pieces.append(piece)
        filled += size
    if pieces:
        units.append(Unit(len(units), tuple(pieces)))
    return units


def _cut(file: SourceFile, limit: int) -> Iterator[tuple[Slice, int]]:
    """Pieces of a file and how many bytes of text each counts for."""
    if file.kind == "collector":
        from engine.data import collectors

        count = len(collectors.parts_of(collectors.load(file.path)))
        pieces = [Slice(file)] if count == 1 else [Slice(file, part, part + 1) for part in range(count)]
        yield from ((piece, limit) for piece in pieces)
        return
    try:
        size = file.path.stat().st_size
    except OSError:  # gone since it was listed: the reader says so
        size = 0
    packed = packing_of(file.path) is not None
    if file.kind == "jsonl" and not packed and size > limit:
        borders = _line_borders(file, size, limit)
        yield from ((Slice(file, a, b), b - a + _FILE_COST) for a, b in pairwise(borders))
    elif file.kind in ("parquet", "arrow") and not packed and size * _EXPANSION > limit:
        yield from _cut_rows(file, tables.row_groups(file.path, file.kind), limit)
    else:
        yield Slice(file), size * (_EXPANSION if packed or file.kind == "parquet" else 1) + _FILE_COST


def _line_borders(file: SourceFile, size: int, limit: int) -> list[int]:
    """Where pieces of at least ``limit`` bytes begin, and the end: 0, …, size. Only around the cuts is read."""
    borders = [0]
    try:
        with open(file.path, "rb", buffering=0) as stream:
            while borders[-1] + limit < size:
                at = borders[-1] + limit - 1  # a line that begins right at the limit begins behind this byte
                stream.seek(at)
                while chunk := stream.read(_CHUNK):
                    if (found := chunk.find(b"\n")) >= 0:
                        at += found + 1
                        break
                    at += len(chunk)
                if at >= size:
                    break
                borders.append(at)
    except OSError:  # the reader says so
        pass
    return [*borders, size]


def _cut_rows(file: SourceFile, groups: list[tuple[int, int]], limit: int) -> Iterator[tuple[Slice, int]]:
    if sum(size for _, size in groups) <= limit:
        yield Slice(file), sum(size for _, size in groups) + _FILE_COST
        return
    start = rows = filled = 0
    for count, size in groups:
        if rows > start and filled + size > limit:
            yield Slice(file, start, rows), filled + _FILE_COST
            start, filled = rows, 0
        rows += count
        filled += size
    yield Slice(file, start, rows), filled + _FILE_COST


_PLACE = re.compile(r"(.*)\+(\d+):(\d+)", re.DOTALL)


class LineNumbers:
    """From the lines of a piece to those of its file, once every piece was read.

    The places of rows in a piece of JSON lines that does not begin its file are given as ``path+start:row``, row from 1
    at byte ``start``: how many lines lie before is only known when the others have counted theirs.
    """

    def __init__(self, counts: Iterable[tuple[Slice, int]]):
        """``counts``: of every piece of every file, in order, how many lines it has (`Reader.lines`)."""
        self._before: dict[tuple[str, int], int] = {}
        path, before = "", 0
        for piece, lines in counts:
            name = show(piece.file.path)
            before = before if name == path and piece.start else 0
            self._before[name, piece.start] = before
            path, before = name, before + lines

    def row(self, path: str, start: int, row: int) -> int:
        """Number of the line in the whole file."""
        return self._before.get((path, start), 0) + row

    def place(self, place: str) -> str:
        """``path:row`` for ``path+start:row``; any other place stays as it is."""
        found = _PLACE.fullmatch(place)
        if found is None or (found[1], int(found[2])) not in self._before:
            return place
        return f"{found[1]}:{self.row(found[1], int(found[2]), int(found[3]))}"

    def item(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item of a quarantine with its line in the whole file."""
        if "start" not in item:
            return item
        line = self.row(item["file"], item["start"], item["line"])
        return {key: value for key, value in (item | {"line": line}).items() if key != "start"}
