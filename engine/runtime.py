"""What every command shares: one-line errors, exit codes, and the process's memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from engine.errors import UserError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks for the next step instead of returning them to the kernel.

    By default each tensor above 32 MiB is mapped anew and zeroed page by page by the kernel: a third of a CPU training
    step at a vocabulary of 8,192. Elsewhere than on Linux with glibc nothing happens.
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


def _fail(line: str, code: int) -> None:
    """Ends this process with one line. In a group of ranks the first rank speaks first, and only once for all.

    All ranks mostly fail alike: rank 0 prints, torchrun then ends the others while they wait. A rank that fails alone
    prints after the wait; the others hang in a collective and are ended by torchrun.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(2.0)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)  # destructors of process groups may wait for ranks that are gone
    sys.exit(code)


def command(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command line: ``UserError`` becomes one line on stderr and exit code 2; ``--debug`` shows the traceback."""
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    keep_freed_memory()
    quiet_libraries()
    with contextlib.suppress(ValueError, AttributeError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `mainspring … | head` ends quietly
    try:
        return main(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        _fail(f"error: {error}", UserError.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; the last checkpoint is intact", 130)
    return 1
