"""What the tests of reading share: a configuration, a folder of files, and everything a reader says of it."""

from __future__ import annotations

import io
import json

from engine.config.prepare import PrepareConfig
from engine.data.quarantine import Quarantine
from engine.data.reading import Reader
from engine.data.sources import list_files
from engine.data.units import LineNumbers, plan_units


def config(*inputs, **settings) -> PrepareConfig:
    return PrepareConfig(input=list(inputs), **{"output": inputs[0].parent / "out"} | settings)


def tree(root, *names):
    """A folder with these files, each with a text of its own."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return root


def read(cfg) -> tuple[list[tuple[str, str]], list[dict], Reader]:
    """(place, text) of all documents, the items of the quarantine, and the reader; unit by unit, as `prepare` does."""
    stream = io.StringIO()
    reader = Reader(cfg, Quarantine(stream))
    pieces = [piece for unit in plan_units(list_files(cfg), cfg) for piece in unit.slices]
    documents, lines = [], []
    for piece in pieces:
        documents += [(document.source, document.text) for document in reader.read(piece)]
        lines.append((piece, reader.lines))
    numbers = LineNumbers(lines)
    items = [numbers.item(json.loads(line)) for line in stream.getvalue().splitlines()]
    return [(numbers.place(place), text) for place, text in documents], items, reader


def refused(items) -> list[tuple[int | None, str]]:
    """Row and reason of the items of a quarantine."""
    return [(item["line"], item["reason"]) for item in items]


def write(root, name, content):
    """A file of this content in a folder that may have to be made."""
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root / name


def rows_of(documents) -> list[tuple[int, str]]:
    """(row, text) of what `read` found."""
    return [(int(place.rpartition(":")[2]), text) for place, text in documents]
