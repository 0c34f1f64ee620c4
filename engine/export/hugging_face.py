"""Hugging Face directories in and out of the engine: the room's front door.

``model_section`` and ``load`` read one, ``save`` writes one, ``verify`` compares it with what it was written from.
"""

from __future__ import annotations

from pathlib import Path

from engine.export.reading import load, model_section
from engine.export.verify import verify
from engine.export.writing import DTYPES, save

__all__ = ["DTYPES", "is_directory", "load", "model_section", "save", "verify"]


def is_directory(path: Path | str) -> bool:
    """Whether this is a Hugging Face model's directory, known here or not, and no checkpoint of the engine's."""
    path = Path(path)
    return (path / "config.json").is_file() and not (path / "manifest.json").exists()
