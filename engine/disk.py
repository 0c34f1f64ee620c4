"""What several rooms do with files: flush them to the disk, and identify them by content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK = 1 << 20


def sync(path: Path) -> None:
    """Flushes a file, or a directory's entries (renames in it), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of the content, in hexadecimal; the file is never held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_range(path: Path, start: int, end: int | None) -> str:
    """Of the bytes from ``start`` to ``end`` (None: the file's), or as many as there are."""
    digest, left = hashlib.sha256(), None if end is None else end - start
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK if left is None else min(_CHUNK, left)):
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
    return digest.hexdigest()
