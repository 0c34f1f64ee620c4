"""`mainspring prepare`: raw files -> cleaned, deduplicated, split, tokenized, written.

The work itself is the list `engine.data.preparing.steps.STEPS`. Here: what is there already, the lock, the folder that
a killed run goes on in, the executor, and the one rename at the end.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.config.prepare import PrepareConfig
from engine.data import manifest as manifests
from engine.data import staging
from engine.data.cleaning import Cleaner
from engine.data.preparing import finish, job, local
from engine.data.preparing.job import Job
from engine.data.preparing.log import StepLog
from engine.data.sources import Listing, list_files, show
from engine.data.tokenizer import load_tokenizer
from engine.data.units import plan_units
from engine.errors import Interrupted, UserError

Log = Callable[[str], None]


def silent(line: str) -> None:
    """Where nobody wants to know."""


def prepare(
    config: PrepareConfig, *, log: Log = silent, progress: Log = silent, execute: Callable[[Job], None] | None = None
) -> dict[str, Any]:
    """Make ``config.output`` and return its manifest; one that is there, unchanged and whole, is reused.

    ``log`` gets a line for each thing done, ``progress`` many short ones. ``execute(job)`` does all steps in another
    way than `local.run`. Raises UserError with nothing half-written; where this or a worker process is killed, the same
    call goes on with what was finished.
    """
    with as_user_error(config.output):
        found = _found(config, log)
        if isinstance(found, dict):
            return found
        with staging.locked(config.output) as folder, _removed_on_error(folder):
            started = _begin(config, folder, *found, log)
            steps = StepLog(started, log)
            if execute is None:
                local.run(started, finished=steps.finished, progress=progress)
            else:
                execute(started)
                steps.all_finished()
            staging.publish(finish.assemble(started), config.output)
            shutil.rmtree(folder)
    return manifests.load(config.output)


def begin(config: PrepareConfig, *, log: Log = silent) -> Job | dict[str, Any]:
    """Only the plan, for an executor that this call does not wait for; `prepare` finishes when all steps are done.

    Returns the manifest instead, where nothing is to be done.
    """
    with as_user_error(config.output):
        found = _found(config, log)
        if isinstance(found, dict):
            return found
        with staging.locked(config.output) as folder, _removed_on_error(folder):
            return _begin(config, folder, *found, log)


def _found(config: PrepareConfig, log: Log) -> dict[str, Any] | tuple[Listing, dict[str, Any]]:
    """The manifest of an output that can be used as it is, or the files to read and the manifest's settings."""
    Cleaner.of(config)  # an unknown rule is an error before anything is read
    staging.recover(config.output)
    _check_place(config)
    listing = list_files(config)
    tokenizer = load_tokenizer(config.tokenizer, eod_token=config.eod_token) if config.tokenizer else None
    settings = manifests.settings_of(config, tokenizer)
    if manifests.is_prepared(config.output) and not config.overwrite:
        return _reuse(config, listing, settings, log)
    return listing, settings


def _begin(config: PrepareConfig, folder: Path, listing: Listing, settings: dict[str, Any], log: Log) -> Job:
    if listing.links_skipped:
        log(f"{listing.links_skipped:,} symbolic links were not followed (--follow_symlinks)")
    started, goes_on = job.begin(folder, config, settings, listing)
    if goes_on:
        log(f"goes on with what an earlier run finished in {show(folder)}")
    return started


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """What another try cannot use is removed. Not so where a worker or this process is stopped in good work."""
    try:
        yield
    except Interrupted:
        raise
    except (UserError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_place(config: PrepareConfig) -> None:
    output, fix = config.output, "Choose another --output."
    for source in [*config.input, *([config.tokenizer] if config.tokenizer else [])]:
        if output.resolve() in [source.resolve(), *source.resolve().parents]:
            raise UserError(f"holds the input {show(source)}", where=show(output), fix=fix)
    if output.exists() and not output.is_dir():
        raise UserError("is a file", where=show(output), fix=fix)
    if output.is_dir() and any(output.iterdir()) and not manifests.is_prepared(output):
        raise UserError("exists and is not a prepared directory", where=show(output), fix=f"{fix[:-1]}, or empty it.")


def _reuse(config: PrepareConfig, listing: Listing, settings: dict, log: Log) -> dict[str, Any]:
    manifest = manifests.load(config.output)
    sources = manifests.current_sources([piece for unit in plan_units(listing, config) for piece in unit.slices])
    found = manifests.changes(manifest, manifests.load_sources(config.output), settings, sources)
    if found:
        raise UserError(
            f"exists and was prepared from something else: {'; '.join(found)}",
            where=show(config.output), fix="Replace it with --overwrite, or choose another --output.",
        )  # fmt: skip
    manifests.verify(config.output, manifest)
    staging.discard(config.output)
    log(f"{show(config.output)}: prepared before from the same input and settings, used as it is")
    return manifest


@contextlib.contextmanager
def as_user_error(output: Path) -> Iterator[None]:
    # The reader quarantines what it cannot read; what comes here is mostly writing: no space, no permission.
    try:
        yield
    except OSError as error:
        raise UserError(
            error.strerror or str(error), where=show(error.filename or output),
            fix=f"Free space or mend permissions there, or choose another --output; {show(output)} is as it was.",
        ) from error  # fmt: skip


class Console:
    """Lines on stderr; progress overwrites itself on a terminal and is a line every ten seconds in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._unfinished = False  # the cursor stands behind a line of progress
        self._next = time.monotonic() + (0 if self._terminal else 10)

    def progress(self, line: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + (0.2 if self._terminal else 10)
            start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            print(start + line, end=end, file=sys.stderr, flush=True)
            self._unfinished = self._terminal

    def log(self, line: str) -> None:
        self.close()
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the line of progress away, before others write."""
        if self._unfinished:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._unfinished = False


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config = parse(PrepareConfig, argv, prog="mainspring prepare")
    from engine.data.cluster import executors

    console = Console()
    if config.executor == "slurm":
        return executors.on_slurm(config, console.log)
    try:
        manifest = prepare(config, log=console.log, progress=console.progress, execute=executors.executor(config))
    finally:
        console.close()
    for split, numbers in manifest["splits"].items():
        print(f"{split}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens")
    vocabulary = f"vocabulary {manifest['vocab_size']:,}, tokenizer {manifest['tokenizer_sha256'][:12]}"
    print(f"{show(config.output)}: {vocabulary}")
    return 0
