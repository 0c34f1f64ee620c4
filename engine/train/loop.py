"""The training loop of every stage: step, log, evaluate, save. Saving and evaluating are handed in."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import Config, padded_vocab_size
from engine.errors import UserError
from engine.model.objective import NEXT_TOKEN, Objective
from engine.parallel.topology import Groups
from engine.train import flops, step
from engine.train.metrics import MetricLogger
from engine.train.optimizer import NonFiniteError
from engine.train.state import TrainState


def peak_memory_gb(device: torch.device) -> float:
    """GB (1e9 bytes) this process held at most: device memory on a GPU, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass
class _Throughput:
    """Tokens a second and MFU since the last logged step, pauses for evaluation and saving left out."""

    cfg: Config
    groups: Groups
    vocab_size: int
    peak: float | None
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, result: step.StepResult, seconds: float) -> None:
        tokens = result.global_batch_size * result.seq_length
        self.tokens += tokens
        self.flops += tokens * flops.flops_per_token(
            self.cfg.model, result.seq_length, self.vocab_size, frozen=self.cfg.lora is not None)
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        row = {"train/tokens_per_sec": self.tokens / self.seconds}
        if self.peak:
            row["train/mfu"] = self.flops / self.seconds / (self.peak * self.groups.world_size)
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0
        return row


def _row(result: step.StepResult, state: TrainState, device: torch.device,
         objective: Objective = NEXT_TOKEN) -> dict[str, float]:
    router = result.sums.router
    row = {
        "train/loss": result.sums.loss,
        **{name if "/" in name else f"train/{name}": value for name, value in objective.metrics(result.sums).items()},
        "train/lr": result.lr,
        "train/grad_norm": result.grad_norm,
        "train/memory_gb": peak_memory_gb(device),
        "train/seq_length": result.seq_length,
        "train/global_batch_size": result.global_batch_size,
        "train/micro_batch_size": result.micro_batch_size,
        "train/consumed_tokens": state.consumed_tokens,
    }
    if router is not None:
        row |= {"train/aux_loss": router.aux_loss_l.mean().item(), "train/z_loss": router.z_loss_l.mean().item(),
                "train/expert_load_max": router.expert_load_max}
    return row


def _validate(evaluate: Callable[[], dict], state: TrainState, *, saved_too: bool) -> dict[str, float]:
    """Only a step that is saved as well can be the best checkpoint."""
    found = {name: value for name, value in evaluate().items() if name not in ("tokens", "tokens_per_sec")}
    finite = math.isfinite(found["loss"])  # no loss is less than NaN: as the first it would stay the best
    if saved_too and finite and (state.best_val_loss is None or found["loss"] < state.best_val_loss):
        state.best_val_loss, state.best_step = found["loss"], state.step
    return {f"val/{name}": value for name, value in found.items()}


def _step(cfg: Config, chunks: list[Any], optimizer, data, groups: Groups, state: TrainState,
          logger: MetricLogger, objective: Objective) -> step.StepResult:
    """A step, with what a user should know of it said in the user's words."""
    micro_before = state.micro_batch_size
    try:
        result = step.run(cfg, chunks, optimizer, data, groups, state, objective)
    except NonFiniteError as error:
        raise UserError(f"{error} at step {state.step + 1}", where="train",
                        fix="Nothing was updated; resume from the last checkpoint with a lower train.lr") from error
    if state.micro_batch_size != micro_before:
        logger.message(f"out of memory at step {state.step}: micro-batches of {state.micro_batch_size} from here on; "
                       "the global batch and the loss are the same")
    return result


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Within, garbage collections do not walk the model and its modules, which live to the end anyway."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # or extension modules report leaks when the process ends


def run(
    cfg: Config,
    chunks: list[Any],
    optimizer,
    data,
    groups: Groups,
    *,
    state: TrainState,
    logger: MetricLogger,
    vocab_size: int,
    save: Callable[[TrainState], object],
    evaluate: Callable[[], dict] | None,
    on_first_step: Callable[[], None] = lambda: None,
    objective: Objective = NEXT_TOKEN,
    ledger: Callable[[TrainState], Mapping[str, float]] = lambda state: {},
) -> TrainState:
    """Trains from ``state`` to ``train.max_steps``. Metrics, evaluation, checkpoints at their intervals and at the end.

    ``evaluate`` returns "loss" and the objective's metrics on held-out data, or is None where there is none. A row is
    logged before the checkpoint of its step is saved, so that a resumed run neither lacks nor repeats it. ``ledger``:
    more numbers for every logged row.
    Raises ``UserError`` on every rank when loss or gradients are not finite; no weight was changed by that step.
    """
    step.prepare(chunks, cfg, groups)
    padded = padded_vocab_size(cfg.model, vocab_size, cfg.parallel.tensor)
    peak = flops.peak_flops(groups.device, chunks[0].config.params_dtype)
    speed = _Throughput(cfg, groups, padded, peak)
    first = state.step
    with _frozen():
        while state.step < cfg.train.max_steps:
            start = time.perf_counter()
            result = _step(cfg, chunks, optimizer, data, groups, state, logger, objective)
            speed.add(result, time.perf_counter() - start)
            if state.step == first + 1:
                on_first_step()
            done = state.step >= cfg.train.max_steps
            save_now = _due(state.step, cfg.checkpoint.save_steps, done)
            row: dict[str, float] = {}
            if done or state.step % cfg.logging.logging_steps == 0 or state.step == 1:
                row = _row(result, state, groups.device, objective) | speed.take()
            if evaluate is not None and _due(state.step, cfg.evaluation.eval_steps, done):
                row |= _validate(evaluate, state, saved_too=save_now)
            if row:
                logger.log(state.step, {**row, **ledger(state)})
            logger.advance(state.step)
            if save_now:
                save(state)
    return state


def _due(now: int, every: int, done: bool) -> bool:
    return done or (every > 0 and now % every == 0)
