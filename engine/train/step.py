"""One training step: a global batch forward and backward, then one update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import finalize_model_grads

from engine.config import Config
from engine.model import forward, moe
from engine.model.objective import NEXT_TOKEN, Objective
from engine.parallel.topology import Groups
from engine.train import oom, schedules
from engine.train import optimizer as optim
from engine.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """``sums``: of the global batch before the update. ``stepped`` is False when loss scaling skipped the update."""

    sums: forward.LossSums
    grad_norm: float
    lr: float
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    stepped: bool


def prepare(chunks: list[Any], cfg: Config, groups: Groups) -> None:
    """Hooks Megatron's schedules up with the wrapped model. Once, before the first step."""
    settings = chunks[0].config
    recovery = cfg.train.enable_oom_recovery
    settings.finalize_model_grads_func = oom.agreeing_finalize(groups) if recovery else finalize_model_grads
    if chunks[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        settings.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            settings.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
            if chunks[0].ddp_config.overlap_param_gather:
                settings.param_sync_func = [chunk.start_param_sync for chunk in chunks]


def run(cfg: Config, chunks: list[Any], optimizer, data, groups: Groups, state: TrainState,
        objective: Objective = NEXT_TOKEN) -> StepResult:
    """Trains on the global batch at ``state``'s position and advances ``state``.

    Out of memory with ``train.enable_oom_recovery``, the same batch is read again in smaller micro-batches, on which
    ``state`` stays. Raises ``NonFiniteError`` on every rank, weights unchanged, when loss or gradients are not finite.
    """
    lr = schedules.learning_rate(cfg.train, state.step)
    for group in optimizer.param_groups:
        group["lr"] = lr
        # Megatron leaves this to its own scheduler: wd_mult is 0 for vectors.
        group["weight_decay"] = cfg.train.weight_decay * group.get("wd_mult", 1.0)
    length = cfg.train.seq_length_at(state.step, cfg.model.seq_length)
    batch_size = cfg.train.batch_size_at(state.step)
    while True:
        micro = state.micro_batch_size or cfg.train.micro_batch_size
        try:
            sums = _gradients(chunks, optimizer, data, groups, state.consumed_tokens, batch_size, micro, length,
                              objective)
            break
        except RuntimeError as error:
            if not cfg.train.enable_oom_recovery:
                raise
            oom.recover(error, groups)
        state.micro_batch_size = oom.smaller_micro_batch(micro)
    if not math.isfinite(sums.loss_sum) and chunks[0].config.grad_scale_func is None:
        raise optim.NonFiniteError(f"loss is {sums.loss_sum}")  # gradients can be finite where a loss is not
    stepped, grad_norm = optim.step(optimizer)
    if stepped and sums.router is not None:
        moe.update_expert_bias(chunks, sums.router)
    state.step += 1
    state.consumed_tokens += batch_size * length
    state.consumed_samples += batch_size
    state.skipped_steps += not stepped
    return StepResult(sums, grad_norm, lr, length, batch_size, micro, stepped)


def _gradients(chunks: list[Any], optimizer, data, groups: Groups, position: int, batch_size: int, micro: int,
               length: int, objective: Objective) -> forward.LossSums:
    """Gradients of the global batch at ``position``, reduced and normalised, in the parameters' ``main_grad``."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    batches = data.micro_batches(position, global_batch_size=batch_size, micro_batch_size=micro, seq_length=length)
    return forward.run(chunks, batches, groups, num_micro_batches=batch_size // (micro * groups.data_parallel_size),
                       micro_batch_size=micro, seq_length=length, forward_only=False, objective=objective)
