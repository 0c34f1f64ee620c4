"""The training step and loop, optimizer, schedules, metrics."""

import engine.parallel  # noqa: F401  before Megatron is imported
