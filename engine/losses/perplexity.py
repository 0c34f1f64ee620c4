"""Perplexity of a mean loss."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token; infinite where it would overflow (above 709 nats)."""
    return math.inf if loss > 709.0 else math.exp(loss)
