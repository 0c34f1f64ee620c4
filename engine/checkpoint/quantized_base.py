"""Weights of an ordinary checkpoint into a model that holds them in 4 bits, one after the other.

Megatron reads whole tensors into memory that it is given for all of them at once. Here each rank reads its part of one
weight, quantises it, and goes on to the next, by itself: nothing but the outcome is communicated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from engine.errors import UserError
from engine.model import quantized
from engine.model.quantized import Weight

_FIX = "Load it with the model section of its own config.yaml"


def take(state: dict[str, dict], chunks: list[Any]) -> list[tuple[Weight, Any]]:
    """Takes what quantised weights are in a checkpoint out of ``state`` (of ``sharded_state_dict`` within
    ``quantized.as_parameters``), where it has no memory. -> each weight and its place."""
    found = []
    for i, chunk in enumerate(chunks):
        for name, weight in quantized.weights(chunk).items():
            place = state[f"model{i}"].pop(name, None)
            if place is not None:  # None: a checkpoint of adapters alone
                assert place.data.is_meta, name
                found.append((weight, place))
    return found


class _Parts(DefaultLoadPlanner):
    """Where what the reader finds goes: a tensor for each read."""

    def __init__(self, targets: dict[tuple[int, ...], torch.Tensor]):
        super().__init__()
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.offset is not None
        target = self.targets[tuple(read_item.dest_index.offset)]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _pieces(place: Any) -> Any:
    """The parts (``ShardedTensor``) of a tensor in the checkpoint that make up ``place``: gate and up lie apart."""
    return place.build() if isinstance(place, ShardedTensorFactory) else [place]


def _read(reader: Any, stored: Any, place: Any, dtype: torch.dtype) -> torch.Tensor:
    """This rank's part of one weight. Raises ``UserError`` where it has another shape in the checkpoint."""
    place.data = dense = torch.zeros(place.data.shape, dtype=dtype)
    targets, wanted = {}, []
    for piece in _pieces(place):
        if tuple(stored.size) != tuple(piece.global_shape):
            raise UserError(f"does not fit this model: {piece.key} is {tuple(stored.size)}, here it is "
                            f"{tuple(piece.global_shape)}", where=str(Path(reader.path).parent), fix=_FIX)
        offsets = tuple(piece.global_offset)
        assert piece.data is not None
        targets[offsets] = piece.data.view((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
        wanted.append(ChunkStorageMetadata(torch.Size(offsets), targets[offsets].shape))
    items = create_read_items_for_chunk_list(place.key, stored, wanted)
    read = sum(item.lengths.numel() for item in items)
    assert read == dense.numel(), (place.key, read, dense.numel())
    reader.read_data(LoadPlan(items), _Parts(targets)).wait()
    place.data = None
    return dense


def fill(directory: Path, weights: list[tuple[Weight, Any]]) -> None:
    """Reads and quantises one weight after the other. Collective.

    Raises ``UserError``, on all ranks: weights that are not finite or of another shape, files that cannot be read.
    """
    problem = None
    if weights:
        reader = FileSystemReader(directory)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        try:
            for weight, place in weights:
                weight.copy_(_read(reader, metadata.state_dict_metadata[place.key], place, weight.dtype))
        except (UserError, OSError, RuntimeError) as error:  # torch reports a file that is cut off as a RuntimeError
            problem = str(error) if isinstance(error, UserError) else f"{directory.parent}: cannot be read ({error})"
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise UserError(first)
