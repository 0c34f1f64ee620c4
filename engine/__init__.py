"""Mainspring: a Megatron-style training engine from a pip install."""

__version__ = "0.1.0"
