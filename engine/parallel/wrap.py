"""Parallelism around the built model, as an ordered list: half precision, data parallelism."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from engine.config import Config
from engine.parallel.topology import Groups


def ddp_config(cfg: Config, groups: Groups) -> DistributedDataParallelConfig:
    """Gradients are summed in fp32; the reduction overlaps the backward pass where streams exist to overlap on."""
    overlap = cfg.parallel.overlap_grad_reduce
    if cfg.train.enable_oom_recovery:
        overlap = False  # ranks vote before the first reduction (engine/train/oom.py)
    elif overlap is None:
        overlap = groups.device.type == "cuda" and groups.pg.dp_cp.size() > 1
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and cfg.parallel.distributed_optimizer,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # the step itself refuses non-finite gradients, on all ranks alike
    )


def apply(chunks: list[Any], cfg: Config, groups: Groups) -> list[DistributedDataParallel]:
    """The model chunks wrapped for training. Gradients land in each parameter's ``main_grad`` (fp32)."""
    wrapped = []
    for i, chunk in enumerate(chunks):
        settings = chunk.config
        if settings.bf16 or settings.fp16:
            chunk = Float16Module(settings, chunk)
        wrapped.append(DistributedDataParallel(
            config=settings, ddp_config=ddp_config(cfg, groups), module=chunk,
            # Only the first chunk's buckets can be reduced while later chunks still run.
            disable_bucketing=i > 0, pg_collection=groups.pg))
    return wrapped


def gather_parameters(chunks: list[Any]) -> None:
    """Completes the weights of the last update on every rank, before they are read other than by a forward pass.

    With ``overlap_param_gather`` each rank has updated its share only and fetches the others' in the next forward pass.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrap(module: Any) -> Any:
    """The bare model inside the wrappers; checkpoints hold its names."""
    while isinstance(module, (DistributedDataParallel, Float16Module)):
        module = module.module
    return module
