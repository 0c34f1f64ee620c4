"""The optimizer's state by model parameter: one form in checkpoints, whatever layout and optimizer class hold it.

    optimizer.state.<kind>.<model key>     sharded as the parameter itself is. Kinds: AdamW's exp_avg and exp_avg_sq,
                                           Muon's momentum, and param, the fp32 weights behind 16-bit ones (also
                                           where the optimizer keeps only the bits that those lack)
    common.pt "optimizer_common"           what all parameters share: AdamW's step, the loss scale

Megatron's own forms differ with the distributed optimizer, and count parameter groups and chained optimizers. Here a
parameter's state may be whole on every data-parallel rank, cut into one slice a rank, or whole on one rank: ``Held``
says which elements a rank has, and the rest is the same for all.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from engine.parallel.topology import Groups

_log = logging.getLogger(__name__)
COMMON = "optimizer_common"
PREFIX = "optimizer.state."
MASTER = "param"
Range = tuple[int, int]
Sharded = ShardedTensor | ShardedTensorFactory


def key_of(kind: str, model_key: str) -> str:
    return f"{PREFIX}{kind}.{model_key}"


def is_master(key: str) -> bool:
    """Whether a checkpoint's key is that of fp32 weights behind 16-bit ones."""
    return key.startswith(f"{PREFIX}{MASTER}.")


def lacks_masters(stored: set[str]) -> bool:
    """Whether of some parameter a checkpoint with these keys holds no fp32 weights but the model's own."""
    with_state = {key.removeprefix(PREFIX).split(".", 1)[1] for key in stored if key.startswith(PREFIX)}
    return any(key_of(MASTER, name) not in stored for name in with_state)


class Master(Protocol):
    """fp32 weights that an optimizer keeps in pieces (``engine.train.adamw.Master``)."""

    def numel(self) -> int: ...

    def read(self) -> torch.Tensor: ...

    def write(self, values: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Held:
    """What this data-parallel rank holds of one parameter's state.

    ``ranges[r]``: the elements of the flattened parameter that rank r of ``group`` holds, (0, 0) for none.
    ``tensors``: by kind, this rank's elements, in any shape; a rank may hold a kind whole although it owns no range
    (the fp32 weights that every rank keeps), and then loads it too.
    """

    param: Any
    tensors: dict[str, torch.Tensor | Master]
    ranges: list[Range]
    group: Any

    @property
    def saver(self) -> int:
        """The rank of the group that writes: the one that needs the least from others, the first of equals."""
        return max(range(len(self.ranges)), key=lambda r: self.ranges[r][1] - self.ranges[r][0])

    @property
    def saves(self) -> bool:
        return self.group.rank() == self.saver

    def missing(self) -> list[tuple[int, Range]]:
        """What the saver gets from other ranks: (rank, elements)."""
        whole = (0, self.param.numel())
        if self.ranges[self.saver] == whole:
            return []
        return [(r, part) for r, part in enumerate(self.ranges) if r != self.saver and part[0] < part[1]]

    def values(self, kind: str) -> torch.Tensor:
        found = self.tensors[kind]
        return found.detach() if isinstance(found, torch.Tensor) else found.read()

    def span(self, tensor: torch.Tensor | Master) -> Range:
        """The elements of the parameter that this rank's ``tensor`` is."""
        n = self.param.numel()
        return (0, n) if tensor.numel() == n else self.ranges[self.group.rank()]


def _mains(inner: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """(model parameter, what the inner optimizer updates for it): itself, its fp32 copy, or this rank's slice."""
    if isinstance(inner, DistributedOptimizer):
        halves = inner.shard_float16_groups if in_place(inner) else inner.shard_fp32_from_float16_groups
        pairs = ((inner.model_float16_groups, halves), (inner.model_fp32_groups, inner.shard_fp32_groups))
    elif isinstance(inner, Float16OptimizerWithFloat16Params):
        kept = [getattr(inner, "kept", [])]  # engine.train.kept_weights
        pairs = ((inner.float16_groups, inner.fp32_from_float16_groups), (kept, kept),
                 (inner.fp32_from_fp32_groups, inner.fp32_from_fp32_groups))
    else:
        own = [group["params"] for group in inner.optimizer.param_groups]
        pairs = ((own, own),)
    for models, mains in pairs:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)


def in_place(inner: Any) -> bool:
    """Whether the distributed optimizer updates 16-bit weights where they are, instead of fp32 copies."""
    return isinstance(inner, DistributedOptimizer) and inner.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def _tensors(inner: Any, param: Any, main: torch.Tensor) -> dict[str, torch.Tensor | Master]:
    found = inner.optimizer.state_of(main).items()
    state: dict[str, torch.Tensor | Master] = {kind: value for kind, value in found if torch.is_tensor(value)}
    if param.dtype == torch.float32:
        return state
    master = main if main.dtype == torch.float32 else inner.optimizer.master_of(main)
    return state if master is None else state | {MASTER: master}


def _slices(inner: DistributedOptimizer) -> Iterator[Held]:
    """Of the distributed optimizer: each rank holds an equal part of every bucket, across parameters' borders."""
    mains, size = dict(_mains(inner)), inner.data_parallel_group.size()
    for buffer in inner.buffers:
        for param, (start, end, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            part = bucket.grad_data.numel() // size
            cuts = [min(max(bucket.offset + r * part, start), end) - start for r in range(size + 1)]
            ranges = [(a, b) if a < b else (0, 0) for a, b in itertools.pairwise(cuts)]
            tensors = _tensors(inner, param, mains[param]) if param in mains else {}
            yield Held(param, tensors, ranges, inner.data_parallel_group)


def _wholes(inner: Any, groups: Groups) -> Iterator[Held]:
    """Of the other optimizers: whole on every rank, or on the owner alone where the optimizer names one."""
    owner = getattr(inner.optimizer, "owner", None)
    for param, main in _mains(inner):
        group = groups.pg.dp_cp if getattr(param, "allreduce", True) else groups.pg.expt_dp
        whole, holders = (0, param.numel()), range(group.size()) if owner is None else [owner(main)]
        ranges = [whole if r in holders else (0, 0) for r in range(group.size())]
        yield Held(param, _tensors(inner, param, main), ranges, group)


def held(optimizer: Any, groups: Groups) -> Iterator[Held]:
    """The state of every parameter of this model-parallel rank, in the same order on all its data-parallel ranks; of an
    optimizer with owners the owned ones only.

    Of an inner optimizer ``optimizer.state_of(main)`` is asked: its tensors for a parameter, made if there were none.
    """
    for inner in optimizer.chained_optimizers:
        if not inner.is_stub_optimizer:
            yield from _slices(inner) if isinstance(inner, DistributedOptimizer) else _wholes(inner, groups)


def by_parameter(model_state: dict) -> dict[int, Sharded]:
    """How each parameter is sharded, by its ``id``."""
    return {id(value.data): value for value in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}


def _sharded(like: Sharded, key: str, tensor: torch.Tensor, *, saves: bool) -> Sharded:
    """A tensor of the parameter's shape and place. The replica among data-parallel ranks that counts is the saver's."""
    replica: Any = like.replica_id
    changes = {"key": key, "data": tensor, "replica_id": (*replica[:2], 0 if saves else 1)}
    if isinstance(like, ShardedTensorFactory):
        return replace(like, **changes)
    return replace(like, **changes, dtype=tensor.dtype)


def _complete(item: Held, kind: str) -> torch.Tensor | None:
    """The whole tensor on the saver, None elsewhere: only parameters across a border between ranks travel.

    Collective over the ranks that hold a part. What is put together lies in host memory.
    """
    me, ranks = item.group.rank(), dist.get_process_group_ranks(item.group)
    parts = item.missing()
    if me != item.saver:
        if any(rank == me for rank, _ in parts):
            values = item.values(kind).contiguous()
            _exchange([dist.P2POp(dist.isend, values, ranks[item.saver], item.group)])
        return None
    own = item.values(kind)
    if not parts:  # what was put together for the checkpoint waits in host memory
        return (own if isinstance(item.tensors[kind], torch.Tensor) else own.cpu()).reshape(item.param.shape)
    received = [torch.empty(end - start, dtype=own.dtype, device=own.device) for _, (start, end) in parts]
    _exchange([dist.P2POp(dist.irecv, values, ranks[rank], item.group)
               for values, (rank, _) in zip(received, parts, strict=True)])
    whole = torch.empty(item.param.numel(), dtype=own.dtype)
    for values, (start, end) in [(own, item.ranges[me]), *zip(received, (part for _, part in parts), strict=True)]:
        whole[start:end] = values.flatten()
    return whole.view(item.param.shape)


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def to_save(optimizer: Any, sharding: dict[int, Sharded], groups: Groups) -> dict:
    """What this rank writes of the optimizer's state. Collective; each element is written by one rank.

    ``sharding``: ``by_parameter`` of the model.
    """
    state = {}
    for i, item in enumerate(held(optimizer, groups)):
        like = sharding[id(item.param)]
        copies: Any = like.replica_id
        if any(copies[:2]):
            continue  # another pipeline stage (a tied copy) or tensor rank writes it
        for kind in item.tensors:
            whole = _complete(item, kind)
            if whole is not None:
                state[f"{i}.{kind}"] = _sharded(like, key_of(kind, like.key), whole, saves=True)
    return {COMMON: _common(optimizer)} | ({"optimizer": state} if state else {})


def _common(optimizer: Any) -> dict:
    steps = {group["step"] for group in optimizer.param_groups if "step" in group}
    assert len(steps) == 1, f"parameter groups are at different steps: {steps}"
    scalers = [getattr(inner, "grad_scaler", None) for inner in optimizer.chained_optimizers]
    scaler = scalers[0].state_dict() if scalers[0] else {}
    return {"step": steps.pop(), "grad_scaler": {name: torch.as_tensor(v).cpu() for name, v in scaler.items()}}


@dataclass
class Restoring:
    """A load under way: what to ask the checkpoint for, and where it goes.

    ``wanted`` is asked for first. ``masters``, fp32 weights that the checkpoint has as the model's own only (trained in
    fp32, or with nothing behind 16 bits), has the model's keys and is asked for by itself.
    """

    wanted: dict[str, Sharded] = field(default_factory=dict)
    masters: dict[str, Sharded] = field(default_factory=dict)
    targets: dict[str, tuple[torch.Tensor | Master, Range]] = field(default_factory=dict)

    def keys(self) -> set[str]:
        return {value.key for value in self.wanted.values()}

    def log_conversions(self, stored: dict[str, torch.dtype | None]) -> None:
        """Says once of each kind of state that is kept in another type than it was saved in. ``stored``: by key."""
        found = {(value.key.removeprefix(PREFIX).split(".")[0], stored.get(value.key), value.dtype)
                 for value in self.wanted.values() if isinstance(value, ShardedTensor)}
        for kind, saved, here in sorted(found, key=str):
            if saved not in (None, here):
                _log.warning("%s was saved in %s and goes on in %s", kind, *(str(t).removeprefix("torch.")
                                                                              for t in (saved, here)))

    @torch.no_grad()
    def fill(self, loaded: dict[str, torch.Tensor]) -> None:
        """Puts what was loaded into the optimizer; names and shapes were checked before."""
        for name, whole in loaded.items():
            target, (start, end) = self.targets[name]
            if not isinstance(target, torch.Tensor):
                target.write(whole.flatten()[start:end])
            elif whole.data_ptr() != target.data_ptr():  # not loaded in place
                target.copy_(whole.flatten()[start:end].view(target.shape))


def to_load(optimizer: Any, sharding: dict[int, Sharded], stored: set[str], groups: Groups) -> Restoring:
    """What this rank needs of the optimizer's state in a checkpoint with the keys ``stored``.

    A rank that holds a slice asks for the parameters that it has a part of; nothing travels between ranks.
    """
    restoring = Restoring()
    for i, item in enumerate(held(optimizer, groups)):
        like = sharding[id(item.param)]
        for kind, target in item.tensors.items():
            name, key, request = f"{i}.{kind}", key_of(kind, like.key), restoring.wanted
            if kind == MASTER and key not in stored:
                key, request = like.key, restoring.masters
            span = item.span(target)
            if isinstance(target, torch.Tensor):
                target = target.detach()
                direct = span == (0, item.param.numel()) and target.is_contiguous()
                data = target.view(item.param.shape) if direct else torch.empty(item.param.shape, dtype=target.dtype)
            else:
                data = torch.empty(item.param.shape)
            request[name] = _sharded(like, key, data, saves=item.saves)
            restoring.targets[name] = target, span
    return restoring


def prefer_masters(sharding: dict[int, Sharded], stored: set[str]) -> set[str]:
    """Turns the model's fp32 parameters to the fp32 weights of a checkpoint that holds them beside 16-bit ones.

    -> the keys of those 16-bit ones, which nothing asks for.
    """
    left = set()
    for like in sharding.values():
        key = key_of(MASTER, like.key)
        if key in stored and like.data is not None and like.data.dtype == torch.float32:
            left.add(like.key)
            like.key = key
    return left


def fill_common(optimizer: Any, saved: dict) -> None:
    """Restores what all parameters share. A loss scale is kept as it is where the checkpoint has none (not fp16)."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = saved["step"]
    scaler = saved["grad_scaler"]
    for inner in optimizer.chained_optimizers:
        if scaler and getattr(inner, "grad_scaler", None):
            counts = {name: int(scaler[name]) for name in ("growth_tracker", "hysteresis_tracker")}
            inner.grad_scaler.load_state_dict({"scale": scaler["scale"], **counts})
