"""Weights and optimizer state as Megatron's distributed checkpoint: saved under one layout, loaded under any."""

from __future__ import annotations

import queue
import types
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling

from engine.errors import UserError
from engine.parallel import cpu
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap

# The only optimizer format of Megatron that loads under another tensor, pipeline and data-parallel size.
_FORMAT = "fully_reshardable"


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by this process.

    Megatron writes through forked workers and a spawned manager, which imports the main script anew: seconds a save,
    a ``__main__`` guard in every script, and orphans after a kill.
    """

    def __init__(self):
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret) -> AsyncRequest:
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
                    results = outcome
                    break
                results[i] = outcome
            results_queue.put(results)

        return request._replace(async_fn=write)


def _state_dict(chunks, optimizer, groups: Groups, *, is_loading: bool) -> dict:
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
    """Writes this rank's part into an existing empty directory. Collective over all ranks."""
    filesystem_async._results_queue = queue.SimpleQueue()  # in place of the spawned manager's
    dist_checkpointing.save(_state_dict(chunks, optimizer, groups, is_loading=False), str(directory),
                            sharded_strategy=InProcessSave())


def _explain(error: Exception, directory: Path) -> UserError:
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
        loaded = dist_checkpointing.load(wanted, str(directory), strict=strict)
    except (dist_checkpointing.core.CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        raise _explain(error, directory) from error
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
