"""The folder of entries: each made by one process under a lock, complete or not there; the others wait and map it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine import disk
from engine.data.examples import store
from engine.errors import UserError

log = logging.getLogger(__name__)


def entry(folder: Path, key: dict[str, Any], parts: int, fill: Callable[[store.Writer], dict[str, Any]]
          ) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of the entry for ``key``; made by ``fill(writer)`` -> more of the manifest, if there is none.

    A damaged entry is made anew. Raises ``UserError`` when the folder cannot be written; what ``fill`` raises leaves
    nothing behind.
    """
    place = folder / store.key_hash(key)[:24]
    manifest, problem = store.read_manifest(place, key)
    if manifest is not None:
        return place, manifest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{place.name}.lock") as alone:
            manifest, problem = store.read_manifest(place, key)  # another process may have made it while we waited
            if manifest is None:
                if problem:
                    log.warning("%s: %s; tokenizing the examples again", place, problem)
                _make(place, key, parts, fill, alone)
                manifest, problem = store.read_manifest(place, key)
    except OSError as error:
        raise UserError(f"tokenized examples cannot be written: {error.strerror or error}", where=str(folder),
                        fix="Free space there, or set examples.cache_dir to a writable folder") from error
    if manifest is None:
        raise UserError(f"was written and then {problem or 'gone'}", where=str(place), fix="Check the disk")
    return place, manifest


def _make(place: Path, key: dict[str, Any], parts: int, fill: Callable[[store.Writer], dict[str, Any]],
          alone: bool) -> None:
    if alone:  # whoever wrote these was killed
        for leftover in place.parent.glob(f"{place.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = place.with_name(f"{place.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with contextlib.closing(store.Writer(temporary, parts)) as writer:
            writer.finish(key, fill(writer))
        if place.exists():  # damaged, or of another version; or another process without locks was faster
            if store.read_manifest(place, key)[0] is not None:
                return
            shutil.rmtree(place)
        temporary.rename(place)
        disk.sync(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """-> whether we are alone. Without locks on this file system every process works, and the first rename wins."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield False
        return
    with open(path, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
                break
            except BlockingIOError:  # its holder is at work; a death, and engine.parallel.watch, end the wait
                time.sleep(0.05)
            except OSError:
                alone = False
                break
        yield alone
