"""Rows of a source of examples, whatever file they lie in.

| suffix             | a row is                                                                                  |
|--------------------|-------------------------------------------------------------------------------------------|
| .jsonl .ndjson     | a line                                                                                    |
| .json              | an element of the array, or of the one array that the object holds; also read: JSON lines |
| .csv .tsv          | a record under the header line                                                            |
| .parquet           | a row                                                                                     |
| .txt .text         | {"text": …}: in a folder the whole file, in a file named itself what blank lines separate |

Each of them may end in .gz. A folder that `datasets` saved, and a name that is no path, are Hugging Face datasets.
What cannot be read goes to the quarantine with file and row.
Only a file that the user named is an error at once where it cannot be read; one in a folder goes to the quarantine.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.data.chat.conversation import kind_name
from engine.data.chat.json_rows import json_rows
from engine.data.reading import Quarantine, Refused, decode_utf8, parse_json
from engine.data.sources import show
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config.stages import Source

Rows = Iterator[tuple[str, dict]]
# A row's number and what was found there.
Found = Iterator[tuple[int, dict | Refused]]

_MAX_LINE = 1 << 28  # bytes
_EXCERPT = 200  # characters of a bad row that the quarantine keeps
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_READABLE = "Read are .json .jsonl .csv .tsv .parquet .txt (also .gz), and Hugging Face datasets."


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
        digest.update(str(_dataset(source)._fingerprint).encode())
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
                refuse(quarantine, f"{name}:{number}", row.reason, row.detail)
            else:
                yield f"{name}:{number}", row
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or str(error)
        _refuse_file(name, direct, quarantine, Refused("unreadable", problem, "Check that it is whole."))
    except Refused as bad:
        _refuse_file(name, direct, quarantine, bad)


def _refuse_file(name: str, direct: bool, quarantine: Quarantine, bad: Refused) -> None:
    if direct:
        raise UserError(bad.detail, where=name, fix=bad.fix)
    quarantine.add(name, None, bad.reason, bad.detail)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _reader(path: Path) -> Callable[[Path, bool], Found] | None:
    stem = Path(path.stem) if path.suffix.lower() == ".gz" else path
    return _READERS.get(stem.suffix.lower())


def _jsonl(path: Path, direct: bool) -> Found:
    with _open(path) as stream:
        yield from _json_lines(iter(lambda: stream.readline(_MAX_LINE), b""))


def _json_lines(lines: Iterable[bytes]) -> Found:
    number, rest_of_line = 0, False
    for raw in lines:
        too_long = len(raw) == _MAX_LINE and not raw.endswith(b"\n")
        if not rest_of_line:
            number += 1
            if too_long:
                yield number, Refused("line_too_long", f"longer than {_MAX_LINE:,} bytes")
            elif raw.strip():
                yield number, _row(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        rest_of_line = too_long


def _row(raw: bytes) -> dict | Refused:
    try:
        row = parse_json(decode_utf8(raw).rstrip("\r\n"))
    except Refused as bad:
        return bad
    return row if isinstance(row, dict) else Refused("not_an_object", f"{kind_name(row)}, not an object with fields")


def _json(path: Path, direct: bool) -> Found:
    with _open(path) as stream:
        yield from json_rows(stream, _json_lines)


def _separated(separator: str) -> Callable[[Path, bool], Found]:
    def rows(path: Path, direct: bool) -> Found:
        csv.field_size_limit(1 << 30)
        with _open(path) as stream:
            lines = _Lines(stream)
            records = csv.reader(lines, delimiter=separator, strict=True)
            try:
                header = next(records, None)
                if not header or not any(header):
                    raise Refused("no_header", "no header line with the names of the columns", "Add one.")
                for number, values in _numbered(records, lines):
                    if len(values) == len(header):
                        yield number, {name: value or None for name, value in zip(header, values, strict=True)}
                    elif values:
                        detail = f"{len(values)} fields under {len(header)} names"
                        yield number, Refused("wrong_number_of_fields", detail)
            except csv.Error as error:  # a quote that never closes: what follows cannot be told apart
                raise Refused("not_csv", f"not CSV ({error}, line {lines.number:,})") from None

    return rows


class _Lines:
    """Decoded lines of a file, and the number of the last one."""

    def __init__(self, stream: IO[bytes]):
        self.number = 0
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        for raw in self._stream:
            self.number += 1
            yield decode_utf8(raw.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else raw)


def _numbered(records: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it starts (a quoted field may go over several)."""
    start = lines.number + 1
    for values in records:
        yield start, values
        start = lines.number + 1


def _parquet(path: Path, direct: bool) -> Found:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow", where=show(path), fix="pip install pyarrow") from None
    with _open(path) as stream:
        try:
            # Parquet is read from its end, which a compressed file has only when it was read whole.
            packed = path.suffix.lower() == ".gz"
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read()) if packed else stream)
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except pyarrow.ArrowException as error:
            problem = " ".join(str(error).split())[:200]
            raise Refused("not_parquet", f"not a whole Parquet file ({problem})", "Fetch or write it again.") from None


def _text(path: Path, direct: bool) -> Found:
    with _open(path) as stream:
        text = decode_utf8(stream.read().removeprefix(b"\xef\xbb\xbf"))
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
    ".parquet": _parquet, ".txt": _text, ".text": _text,
}  # fmt: skip


def _is_dataset(source: Source) -> bool:
    root = Path(source.path)
    if root.is_dir():
        return any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return not root.exists() and _HUB_NAME.fullmatch(source.path) is not None and _reader(root) is None


def _dataset_rows(source: Source, quarantine: Quarantine) -> Rows:
    for number, row in enumerate(_dataset(source), 1):
        yield f"{source.path}:{number}", row


def _dataset(source: Source) -> Any:
    """The split of a Hugging Face dataset, from a folder that it was saved to or from the hub (no code of its runs)."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError("Hugging Face datasets need the datasets package", where=source.path,
                        fix="pip install datasets") from None  # fmt: skip
    split = source.split or "train"
    try:
        if Path(source.path).is_dir():
            found = datasets.load_from_disk(source.path)
        else:
            found = datasets.load_dataset(source.path, source.name, split=split)
    except (OSError, ValueError, RuntimeError, LookupError, DatasetsError) as error:
        problem = " ".join(str(error).split())[:200]
        fix = "Check its name and the network, or download it and give the folder."
        raise UserError(f"cannot load the dataset ({problem})", where=source.path, fix=fix) from None
    if not isinstance(found, dict):
        return found
    if split not in found:
        problem = f"no split {split!r} (there are {', '.join(map(str, found))})"
        raise UserError(problem, where=source.path, fix="Set the source's split.")
    return found[split]
