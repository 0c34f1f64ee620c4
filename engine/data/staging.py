"""A directory that appears whole or not at all: built beside its place, renamed into it at the end.

For an output ``NAME`` the siblings are ``.NAME.preparing`` (being built, and locked by its builder) and
``.NAME.replaced`` (the former one, for the instant between the two renames of a replacement).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine import disk
from engine.errors import UserError


def _sibling(output: Path, role: str) -> Path:
    output = output.resolve()
    return output.with_name(f".{output.name}.{role}")


def folder_of(output: Path) -> Path:
    """Where ``output`` is built."""
    return _sibling(output, "preparing")


def places_of(output: Path) -> set[Path]:
    """``output`` and its siblings, resolved: what is never input."""
    return {output.resolve(), folder_of(output), _sibling(output, "replaced")}


@contextlib.contextmanager
def locked(output: Path) -> Iterator[Path]:
    """``folder_of(output)``, which nobody else works in meanwhile, with what an earlier run left in it.

    It stays afterwards, unless it is empty or was removed. Raises UserError if another process has it.
    """
    folder = folder_of(output)
    lock = _locked(folder, output)
    try:
        yield folder
    finally:
        if _is_same(folder, lock):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        os.close(lock)


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """An empty directory to build in. Gone afterwards, unless `publish` moved it; what a kill left is removed first.

    Raises UserError if another process is building the same output.
    """
    with locked(output) as folder:
        _clear(folder)
        identity = folder.stat()
        try:
            yield folder
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(folder.stat(), identity):
                    shutil.rmtree(folder, ignore_errors=True)


def discard(output: Path) -> None:
    """Removes what a killed run left to go on with, unless somebody is at work in it."""
    if folder_of(output).exists():
        with contextlib.suppress(UserError), locked(output) as folder:
            _clear(folder)


def publish(folder: Path, output: Path) -> None:
    """Put ``folder`` in the place of ``output``, whatever was there. On disk when this returns."""
    for path in [*folder.rglob("*"), folder]:
        disk.sync(path)
    replaced, output = _sibling(output, "replaced"), output.resolve()  # a link to a directory stays a link
    if output.exists():
        os.rename(output, replaced)
    os.rename(folder, output)
    disk.sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(output: Path) -> None:
    """Bring back the former output where a kill hit between the two renames of `publish`."""
    replaced = _sibling(output, "replaced")
    if not replaced.exists():
        return
    with locked(output):  # nobody is between the two renames now
        if replaced.exists() and not output.exists():
            os.rename(replaced, output.resolve())
        shutil.rmtree(replaced, ignore_errors=True)


def _locked(folder: Path, output: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            fix = "Wait for it, or choose another --output."
            raise UserError("another process is preparing this very directory", where=str(output), fix=fix) from None
        if _is_same(folder, lock):
            return lock
        os.close(lock)  # its builder finished between our two calls


def _is_same(folder: Path, lock: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
