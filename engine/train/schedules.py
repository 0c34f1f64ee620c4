"""The learning rate, a pure function of the step as batch size and length are (``TrainConfig.batch_size_at`` and
``seq_length_at``): nothing to save, nothing to resume wrongly.

Steps count from 0; the value at step k is what the (k+1)-th update uses.
"""

from __future__ import annotations

import math

from engine.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up to ``lr``, then linear, cosine or no decay to ``min_lr`` at ``max_steps``; or WSD.

    WSD (warm-up, stable, decay; Hu et al., 2024, arXiv:2404.06395) holds ``lr`` until ``decay_steps`` before the end
    and falls linearly to ``min_lr``.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    length = max(1, train.decay_length())
    start = train.max_steps - length if train.schedule == "wsd" else train.warmup_steps
    done = min(max(step - start, 0) / length, 1.0)
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1.0 - done
    return train.min_lr + (train.lr - train.min_lr) * remaining
