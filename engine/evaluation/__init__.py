"""Perplexity, generation, n-gram baselines, plots."""

import engine.parallel  # noqa: F401  before Megatron is imported
