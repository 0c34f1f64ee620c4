"""Atomic, sharded checkpoints; resume; retention."""

import engine.parallel  # noqa: F401  before Megatron is imported
