"""Megatron's GPT with the engine's layers."""

import engine.parallel  # noqa: F401  before Megatron is imported
