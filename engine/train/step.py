"""One training step: a global batch forward and backward, then one update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import finalize_model_grads

from engine.config import Config
from engine.model import forward
from engine.parallel.topology import Groups
from engine.train import optimizer as optim
from engine.train import schedules
from engine.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """``sums``: of the global batch before the update. ``stepped`` is False when loss scaling skipped the update."""

    sums: forward.LossSums
    grad_norm: float
    lr: float
    seq_length: int
    global_batch_size: int
    stepped: bool


def prepare(chunks: list[Any]) -> None:
    """Hooks Megatron's schedules up with the wrapped model. Once, before the first step."""
    settings = chunks[0].config
    settings.finalize_model_grads_func = finalize_model_grads
    if chunks[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        settings.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            settings.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]


def run(cfg: Config, chunks, optimizer, data, groups: Groups, state: TrainState) -> StepResult:
    """Trains on the global batch at ``state``'s position and advances ``state``.

    Raises ``NonFiniteError`` on every rank, weights unchanged, when the gradients are not finite.
    """
    train = cfg.train
    length = schedules.seq_length(train, cfg.model.seq_length, state.step)
    batch_size = schedules.global_batch_size(train, state.step)
    lr = schedules.learning_rate(train, state.step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward.run(
        chunks,
        data.micro_batches(state.consumed_tokens, global_batch_size=batch_size,
                           micro_batch_size=train.micro_batch_size, seq_length=length),
        groups,
        num_micro_batches=batch_size // (train.micro_batch_size * groups.data_parallel_size),
        micro_batch_size=train.micro_batch_size,
        seq_length=length,
        forward_only=False,
    )
    stepped, grad_norm = optim.step(optimizer)
    state.step += 1
    state.consumed_tokens += batch_size * length
    state.consumed_samples += batch_size
    state.skipped_steps += not stepped
    return StepResult(sums, grad_norm, lr, length, batch_size, stepped)
