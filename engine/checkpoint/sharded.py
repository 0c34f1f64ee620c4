"""Weights and optimizer state as Megatron's distributed checkpoint: saved under one layout, loaded under any."""

from __future__ import annotations

import contextlib
import copy
import queue
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from engine.errors import UserError
from engine.parallel import cpu
from engine.parallel.topology import Groups
from engine.parallel.wrap import gather_parameters, unwrap

# The only optimizer format of Megatron that loads under another tensor, pipeline and data-parallel size.
_FORMAT = "fully_reshardable"


class _Failures:
    """What could not be written on this rank. The collective calls of a save go on after it, so that no rank waits for
    another in vain; then it is raised."""

    def __init__(self):
        self.first: Exception | None = None

    def guard(self, write: Callable) -> Callable:
        def guarded(*args, **kwargs):
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
                self.first = self.first or error

        return guarded

    def raise_first(self) -> None:
        if isinstance(self.first, OSError):
            raise self.first
        if self.first is not None:
            raise OSError(str(self.first)) from self.first


@contextlib.contextmanager
def _guarded_rank_0(failures: _Failures) -> Iterator[None]:
    """Within, the small files that rank 0 alone writes outside the strategy (common.pt, metadata.json) are guarded."""
    megatron: Any = serialization  # its save() takes no common strategy of ours
    saved = megatron.get_default_save_common_strategy, megatron.save_config
    common: Any = saved[0]()
    guarded = copy.copy(common)
    guarded.save_common = failures.guard(common.save_common)
    megatron.get_default_save_common_strategy = lambda: guarded
    megatron.save_config = failures.guard(saved[1])
    try:
        yield
    finally:
        megatron.get_default_save_common_strategy, megatron.save_config = saved


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by this process.

    Megatron writes through forked workers and a spawned manager, which imports the main script anew: seconds a save,
    a ``__main__`` guard in every script, and orphans after a kill.
    """

    def __init__(self, failures: _Failures):
        super().__init__("torch_dist", 1, thread_count=1)
        self.failures = failures

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret) -> AsyncRequest:
        writer.finish = self.failures.guard(writer.finish)  # rank 0's .metadata
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        no_counter = types.SimpleNamespace(get=lambda: None, task_done=lambda: None)

        def write(rank, write_buckets, results_queue) -> None:
            results = {}
            for i, bucket in enumerate(write_buckets):
                local = queue.SimpleQueue()
                writer.write_preloaded_data(transforms, i, bucket, local, no_counter, use_fsync=True)
                _, outcome = local.get()
                if isinstance(outcome, Exception):
                    self.failures.first = self.failures.first or outcome
                    outcome = []
                results[i] = outcome
            results_queue.put(results)

        return request._replace(async_fn=write)


def _state_dict(chunks, optimizer, groups: Groups, *, is_loading: bool) -> dict:
    if groups.device.type != "cuda":
        cpu.install()  # megatron's checkpointing may have been imported after the groups were built
    metadata = {
        "distrib_optim_sharding_type": _FORMAT,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.pg.dp_cp,
    }
    bare = [unwrap(chunk) for chunk in chunks]
    names = ["model"] if len(bare) == 1 else [f"model{i}" for i in range(len(bare))]
    state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, bare, strict=True)}
    if optimizer is not None:
        with cpu.cuda_type_names():
            state["optimizer"] = optimizer.sharded_state_dict(state["model"] if len(bare) == 1 else state,
                                                              is_loading=is_loading, metadata=metadata)
    return state


def save(directory: Path, chunks, optimizer, groups: Groups) -> None:
    """Writes this rank's part into an existing empty directory. Collective over all ranks.

    Raises ``OSError`` on a rank that could not write, after its last collective call.
    """
    filesystem_async._results_queue = queue.SimpleQueue()  # in place of the spawned manager's
    failures = _Failures()
    gather_parameters(chunks)
    with _guarded_rank_0(failures):
        dist_checkpointing.save(_state_dict(chunks, optimizer, groups, is_loading=False), str(directory),
                                sharded_strategy=InProcessSave(failures))
    failures.raise_first()


def _explain(error: BaseException, directory: Path) -> UserError:
    if isinstance(error, CheckpointException):  # what each rank that failed said, with its traceback
        error = next((Exception(reason) for reason, _ in error.failures.values()), Exception("see rank 0"))
    text = " ".join(str(error).split())
    return UserError(f"does not fit this model: {text[:300]}", where=str(directory.parent),
                     fix="Load it with the model section of its own config.yaml")


def load(directory: Path, chunks, optimizer, groups: Groups) -> None:
    """Loads weights, and the optimizer's state unless it is None, whatever layout they were saved under.

    Raises ``UserError`` when the checkpoint holds another model: a tensor that is missing, left over, or of another
    shape.
    """
    wanted = _state_dict(chunks, optimizer, groups, is_loading=True)
    # Without an optimizer its tensors in the checkpoint are left over by intention.
    strict = StrictHandling.RAISE_ALL if optimizer is not None else StrictHandling.RAISE_UNEXPECTED
    try:
        loaded: Any = dist_checkpointing.load(wanted, str(directory), strict=strict)
    except (CheckpointingException, CheckpointException, KeyError, ValueError, RuntimeError) as error:
        raise _explain(error, directory) from error
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
