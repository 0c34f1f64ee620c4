"""Each rank's random state, so that a resumed run draws the dropout masks it would have drawn."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file, save_file

_TRACKER = "tracker."


def capture() -> dict[str, torch.Tensor]:
    """The state of torch's generators and of Megatron's per-region tracker, as byte tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, value in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        state[_TRACKER + name] = value
    return {name: value.clone() for name, value in state.items()}


def restore(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker = {name.removeprefix(_TRACKER): v for name, v in state.items() if name.startswith(_TRACKER)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


def path(directory: Path, rank: int) -> Path:
    return directory / "rng" / f"rank_{rank:05d}.safetensors"


def save(directory: Path, rank: int) -> None:
    save_file(capture(), path(directory, rank))


def load(directory: Path, rank: int) -> None:
    restore(load_file(path(directory, rank)))
