"""One step's processes: their output in a log and on the screen, their end when we are told to end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_TIMED_OUT = 124  # as timeout(1) says it


@dataclass(frozen=True)
class Ended:
    """``said``: the last line that tells why, of a step that failed."""

    code: int
    seconds: float
    said: str


def run(words: list[str], log: Path, *, environment: Mapping[str, str], stdout: Path | None = None,
        timeout: float | None = None, grace: float = 60.0, follow: bool = True) -> Ended:
    """Runs ``words`` to their end, everything they print appended to ``log`` (``stdout``, if given, to that file).

    ``timeout`` and ``grace`` in seconds. An interruption of this process ends the step's processes first: by SIGTERM,
    and after ``grace`` seconds by SIGKILL. What the children write goes to files, so that they outlive a full pipe.
    """
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, contextlib.ExitStack() as stack:
        begin = output.tell()
        out: Any = output
        if stdout is not None:
            stdout.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(stdout.open("wb"))
        variables = os.environ | {"PYTHONUNBUFFERED": "1", **_import_path(), **environment}
        child = subprocess.Popen(words, stdout=out, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                                 env=variables, preexec_fn=_end_with_us)
        reader = stack.enter_context(log.open("rb"))
        reader.seek(begin)
        late = False
        try:
            while child.poll() is None:
                _echo(reader, follow)
                if timeout is not None and time.monotonic() - start > timeout:
                    late = True
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            _end(child, grace)
            _echo(reader, follow)
    code = _TIMED_OUT if late else child.returncode
    said = f"took longer than {timeout:g} s" if late and timeout else _last_words(log, begin)
    return Ended(code, time.monotonic() - start, said)


def _import_path() -> dict[str, str]:
    """So that the step finds this engine too, where it is run from a checkout and not installed."""
    root = Path(__file__).resolve().parents[2]
    folders = [str(folder) for folder in (root, root / "kernels") if folder.is_dir()]
    return {"PYTHONPATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _end_with_us() -> None:
    """In the child, before it starts: when the pipeline is killed, SIGTERM comes here too (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _echo(reader: Any, follow: bool) -> None:
    found = reader.read()
    if found and follow:
        sys.stderr.write(found.decode("utf-8", "replace"))
        sys.stderr.flush()


def _end(child: subprocess.Popen, grace: float) -> None:
    """Ends the child and all its descendants: torchrun gives each rank a session of its own."""
    if child.poll() is not None:
        return
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    child.send_signal(signal.SIGTERM)  # torchrun passes it on to its ranks
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    finally:  # a second Ctrl-C does not wait
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.wait()


def _last_words(log: Path, begin: int) -> str:
    """Our own error line if there is one, else the last line that is not torchrun's frame."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    return (raised or lines or ["it printed nothing"])[-1][:400]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM (a scheduler's) as Ctrl-C: the step ends, promotions.json says so, and the next start goes on."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
