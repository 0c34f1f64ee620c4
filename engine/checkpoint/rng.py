"""Each rank's random state, so that a resumed run draws the dropout masks it would have drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file
from safetensors.torch import save as serialize

_PREFIX = "tracker."


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()  # None, to its type, before the process groups exist


def capture() -> dict[str, torch.Tensor]:
    """The state of torch's generators and of Megatron's per-region tracker, as byte tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, value in _tracker().get_states().items():
        state[_PREFIX + name] = value
    return {name: value.clone() for name, value in state.items()}


def restore(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    regions = {name.removeprefix(_PREFIX): v for name, v in state.items() if name.startswith(_PREFIX)}
    _tracker().set_states(regions)


def path(directory: Path, rank: int) -> Path:
    return directory / "rng" / f"rank_{rank:05d}.safetensors"


def save(directory: Path, rank: int) -> None:
    path(directory, rank).write_bytes(serialize(capture()))  # save_file's errors are no OSError on a full disk


def load(directory: Path, rank: int) -> None:
    restore(load_file(path(directory, rank)))
