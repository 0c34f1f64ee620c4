"""The optimizer's state by model parameter: one form in checkpoints, whatever layout and optimizer class hold it.

    optimizer.state.<kind>.<model key>     sharded as the parameter itself is. Kinds: AdamW's exp_avg and exp_avg_sq,
                                           Muon's momentum, and param, the fp32 weights behind 16-bit ones
    common.pt "optimizer_common"           what all parameters share: AdamW's step, the loss scale

Megatron's own forms differ with the distributed optimizer, and count parameter groups and chained optimizers. Here a
parameter's state may be whole on every data-parallel rank, cut into one slice a rank, or whole on one rank: ``Held``
says which elements a rank has, and the rest is the same for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from engine.parallel.topology import Groups

COMMON = "optimizer_common"
PREFIX = "optimizer.state."
MASTER = "param"
Range = tuple[int, int]
Sharded = ShardedTensor | ShardedTensorFactory


def key_of(kind: str, model_key: str) -> str:
    return f"{PREFIX}{kind}.{model_key}"


def has_masters(stored: set[str]) -> bool:
    """Whether a checkpoint with these keys holds fp32 weights behind 16-bit ones."""
    return any(key.startswith(f"{PREFIX}{MASTER}.") for key in stored)


@dataclass(frozen=True)
class Held:
    """What this data-parallel rank holds of one parameter's state.

    ``ranges[r]``: the elements of the flattened parameter that rank r of ``group`` holds, (0, 0) for none.
    ``tensors``: by kind, this rank's elements, in any shape; a rank may hold a kind whole although it owns no range
    (the fp32 weights that every rank keeps), and then loads it too.
    """

    param: Any
    tensors: dict[str, torch.Tensor]
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

    def span(self, tensor: torch.Tensor) -> Range:
        """The elements of the parameter that this rank's ``tensor`` is."""
        n = self.param.numel()
        return (0, n) if tensor.numel() == n else self.ranges[self.group.rank()]


def _mains(inner: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """(model parameter, what the inner optimizer updates for it): itself, its fp32 copy, or this rank's slice."""
    if isinstance(inner, DistributedOptimizer):
        pairs = ((inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
                 (inner.model_fp32_groups, inner.shard_fp32_groups))
    elif isinstance(inner, Float16OptimizerWithFloat16Params):
        pairs = ((inner.float16_groups, inner.fp32_from_float16_groups),
                 (inner.fp32_from_fp32_groups, inner.fp32_from_fp32_groups))
    else:
        own = [group["params"] for group in inner.optimizer.param_groups]
        pairs = ((own, own),)
    for models, mains in pairs:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)


def _tensors(inner: Any, param: Any, main: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {kind: value for kind, value in inner.optimizer.state_of(main).items() if torch.is_tensor(value)}
    return state if param.dtype == torch.float32 else state | {MASTER: main}


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
            values = item.tensors[kind].detach().contiguous()
            _exchange([dist.P2POp(dist.isend, values, ranks[item.saver], item.group)])
        return None
    own = item.tensors[kind].detach()
    if not parts:
        return own.reshape(item.param.shape)
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

    ``wanted`` is asked for first. ``masters``, fp32 weights of a checkpoint that was trained in fp32, has the model's
    own keys and is asked for by itself.
    """

    wanted: dict[str, Sharded] = field(default_factory=dict)
    masters: dict[str, Sharded] = field(default_factory=dict)
    targets: dict[str, tuple[torch.Tensor, Range]] = field(default_factory=dict)

    def keys(self) -> set[str]:
        return {value.key for value in self.wanted.values()}

    @torch.no_grad()
    def fill(self, loaded: dict[str, torch.Tensor]) -> None:
        """Puts what was loaded into the optimizer; names and shapes were checked before."""
        for name, whole in loaded.items():
            target, (start, end) = self.targets[name]
            if whole.data_ptr() != target.data_ptr():  # not loaded in place
                target.copy_(whole.flatten()[start:end].view(target.shape))


def to_load(optimizer: Any, sharding: dict[int, Sharded], stored: set[str], groups: Groups) -> Restoring:
    """What this rank needs of the optimizer's state in a checkpoint with the keys ``stored``.

    A rank that holds a slice asks for the parameters that it has a part of; nothing travels between ranks.
    """
    restoring, from_weights = Restoring(), not has_masters(stored)
    for i, item in enumerate(held(optimizer, groups)):
        like = sharding[id(item.param)]
        for kind, target in item.tensors.items():
            name, key, request = f"{i}.{kind}", key_of(kind, like.key), restoring.wanted
            if kind == MASTER and from_weights:
                key, request = like.key, restoring.masters
            span, target = item.span(target), target.detach()
            in_place = span == (0, item.param.numel()) and target.is_contiguous()
            data = target.view(item.param.shape) if in_place else torch.empty(item.param.shape, dtype=target.dtype)
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
