"""Parallelism around the built model, as an ordered list: half precision, data parallelism."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from engine.config import Config
from engine.parallel.topology import Groups


def ddp_config(cfg: Config, groups: Groups) -> DistributedDataParallelConfig:
    """Gradients are summed in fp32; the reduction overlaps the backward pass where streams exist to overlap on.

    Muon shares whole matrices over data-parallel ranks by itself, and needs whole gradients, not slices of buckets.
    """
    sliced = cfg.parallel.distributed_optimizer and cfg.train.optimizer != "muon"
    overlap = cfg.parallel.overlap_grad_reduce
    if cfg.train.enable_oom_recovery:
        overlap = False  # ranks vote before the first reduction (engine/train/oom.py)
    elif overlap is None:
        overlap = groups.device.type == "cuda" and groups.pg.dp_cp.size() > 1
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sliced,
        align_param_gather=cfg.parallel.virtual_pipeline > 1,  # stages would wait for each other's gathers
        use_distributed_optimizer=sliced,
        check_for_nan_in_grad=False,  # the step itself refuses non-finite gradients, on all ranks alike
    )


def apply(chunks: list[Any], cfg: Config, groups: Groups) -> list[DistributedDataParallel]:
    """The model chunks wrapped for training. Gradients land in each parameter's ``main_grad`` (fp32)."""
    wrapped, ddp = [], ddp_config(cfg, groups)
    for i, chunk in enumerate(chunks):
        settings = chunk.config
        for parameter in chunk.parameters():
            # Read by the engine's linear layers (weight_gradient). To overlap, Megatron's hooks must see a gradient.
            parameter.sums_own_gradient = not ddp.overlap_grad_reduce
            parameter.sums_before_hook = ddp.overlap_grad_reduce
        if settings.bf16 or settings.fp16:
            chunk = Float16Module(settings, chunk)
        wrapped.append(DistributedDataParallel(
            config=settings, ddp_config=ddp, module=chunk,
            # Only the first chunk's buckets can be reduced while later chunks still run.
            disable_bucketing=i > 0, pg_collection=groups.pg))
    return wrapped


def gather_parameters(chunks: list[Any], *, whole: bool = False) -> None:
    """Completes the weights of the last update on every rank, before they are read other than by a forward pass.

    With ``overlap_param_gather`` each rank has updated its share only and fetches the others' in the next forward pass;
    ``whole``: shares were written outside an update.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            ddp = chunk.ddp_config
            if ddp.overlap_param_gather or (whole and ddp.use_distributed_optimizer):
                chunk.start_param_sync(force_sync=True)


def gather_gradients(chunks: list[Any]) -> None:
    """Completes every ``main_grad`` on every rank, after gradients were finalised and before the update.

    With the distributed optimizer a rank holds the reduced gradients of its share of each bucket only. The shares stay
    as they are, so the update that follows is the same.
    """
    for chunk in chunks:
        if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.use_distributed_optimizer:
            continue
        for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def unwrap(module: Any) -> Any:
    """The bare model inside the wrappers; checkpoints hold its names."""
    while isinstance(module, (DistributedDataParallel, Float16Module)):
        module = module.module
    return module
