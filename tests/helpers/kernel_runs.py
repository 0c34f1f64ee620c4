"""A short training whose losses are compared between sets of kernels."""

from __future__ import annotations

import tiny

from engine.config import Config

STEPS = 5


def losses(cfg: Config) -> list[float]:
    """Of so many steps, with uneven loss masks."""
    run = tiny.start(cfg, masked=True)
    return [run.step().sums.loss for _ in range(STEPS)]
