"""What every command shares: one-line errors, exit codes, and the process's memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engine.errors import UserError

_CLAIM = "mainspring_error"  # the file by which a rank claims to speak
_PATIENCE_SECONDS = 3.0  # for rank 0 to fail as this rank did: what start-up differs by on a busy machine
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


def _claim() -> bool:
    """Whether this rank speaks for all: the first one that fails on a node does, the others would say the same.

    torchrun gives each attempt a temporary folder, in which the claim is a file; without torchrun every process speaks.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        (Path(error_file).parents[1] / _CLAIM).open("x").close()
    except FileExistsError:
        return False
    except OSError:
        return True  # two lines are better than none
    return True


def _claimed() -> bool:
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return bool(error_file) and (Path(error_file).parents[1] / _CLAIM).exists()


def _fail(line: str, code: int) -> NoReturn:
    """Ends this process with one line. Of a group of ranks only one speaks, rank 0 first.

    All ranks mostly fail alike: the others wait for rank 0 to say it. A rank that fails alone speaks after the wait,
    with its number; the others hang in a collective until torchrun ends them, which it does as soon as one has failed.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; the exit code shall be ours
        patience = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < patience and not _claimed():
            time.sleep(0.05)
        line = line.replace("error: ", f"error: rank {rank}: ", 1)
    if _claim():
        print(line, file=sys.stderr, flush=True)
    _leave(code)


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)  # destructors of process groups may wait for ranks that are gone
    sys.exit(code)


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
        code = main([word for word in argv if word != "--debug"])
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        _fail(f"error: {error}", UserError.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; what was finished before, checkpoints included, is intact", 130)
    except BrokenPipeError:  # not SIGPIPE's default action: it would also end a run whose W&B socket breaks
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception:
        if debug or not _claimed():
            raise
        _leave(UserError.exit_code)  # another rank has said what is wrong; here its absence broke a collective
