"""A worker process of `pool`: tasks come as lines on its standard input, what became of them goes out as lines.

In: {"step", "task", "threads"}. Out: {"bytes"} while it works, then one of {"done"}, {"user_error"}, {"os_error"},
{"bug"}. When its input ends, its parent is gone, and it ends at once, in the middle of whatever it does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from engine.data.preparing.context import Context
from engine.data.preparing.job import Job
from engine.data.preparing.steps import step_named
from engine.errors import Interrupted, UserError

_REPORT_SECONDS = 0.2


def main(folder: str) -> None:
    """Serves until its input ends."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    job = Job(Path(folder))
    while True:
        request = json.loads(requests.get())
        _say(answers, _do(job, request, answers))


def _listen(requests: queue.Queue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _do(job: Job, request: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    report = _Report(answers)
    try:
        step_named(request["step"]).run(job, request["task"], Context(request["threads"], report.add))
    except UserError as error:
        return {"user_error": str(error), "interrupted": isinstance(error, Interrupted)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror or str(error), os.fspath(error.filename or "")]}
    except MemoryError:
        return {"user_error": "out of memory. Lower --workers or --unit_mb", "interrupted": True}
    except Exception:
        return {"bug": traceback.format_exc()}
    report.send()
    return {"done": True}


class _Report:
    """Sums up bytes and says them a few times a second."""

    def __init__(self, answers: TextIO):
        self._answers = answers
        self._bytes = 0
        self._next = time.monotonic() + _REPORT_SECONDS

    def add(self, size: int) -> None:
        self._bytes += size
        if time.monotonic() >= self._next:
            self.send()

    def send(self) -> None:
        self._next = time.monotonic() + _REPORT_SECONDS
        _say(self._answers, {"bytes": self._bytes})
        self._bytes = 0


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    try:
        answers.write(json.dumps(what) + "\n")
        answers.flush()
    except BrokenPipeError:  # the parent is gone, and who reads this has no use for a traceback
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
