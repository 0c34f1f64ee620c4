"""What changes over training, each a pure function of the step: nothing to save, nothing to resume wrongly.

Steps count from 0; a value at step k is what the (k+1)-th update uses.
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


def global_batch_size(train: TrainConfig, step: int) -> int:
    """Sequences in the global batch of ``step``: constant, doubling every ``every_steps``, or a ramp."""
    return train.batch_size_at(step)


def seq_length(train: TrainConfig, full_length: int, step: int) -> int:
    """Tokens a sequence at ``step``: the curriculum's entry with the largest ``step`` reached, else the full length."""
    return train.seq_length_at(step, full_length)


def tokens_before(train: TrainConfig, full_length: int, step: int) -> int:
    """Tokens that the steps before ``step`` consume: the data position of a run at that step."""
    return sum(global_batch_size(train, k) * seq_length(train, full_length, k) for k in range(step))
