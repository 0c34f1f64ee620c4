"""What every command shares: one-line errors, exit codes, and the process's memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from engine import launch
from engine.errors import UserError

# How long a rank that fails early waits for rank 0 before it speaks, and then for somebody to tell.
_MEETING_SECONDS, _MEETING_MINUTES = 5, 2
_COLLECTIVE = re.compile(r"gloo|nccl|Dist\w*Error|connection (was )?(closed|reset)|timed out|broken pipe", re.I)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks for the next step instead of returning them to the kernel.

    By default each tensor above 32 MiB is mapped anew and zeroed page by page by the kernel, which took 30% of a CPU
    step that holds all logits of a vocabulary of 8,192. Elsewhere than on Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


def quiet_libraries() -> None:
    """Leaves out what Megatron and torch warn of without our users being able to mend it: optional packages that are
    absent, and classes of torch's that Megatron's checkpoints still use."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def _fail(line: str, code: int, *, details: str = "", kind: str = "own") -> NoReturn:
    """Ends this process, and with it all ranks, with one line (and ``details`` before it).

    Of a group of ranks only one speaks: see ``engine.parallel.watch``. A rank that fails before the ranks have met
    says so at once if it is rank 0; another waits for rank 0, which mostly fails alike.
    """
    if launch.world_size() == 1:
        print(details + line, file=sys.stderr, flush=True)
        sys.exit(code)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; the exit code shall be ours
    said, spoken = line.removeprefix("error: "), False
    if launch.rank():
        line = line.replace("error: ", f"error: rank {launch.rank()}: ", 1)
    try:
        from engine.parallel import watch

        if not watch.joined():
            spoken = launch.rank() == 0
            if spoken:
                print(details + line, file=sys.stderr, flush=True)
            spoken = _meet(details + line) or spoken
        watch.fail(details + line, said, code, kind=kind, spoken=spoken)
    except (ImportError, KeyError, UserError):  # torch, MASTER_ADDR or rank 0 is missing
        if not spoken and int(os.environ.get("LOCAL_RANK", "0")) <= 1:
            print(details + line, file=sys.stderr, flush=True)
    os._exit(code)  # destructors of process groups may wait for ranks that are gone


def _meet(text: str) -> bool:
    """Meets the others in order to tell them. -> whether this rank has spoken, because rank 0 took too long."""
    from engine.parallel import watch

    known = watch.unreachable
    try:
        watch.join(_MEETING_SECONDS / 60)
    except UserError:
        if launch.one_agent() or known:
            raise
        print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(UserError):
            watch.join(_MEETING_MINUTES)
            return True
        os._exit(UserError.exit_code)
    return False


def _is_consequence(error: Exception) -> bool:
    """Whether a collective broke or timed out, as when another rank has failed: torch has no one class for it."""
    return isinstance(error, (RuntimeError, OSError)) and bool(_COLLECTIVE.search(f"{type(error).__name__} {error}"))


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more (``mainspring … | head``)."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def command(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command line: ``UserError`` becomes a line on stderr and exit code 2; ``--debug`` shows the traceback."""
    debug = "--debug" in argv
    keep_freed_memory()
    quiet_libraries()
    try:
        launch.adopt()
        code = main([word for word in argv if word != "--debug"])
        sys.stdout.flush()
        return code
    except UserError as error:
        _fail(f"error: {error}", UserError.exit_code, details=traceback.format_exc() if debug else "")
    except KeyboardInterrupt:
        _fail("interrupted; what was finished before, checkpoints included, is intact", 130)
    except BrokenPipeError:  # not SIGPIPE's default action: it would also end a run whose W&B socket breaks
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if launch.world_size() == 1:
            raise
        summary = re.sub(r"\[/\S*\] ", "", " ".join(f"{type(error).__name__}: {error}".split()))  # paths in gloo
        if not _is_consequence(error):
            _fail(f"error: {summary}", 1, details=traceback.format_exc())
        from engine.parallel import watch

        place = watch.place_in(traceback.extract_tb(error.__traceback__))
        _fail(f"error: waited for the other ranks at {place}: {summary}", 1, kind="collective",
              details=traceback.format_exc() if debug else "")
