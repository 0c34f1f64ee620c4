"""Which source gives each of many samples, five sources: the engine's closed form beside Megatron's builder.

The engine goes through all blocks in runs of 2^20, as a trainer would who asked for each of them; it keeps none.
"engine arrays" writes all of them into the two arrays that Megatron's builder writes, 2 and 8 bytes a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

UNIT = "samples"
SIZE = 100_000_000
BAR = 5.0
CURVE = (10**5, 10**6, 10**7, 10**8)

WEIGHTS = [0.5, 0.2, 0.15, 0.1, 0.05]
_RUN = 1 << 20

Work = Callable[[], dict]


def make(folder: Path, size: int) -> None:
    """There is no input."""


def _facts(source: np.ndarray, own: np.ndarray) -> dict:
    """How many blocks each source gave, read off the last of them."""
    return {"counts": [int(own[source == number].max(initial=-1)) + 1 for number in range(len(WEIGHTS))]}


def engine(folder: Path, size: int) -> Work:
    from engine import _index
    from engine.data.blend import integer_weights

    weights = integer_weights(WEIGHTS)

    def work() -> dict:
        source, own = np.empty(0, np.uint16), np.empty(0, np.int64)
        for first in range(0, size, _RUN):
            source, own = _index.blend_range(weights, first, min(_RUN, size - first))
        return _facts(source, own)

    return work


def engine_arrays(folder: Path, size: int) -> Work:
    from engine import _index
    from engine.data.blend import integer_weights

    weights = integer_weights(WEIGHTS)

    def work() -> dict:
        source, own = _index.blend_range(weights, 0, size)
        return _facts(source[-_RUN:], own[-_RUN:])

    return work


def megatron(folder: Path, size: int) -> Work:
    """As its BlendedDataset calls it."""
    from megatron.core.datasets import helpers_cpp  # type: ignore[attr-defined]

    def work() -> dict:
        source, own = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers_cpp.build_blending_indices(source, own, np.array(WEIGHTS), len(WEIGHTS), size, False)
        return _facts(source[-_RUN:], own[-_RUN:])

    return work


SIDES = {"engine": engine, "megatron": megatron, "engine arrays": engine_arrays}


def compare(engine: dict, other: dict) -> str:
    """Both keep the shares: no source is two blocks apart."""
    apart = max(abs(a - b) for a, b in zip(engine["counts"], other["counts"], strict=True))
    return "" if apart < 2 else f"a source gives {apart} blocks more or fewer"
