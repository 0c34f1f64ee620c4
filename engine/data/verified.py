"""What full checks of files found, remembered on disk, so that the next start does not read them again.

A file is the one that was checked when its device, inode, size, modification and change time are the same, and when it
had been left alone for some seconds before the check began: a write in the same tick of the file system's clock as the
check shows in none of these (git's racy rule). Anything else is checked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from pathlib import Path

from engine import _index

_QUIET_NS = 2 * 10**9  # the coarsest clock of a file system in use (FAT's) ticks every two seconds
log = logging.getLogger(__name__)


def now_ns() -> int:
    """Nanoseconds since 1970: take it before a check begins."""
    return time.time_ns()


class Verified:
    """The findings for the files of one dataset. ``folder`` None remembers nothing."""

    def __init__(self, folder: Path | None, prefix: str | os.PathLike[str]):
        name = hashlib.sha256(os.fsencode(os.path.realpath(prefix))).hexdigest()[:24]
        self._path = None if folder is None else folder / f"{name}.verified"
        self._known = {} if self._path is None else _read(self._path)
        self._changed = False

    def recall(self, path: Path, map: _index.Map) -> dict:
        """What was noted of this very file; empty when nothing was, or it may have changed since."""
        identity, found = self._known.get(os.path.realpath(path), (None, {}))
        return found if identity == list(map.identity) else {}

    def note(self, path: Path, map: _index.Map, found: dict, began_ns: int) -> None:
        """Adds what a check found that began at ``began_ns``."""
        if self._path is None or map.identity[-1] + _QUIET_NS >= began_ns or not map.unchanged():
            return
        real = os.path.realpath(path)
        self._known[real] = (list(map.identity), {**self.recall(path, map), **found})
        self._changed = True

    def save(self) -> None:
        """Writes what was noted, if anything was. A folder that cannot be written costs time, nothing else."""
        if self._path is None or not self._changed:
            return
        body = json.dumps(self._known, sort_keys=True)
        temporary = self._path.with_name(f"{self._path.name}.{secrets.randbits(64)}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"sha256": _sha256(body), "files": body}))
            os.replace(temporary, self._path)
        except OSError as error:
            log.debug("%s: what was checked is not remembered (%s)", self._path.parent, error.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._changed = False


def _read(path: Path) -> dict:
    """The findings of a whole file of ours, else none: files are checked then."""
    try:
        saved = json.loads(path.read_bytes())
        return json.loads(saved["files"]) if saved["sha256"] == _sha256(saved["files"]) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
