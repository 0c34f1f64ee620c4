"""Real text of this machine: source code and documentation of the installed packages, in a fixed order."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".html", ".json", ".js", ".css"}
_PLACES = (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")), Path("/usr/share"),
           Path("/usr/include"), Path("/usr/lib/gcc"))
_LARGEST = 1_000_000  # bytes of a file


def files() -> Iterator[Path]:
    """Text files below the usual places, each once, sorted within a place."""
    seen = set()
    for place in _PLACES:
        for path in sorted(place.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file() and not path.is_symlink() and path not in seen:
                seen.add(path)
                if 0 < path.stat().st_size <= _LARGEST:
                    yield path


def texts(size: int) -> Iterator[str]:
    """Documents of ``size`` bytes of UTF-8 in all. Begins again, each with the round's number before it, at the end."""
    total, turn = 0, 0
    while True:
        before = total
        for path in files():
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            text = f"# {turn}\n{text}" if turn else text
            total += len(text.encode())
            yield text
            if total >= size:
                return
        assert total > before, "this machine has no text"
        turn += 1


def write_jsonl(path: Path, size: int) -> int:
    """About ``size`` bytes of text as records with a field ``text``. Returns the bytes of the file."""
    with open(path, "w", encoding="utf-8") as out:
        for text in texts(size):
            out.write(json.dumps({"text": text}) + "\n")
    return path.stat().st_size
