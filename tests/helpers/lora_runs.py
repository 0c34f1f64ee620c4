"""Tiny models with adapters, and what three steps of one leave behind: shared by tests and their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from engine.config import Config
from engine.config.stages import LoraConfig


def with_lora(cfg: Config, **values: Any) -> Config:
    """``cfg`` with adapters, although it reads prepared tokens (which the stages with adapters do not)."""
    return cfg.model_copy(update={"lora": LoraConfig(**{"rank": 4, "alpha": 8.0} | values)})


@torch.no_grad()
def randomise(chunks: list[Any], seed: int = 5) -> None:
    """Draws every B by its name, as after training: at zero neither A nor the order of B's rows would matter."""
    from engine.model import lora, whole
    from engine.model.init import generator
    from engine.parallel.wrap import unwrap

    for chunk in chunks:
        for name, p in whole.global_names(chunk).items():
            if lora.is_adapter(name) and lora.factor(name)[2] == "b":
                split = whole.split_of(name, p, unwrap(chunk).pg_collection)
                p.copy_(split.take(torch.randn(split.whole_shape(p.shape), generator=generator(seed, name)) * 0.1))


def gradient(p: Any) -> torch.Tensor:
    """A parameter's reduced gradient; zeros of the frozen ones."""
    return p.main_grad if p.requires_grad else torch.zeros_like(p)


def adapters_only(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of the unsplit model is adapters'; the rest, gradients of frozen weights, must be zero."""
    from engine.model import lora

    assert not any(value.any() for name, value in found.items() if not lora.is_adapter(name))
    return {name: value for name, value in found.items() if lora.is_adapter(name)}


def three_steps(cfg: Config) -> dict[str, Any]:
    """Losses and norms of each step; the adapters' gradients of the first; all weights before and after.

    Everything of the unsplit model, the same on every rank. Loss masks are uneven.
    """
    run = tiny.start(cfg, masked=True)
    initial = tiny.whole_weights(run)
    randomise(run.chunks)
    for inner in run.optimizer.chained_optimizers:
        if not inner.is_stub_optimizer:
            inner.reload_model_params()
    results, gradients = [], None
    for _ in range(3):
        results.append(run.step())
        if gradients is None and not cfg.parallel.distributed_optimizer:  # which leaves each rank a part of the sums
            gradients = adapters_only(tiny.whole_weights(run, gradient))
    return {"initial": initial, "losses": [r.sums.loss for r in results], "tokens": [r.sums.tokens for r in results],
            "norms": [r.grad_norm for r in results], "gradients": gradients, "weights": tiny.whole_weights(run)}


def _checkpointer(run: tiny.Run) -> Any:
    from engine.checkpoint.adapters import Base

    return run.checkpointer(base=Base(Path("/where/the/base/is"), "the base's hash"))


def save(run: tiny.Run) -> Path:
    """As ``run.save``, beside a base that is none: these models draw theirs from the seed."""
    return _checkpointer(run).save(run.chunks, run.optimizer, run.state.to_dict())


def load(run: tiny.Run, path: Path) -> None:
    """As ``run.load``."""
    from engine.train.state import TrainState

    run.state = TrainState.from_dict(_checkpointer(run).load(path, run.chunks, run.optimizer))
