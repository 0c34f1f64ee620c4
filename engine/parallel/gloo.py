"""One network device a process for all its gloo groups.

Each gloo group that torch makes has a device of its own, whose thread polls a hundred times a second. A process holds
about twenty groups, even one that is alone: 2% of a core that does nothing, and of two nodes' worth of ranks on one
machine, all of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


@functools.cache
def _device(process: int) -> Any:
    """This process's device; a fork makes its own."""
    return _ProcessGroupGloo.create_default_device()


_ProcessGroupGloo: Any = dist.ProcessGroupGloo  # its options are not in torch's stubs


class _OnSharedDevice(_ProcessGroupGloo):
    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta):
        options = _ProcessGroupGloo._Options()
        options._devices = [_device(os.getpid())]
        options._threads = 2  # torch's own default
        options._timeout = timeout
        super().__init__(store, rank, size, options)


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Within, torch's new gloo groups share this process's device. Elsewhere torch is as it was."""
    original = distributed_c10d.ProcessGroupGloo
    distributed_c10d.ProcessGroupGloo = _OnSharedDevice
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = original
