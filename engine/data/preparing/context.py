"""What a task is told besides its number: how many threads it may use, and who wants to know how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_STEP_BYTES = 1 << 18


@dataclass
class Context:
    """``report(bytes)`` is called with each further quarter megabyte of a task's input that is done."""

    threads: int = 1
    report: Callable[[int], None] = lambda size: None
    _said: int = field(default=0, init=False)

    def progress(self, size: int) -> None:
        """``size`` bytes of the current piece (a file, a batch) are done."""
        if size - self._said >= _STEP_BYTES:
            self.report(size - self._said)
            self._said = size

    def finished(self, size: int) -> None:
        """The current piece of ``size`` bytes is done; the next starts at 0."""
        if size > self._said:
            self.report(size - self._said)
        self._said = 0
