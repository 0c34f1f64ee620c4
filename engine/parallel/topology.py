"""Process groups, before the model exists. The only module that touches Megatron's ``parallel_state``."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.config import Config
from engine.errors import UserError


@dataclass(frozen=True)
class Groups:
    """Where this process stands in the layout, and Megatron's groups for the layers."""

    rank: int
    world_size: int
    device: torch.device
    pg: Any  # megatron.core ProcessGroupCollection

    @property
    def data_parallel_rank(self) -> int:
        return self.pg.dp.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.pg.dp.size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pg.pp.rank() == self.pg.pp.size() - 1

    @property
    def is_loss_rank(self) -> bool:
        """The ranks whose loss counts once in a sum over all ranks: last stage, first tensor rank."""
        return self.is_last_stage and self.pg.tp.rank() == 0


def resolve_device(wanted: str) -> torch.device:
    """CUDA where there is a GPU, else the CPU; or the one asked for, with ``UserError`` where it cannot serve."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "mps":
        # Gloo moves no MPS tensors, and Megatron reduces over groups even of one rank.
        raise UserError("Apple GPUs are not supported by this version", where="device", fix="Use --device cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible", where="device", fix="Use --device auto, or --device cpu")
    if wanted == "cpu" and torch.cuda.is_available():
        # Megatron asks torch whether there is a GPU; the answer must be the one the user wants.
        raise UserError("this machine's GPU is visible to Megatron-core", where="device",
                        fix="Hide it: CUDA_VISIBLE_DEVICES= with --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if wanted == "cuda" else torch.device(wanted)


def _set_environment() -> None:
    """What Megatron-core wants of the environment, before any CUDA context or NCCL communicator exists."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # keeps TP collectives ahead of the GEMMs they feed
    os.environ.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def init_process_group(device: torch.device, timeout_minutes: float) -> None:
    """torch.distributed from torchrun's environment, or of this process alone."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def world_size() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def build(cfg: Config) -> Groups:
    """Starts torch.distributed and builds every process group of ``cfg.parallel``.

    Raises ``UserError`` when the world size does not fit the layout (before any group is created, on every rank
    alike, so that none hangs).
    """
    cfg.data_parallel_size(world_size())
    device = resolve_device(cfg.device)
    _set_environment()
    if device.type != "cuda":
        from engine.parallel import cpu

        cpu.install()
    init_process_group(device, cfg.parallel.timeout_minutes)
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    p = cfg.parallel
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor,
            pipeline_model_parallel_size=p.pipeline,
            virtual_pipeline_model_parallel_size=p.virtual_pipeline if p.virtual_pipeline > 1 else None,
            context_parallel_size=p.context,
            expert_model_parallel_size=p.expert,
            expert_tensor_parallel_size=p.expert_tensor,
            distributed_timeout_minutes=max(1, round(p.timeout_minutes)),
            create_gloo_process_groups=device.type == "cuda",
        )
    # One seed for all data-parallel ranks, shifted by pipeline stage, as Megatron does: dropout differs by stage.
    seed = cfg.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(dist.get_rank(), dist.get_world_size(), device, ProcessGroupCollection.use_mpu_process_groups())


@contextlib.contextmanager
def groups(cfg: Config) -> Iterator[Groups]:
    """``build``, with ``shutdown`` behind it; after an error only where it would not wait for ranks that are gone."""
    built = build(cfg)
    try:
        yield built
    except BaseException:
        if built.world_size == 1:
            shutdown()
        raise
    shutdown()


def shutdown() -> None:
    """Destroys the groups so that the process can end, or build others."""
    if not dist.is_initialized():
        return
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
