"""Rows of a source of examples, whatever file they lie in.

| suffix             | a row is                                                                                  |
|--------------------|-------------------------------------------------------------------------------------------|
| .jsonl .ndjson     | a line                                                                                    |
| .json              | an element of the array, or of the one array that the object holds; also read: JSON lines |
| .csv .tsv          | a record under the header line                                                            |
| .parquet           | a row                                                                                     |
| .arrow .feather    | a row                                                                                     |
| .txt .text         | {"text": …}: in a folder the whole file, in a file named itself what blank lines separate |

Each of them may end in .gz, .zst, .bz2 or .xz. A folder that `datasets` saved, and a name that is no path, are Hugging
Face datasets.
What cannot be read goes to the quarantine with file and row.
Only a file that the user named is an error at once where it cannot be read; one in a folder goes to the quarantine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.formats import saved, tables
from engine.data.formats.json_array import json_rows
from engine.data.formats.lines import Found, decode_utf8, json_lines
from engine.data.formats.opening import open_bytes, packing_of
from engine.data.quarantine import Quarantine, Refused
from engine.data.sources import show
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config.stages import Source

Rows = Iterator[tuple[str, dict]]

_MAX_LINE = 1 << 28  # bytes
_EXCERPT = 200  # characters of a bad row that the quarantine keeps
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_READABLE = "Read are .json .jsonl .csv .tsv .parquet .arrow .txt (also .gz .zst), and Hugging Face datasets."


def read(source: Source, quarantine: Quarantine) -> Rows:
    """(place, row) of each row that could be read, in the order of the files' names; a place is ``file:row``, from 1
    (of JSON lines and CSV the line).

    Raises:
        UserError: nothing readable at ``source.path``, or the user named a file that cannot be read.
    """
    if _is_dataset(source):
        yield from _dataset_rows(source, quarantine)
        return
    direct = not Path(source.path).is_dir()
    for path in files(source):
        yield from _file_rows(path, direct, quarantine)


def files(source: Source) -> list[Path]:
    """The files of a source, in the order in which they are read; none for a Hugging Face dataset from the hub.

    Raises:
        UserError: no such file or folder, or nothing readable in it.
    """
    root = Path(source.path)
    if not root.exists():
        if _is_dataset(source):
            return []
        problem = "no such file or folder, nor a dataset's name"
        raise UserError(problem, where=show(root), fix="Check the source's path.")
    if not root.is_dir():
        if _reader(root) is None:
            raise UserError(f"{root.suffix or 'this kind of'} files are not read", where=show(root), fix=_READABLE)
        return [root]
    saved = _is_dataset(source)
    found = [path for path in _walk(root) if saved or _reader(path) is not None]
    if source.split is not None and not saved:
        found = [path for path in found if path.name.startswith(source.split) or path.parent.name == source.split]
    if not found:
        what = f"no file of split {source.split!r}" if source.split else "no readable file"
        raise UserError(f"{what} in the folder", where=show(root), fix=_READABLE)
    return found


def fingerprint(source: Source) -> str:
    """SHA-256 of the content of a source: of its files (their names in the folder too), or the dataset's own
    fingerprint from the hub. The same rows in another place have the same."""
    digest = hashlib.sha256(f"{source.name}\n{source.split}\n".encode())
    found = files(source)
    root = Path(source.path)
    for path in found:
        name = path.relative_to(root) if root.is_dir() else Path(path.name)
        with path.open("rb") as stream:
            digest.update(f"{show(name)}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    if not found:
        digest.update(str(saved.load(source.path, source.name, source.split)._fingerprint).encode())
    return digest.hexdigest()


def refuse(quarantine: Quarantine, place: str, reason: str, detail: str, row: object = "") -> None:
    """Notes a row of ``read`` that turned out to be useless (a `BadRow`, say)."""
    path, _, number = place.rpartition(":")
    excerpt = row if isinstance(row, str) else repr(row)
    quarantine.add(path, int(number), reason, detail, excerpt[:_EXCERPT])


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _file_rows(path: Path, direct: bool, quarantine: Quarantine) -> Rows:
    name = show(path)
    reader = _reader(path)
    assert reader is not None, path
    try:
        for number, row in reader(path, direct):
            if isinstance(row, Refused):
                refuse(quarantine, f"{name}:{number}", row.reason, row.detail, row.excerpt)
            else:
                yield f"{name}:{number}", row
    except OSError as error:
        problem = error.strerror or str(error)
        _refuse_file(name, direct, quarantine, Refused("unreadable", problem, "Check that it is whole."))
    except Refused as bad:
        _refuse_file(name, direct, quarantine, bad)


def _refuse_file(name: str, direct: bool, quarantine: Quarantine, bad: Refused) -> None:
    if direct:
        raise UserError(bad.detail, where=name, fix=bad.fix)
    quarantine.add(name, None, bad.reason, bad.detail)


def _reader(path: Path) -> Callable[[Path, bool], Found] | None:
    return _READERS.get((path.with_suffix("") if packing_of(path) else path).suffix.lower())


def _jsonl(path: Path, direct: bool) -> Found:
    with open_bytes(path) as stream:
        yield from json_lines(stream.read, _MAX_LINE)


def _json(path: Path, direct: bool) -> Found:
    with open_bytes(path) as stream:
        yield from json_rows(stream, _MAX_LINE)


def _separated(separator: str) -> Callable[[Path, bool], Found]:
    def rows(path: Path, direct: bool) -> Found:
        with open_bytes(path) as stream:
            yield from tables.separated(stream, separator, _MAX_LINE)

    return rows


def _text(path: Path, direct: bool) -> Found:
    with open_bytes(path) as stream:
        raw = stream.read_full(_MAX_LINE)
        if stream.read(1):
            raise Refused("too_long", f"a text longer than {_MAX_LINE:,} bytes", "Split it into several files.")
    text = decode_utf8(raw.removeprefix(b"\xef\xbb\xbf"))
    if not direct:
        yield 1, {"text": text}
        return
    number, block = 1, []
    for count, line in enumerate([*text.splitlines(keepends=True), ""], 1):
        if line.strip():
            number = number if block else count
            block.append(line)
        elif block:
            yield number, {"text": "".join(block).strip("\r\n")}
            block = []


_READERS: dict[str, Callable[[Path, bool], Found]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _separated(","), ".tsv": _separated("\t"),
    ".parquet": lambda path, direct: tables.parquet_rows(path), ".txt": _text, ".text": _text,
    ".arrow": lambda path, direct: tables.arrow_rows(path), ".feather": lambda path, direct: tables.arrow_rows(path),
}  # fmt: skip


def _is_dataset(source: Source) -> bool:
    root = Path(source.path)
    if root.is_dir():
        return saved.is_saved(root)
    return not root.exists() and _HUB_NAME.fullmatch(source.path) is not None and _reader(root) is None


def _dataset_rows(source: Source, quarantine: Quarantine) -> Rows:
    for number, row in enumerate(saved.load(source.path, source.name, source.split), 1):
        yield f"{source.path}:{number}", row
