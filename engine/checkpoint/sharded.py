"""Weights and optimizer state as Megatron's distributed checkpoint: saved under one layout, loaded under any."""

from __future__ import annotations

import contextlib
import copy
import queue
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from engine.checkpoint import optimizer_state, quantized_base
from engine.errors import UserError
from engine.model import fp8, lora, quantized
from engine.parallel import cpu
from engine.parallel.topology import Groups
from engine.parallel.wrap import gather_parameters, unwrap


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


def _model_state(chunks, groups: Groups, *, base: bool = False) -> dict:
    """The model's tensors with their places in the unsplit ones. The chunk's number is in no key of the checkpoint.

    Of a model with adapters they alone, or with ``base`` all the others.
    """
    if groups.device.type != "cuda":
        cpu.install()  # megatron's checkpointing may have been imported after the groups were built
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.pg.dp_cp}
    with lora.detached(chunks) if base else contextlib.nullcontext():
        state = {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if base or not any(lora.adapters(chunks)):
        return state
    return {part: {key: value for key, value in tensors.items() if lora.is_adapter(key)}
            for part, tensors in state.items()}


def _fill_model(chunks, loaded: dict, *, base: bool) -> None:
    with lora.detached(chunks) if base else contextlib.nullcontext():
        partial = any(lora.adapters(chunks))
        for i, chunk in enumerate(chunks):
            found = unwrap(chunk).load_state_dict(loaded.get(f"model{i}", {}), strict=not partial)
            assert not found.unexpected_keys, found
            assert not any(map(lora.is_adapter, found.missing_keys)), found


def save(directory: Path, chunks, optimizer, groups: Groups) -> None:
    """Writes this rank's part into an existing empty directory. Collective over all ranks.

    Raises ``OSError`` on a rank that could not write, after its last collective call.
    """
    filesystem_async._results_queue = queue.SimpleQueue()  # in place of the spawned manager's
    failures = _Failures()
    gather_parameters(chunks)
    state = _model_state(chunks, groups)
    if optimizer is not None:  # imported weights have none
        state |= optimizer_state.to_save(optimizer, optimizer_state.by_parameter(state), groups)
    state["fp8"] = fp8.to_checkpoint(chunks)
    with _guarded_rank_0(failures):
        dist_checkpointing.save(state, str(directory), sharded_strategy=InProcessSave(failures))
    failures.raise_first()


def _explain(error: BaseException, directory: Path) -> UserError:
    if isinstance(error, CheckpointException):  # what each rank that failed said, with its traceback
        error = next((Exception(reason) for reason, _ in error.failures.values()), Exception("see rank 0"))
    text = " ".join(str(error).split())
    return UserError(f"does not fit this model: {text[:300]}", where=str(directory.parent),
                     fix="Load it with the model section of its own config.yaml")


def _read(directory: Path, wanted: dict) -> Any:
    try:
        return dist_checkpointing.load(wanted, str(directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    except (CheckpointingException, CheckpointException, KeyError, ValueError, RuntimeError) as error:
        raise _explain(error, directory) from error


def _stored_types(directory: Path) -> dict[str, torch.dtype | None]:
    """The keys of what a checkpoint holds, and of tensors the type."""
    try:
        found = serialization.load_sharded_metadata(str(directory)).values()
        return {value.key: getattr(value, "dtype", None) for value in found}
    except (CheckpointingException, CheckpointException, KeyError, ValueError, RuntimeError) as error:
        raise _explain(error, directory) from error


def _check_keys(asked: set[str], stored: set[str], spare: set[str], directory: Path, groups: Groups) -> None:
    """Refuses a checkpoint that lacks a tensor or, ``spare`` ones aside, holds one that no rank asks for.

    On all ranks alike: Megatron raises on the rank that lacks one, and the others wait for it.
    """
    gathered: list = [None] * groups.world_size
    dist.all_gather_object(gathered, asked)
    everything = set().union(*gathered)
    for problem, keys in (("holds no {}", everything - stored), ("holds a {} that is not here",
                                                                 stored - everything - spare)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"does not fit this model: it {problem.format(min(keys) + more)}",
                            where=str(directory.parent), fix="Load it with the model section of its own config.yaml")


def _is_base(directory: Path, stored: set[str], chunks, optimizer, groups: Groups) -> bool:
    """Whether the checkpoint is of the whole model that this one's adapters are beside."""
    adapted: list = [None] * groups.world_size
    dist.all_gather_object(adapted, any(lora.adapters(chunks)))
    of_adapters = any(map(lora.is_adapter, stored))
    if of_adapters and not any(adapted):
        raise UserError("holds adapters, not a model", where=str(directory.parent),
                        fix="Merge them into their base first: mainspring export --merge")
    if any(adapted) and not of_adapters and optimizer is not None:
        raise UserError("holds a model and no adapters, which this run trains", where=str(directory.parent),
                        fix="Start from it with --init_from, in another --output_dir")
    return any(adapted) and not of_adapters


def load(directory: Path, chunks, optimizer, groups: Groups) -> None:
    """Loads weights, and the optimizer's state unless it is None, whatever layout they were saved under.

    A run in fp32 goes on from the fp32 weights behind a checkpoint's 16-bit ones, and one in 16 bits from fp32 ones.

    A model with adapters gets them from a checkpoint of adapters, and its frozen weights from one without.

    Raises ``UserError`` when the checkpoint holds another model: a tensor that is missing, left over, or of another
    shape.
    """
    types = _stored_types(directory)
    stored = set(types)
    frozen = _is_base(directory, stored, chunks, optimizer, groups)
    with quantized.as_parameters(chunks):
        state = _model_state(chunks, groups, base=frozen)
    base = quantized_base.take(state, chunks)
    sharding = optimizer_state.by_parameter(state)
    restoring = optimizer_state.Restoring()
    if optimizer is None:
        spare = {key for key in stored if key.startswith(optimizer_state.PREFIX)}
    else:
        restoring = optimizer_state.to_load(optimizer, sharding, stored, groups)
        spare = optimizer_state.prefer_masters(sharding, stored)
        spare |= set(filter(optimizer_state.is_master, stored))  # for bf16 weights with nothing behind them
        if groups.is_main:
            restoring.log_conversions(types)
    state["fp8"] = fp8.to_checkpoint(chunks, stored)
    spare |= {key for key in stored if key.startswith(fp8.CHECKPOINT_PREFIX)}
    model_keys = {value.key for value in nested_values(state) if isinstance(value, ShardedBase)}
    model_keys |= {place.key for _, place in base}
    _check_keys(model_keys | restoring.keys(), stored, spare, directory, groups)
    loaded = _read(directory, state | {"optimizer": restoring.wanted})
    _fill_model(chunks, loaded, base=frozen)
    quantized_base.fill(directory, base)
    fp8.fill(chunks, loaded.get("fp8", {}))
    if optimizer is None:
        return
    restoring.fill(loaded.get("optimizer", {}))
    if chunks[0].config.params_dtype != torch.float32 and optimizer_state.lacks_masters(stored):
        restoring.fill(_read(directory, {"optimizer": restoring.masters}).get("optimizer", {}))
    if any(optimizer_state.in_place(inner) for inner in optimizer.chained_optimizers):
        gather_parameters(chunks, whole=True)  # each rank has set the weights of its own slices
    optimizer_state.fill_common(optimizer, loaded[optimizer_state.COMMON])
