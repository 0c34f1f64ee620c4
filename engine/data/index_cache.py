"""A folder of integer arrays keyed by content, shared by all processes that want the same one.

A file is: 8 bytes magic, SHA-256 of the rest (32), key length (u64), the key in full, zeros up to a multiple of 64,
then little-endian int64s. It is written under another name, synced and renamed, and read only if the size, the key
and the checksum are right; anything else is built anew. So a kill, a full disk or a flipped bit costs time, never
a wrong order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from engine.errors import UserError

_MAGIC = b"MSIDXC01"
_DIGEST = slice(8, 40)
_LOCK_SECONDS = 60.0  # then a process builds by itself: a stopped lock holder must not stop the others
_STALE_SECONDS = 3600.0
_TEMPORARY = re.compile(r"\.(groups|verified)\.\d+\.tmp$")  # ours: the folder may be one that others use as well
log = logging.getLogger(__name__)


def default_folder(beside: Path) -> Path | None:
    """`index_cache` in the prepared directory if we can write there, else in the user's cache folder; None for a user
    without a home, as containers have them."""
    folder = beside / "index_cache"
    if os.access(folder if folder.is_dir() else beside, os.W_OK):
        return folder
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mainspring" / "index_cache"
    except RuntimeError:
        return None


class IndexCache:
    """int64 arrays on disk. ``folder`` None keeps everything in memory."""

    def __init__(self, folder: Path | None, *, required: bool = False):
        """``required``: the user named this folder, so not being able to write it is a UserError."""
        self.folder = folder
        self._required = required

    def load_or_build(
        self, name: str, key: dict[str, object], length: int, build: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """The array [length] for ``key``, read-only: from `name` in the folder, or from ``build()`` and then stored."""
        if self.folder is None:
            return build()
        path, header = self.folder / name, _header(key)
        found = _read(path, header, length)
        if found is not None:
            return found
        values = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(self.folder):
                found = _read(path, header, length)  # another process may have built it while we waited
                if found is None:
                    values = build()
                    assert (values.dtype, values.shape) == (np.int64, (length,))
                    _write(path, header, values)
                    found = _read(path, header, length)  # the mapping is shared between processes, the array is not
        except OSError as error:
            if self._required:
                raise UserError(f"cannot write the index cache: {error.strerror}", where=str(self.folder),
                                fix="Free space there, or set data.cache_dir to a writable folder") from None
            log.warning("%s: cannot write the index cache (%s); the index stays in memory", self.folder, error.strerror)
        if found is not None:
            return found
        return build() if values is None else values


def _header(key: dict[str, object]) -> bytes:
    text = json.dumps(key, sort_keys=True).encode()
    body = len(text).to_bytes(8, "little") + text
    return body + bytes(-(40 + len(body)) % 64)


def _read(path: Path, header: bytes, length: int) -> np.ndarray | None:
    """The array if the file is whole and has this key, else None (with a warning if there is a file at all)."""
    try:
        content = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        log.warning("%s: index cache unreadable (%s), building it again", path, error)
        return None
    start = 40 + len(header)
    whole = (
        len(content) == start + 8 * length
        and content[:8].tobytes() == _MAGIC
        and content[40:start].tobytes() == header
        and hashlib.sha256(content[40:].data).digest() == content[_DIGEST].tobytes()
    )
    if not whole:
        log.warning("%s: index cache damaged or incomplete, building it again", path)
        return None
    return np.frombuffer(content, "<i8", length, start)


def _write(path: Path, header: bytes, values: np.ndarray) -> None:
    _remove_stale(path.parent)
    temporary = path.with_name(f"{path.name}.{secrets.randbits(64)}.tmp")  # containers share process numbers
    body = values.astype("<i8", copy=False)
    digest = hashlib.sha256(header)
    digest.update(body.data)
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + digest.digest() + header)
            file.write(body.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale(folder: Path) -> None:
    """Temporary files of processes that were killed while writing."""
    for leftover in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process removes it too, or it is another user's
            if _TEMPORARY.search(leftover.name) and time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One builder at a time where the file system has locks. Only saves work: the result is right without it."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield
        return
    try:
        file = open(folder / ".lock", "ab")  # noqa: SIM115 - closed below
    except OSError:  # another user's; whether the folder can be written shows when it is written
        yield
        return
    with file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield  # closing the file releases the lock, and so does the death of the process
