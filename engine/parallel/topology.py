"""Process groups, before the model exists. The only module that touches Megatron's ``parallel_state``."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine import launch
from engine.config import Config
from engine.errors import UserError
from engine.parallel import gloo, watch


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
    if wanted != "cuda":
        return torch.device(wanted)
    gpus, local = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if gpus == 1 or not local:  # Slurm may show each rank its own GPU only; without LOCAL_RANK, ranks fill node by node
        return torch.device("cuda", launch.rank() % gpus)
    if int(local) >= gpus:
        raise UserError(f"is {local} (from 0), but this machine has {gpus} GPUs", where="LOCAL_RANK",
                        fix="Start as many ranks on a machine as it has GPUs")
    return torch.device("cuda", int(local))


def init_process_group(device: torch.device, timeout_minutes: float) -> None:
    """torch.distributed of all ranks (see ``engine.launch``), or of this process alone.

    Raises ``UserError`` when ranks do not come within the timeout, or cannot connect to each other.
    """
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    store = watch.arrive(timeout_minutes)
    ranks = {"store": store, "rank": launch.rank(), "world_size": launch.world_size()} if store else {}
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None, **ranks)
    except (dist.DistError, RuntimeError) as error:
        name = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        raise UserError(f"{backend} cannot connect the ranks ({str(error).splitlines()[0]})", where=watch.address(),
                        fix=f"Check that the machines can connect to each other; with several networks, name the "
                        f"right one's interface in {name}") from error


def world_size() -> int:
    """The number of processes that were started together, 1 without a launcher."""
    return launch.world_size()


def build(cfg: Config) -> Groups:
    """Starts torch.distributed and builds every process group of ``cfg.parallel``.

    Raises ``UserError`` when the world size does not fit the layout (before any group is created, on every rank
    alike, so that none hangs).
    """
    launch.adopt()
    cfg.data_parallel_size(world_size())
    launch.set_gpu_environment(tensor=cfg.parallel.tensor, context=cfg.parallel.context, device=cfg.device)
    device = resolve_device(cfg.device)
    if device.type != "cuda":
        from engine.parallel import cpu

        cpu.install()
    with gloo.one_device():
        return _build(cfg, device)


def _build(cfg: Config, device: torch.device) -> Groups:
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


def start(cfg: Config) -> Groups:
    """``build`` for a run of its own: from here to ``shutdown``, a rank that fails ends all ranks (see ``watch``)."""
    launch.adopt()
    cfg.data_parallel_size(world_size())
    watch.join(cfg.parallel.timeout_minutes)
    return build(cfg)


@contextlib.contextmanager
def groups(cfg: Config) -> Iterator[Groups]:
    """``start``, with ``shutdown`` behind it; after an error only where it would not wait for ranks that are gone."""
    built = start(cfg)
    try:
        yield built
    except BaseException:
        if built.world_size == 1:
            shutdown()
        raise
    shutdown()


def of_main_rank(value: Any) -> Any:
    """Rank 0's ``value`` (anything that pickles), on every rank. Collective."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def forget() -> None:
    """Destroys Megatron's groups and keeps torch.distributed, so that the same processes can build another layout.

    Each group has threads of its own that poll: of twenty layouts they would leave no processor time for the next.
    """
    if not dist.is_initialized():
        return
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    gc.collect()  # models that are over hold their groups
    for group in list(dist.distributed_c10d._world.pg_map):  # pyright: ignore[reportPrivateImportUsage]
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def shutdown() -> None:
    """Destroys the groups so that the process can end, or build others."""
    if dist.is_initialized():
        _destroy()
    watch.leave()


def _destroy() -> None:
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
