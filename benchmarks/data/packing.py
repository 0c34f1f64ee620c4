"""Examples of lengths like those of chats in rows of 4,096: the engine's best-fit decreasing beside greedy first-fit.

First-fit as it is usually written, a Python loop that puts each example into the first row with room, looks at ever
more rows: its time grows with the square, and a million examples would take an hour. It gets the first 20,000, and its
time is scaled with their number, which is far less than the whole would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

UNIT = "examples"
SIZE = 1_000_000
BAR = 50.0
CURVE = (10**5, 10**6, 10**7, 10**8)
LARGEST = {"first-fit in Python": 10**6}

CAPACITY = 4096
_FIRST_FIT_EXAMPLES = 20_000

Work = Callable[[], dict]


def make(folder: Path, size: int) -> None:
    """lengths.npy [size] int32: log-normal, a median of 300 tokens, some as long as a row."""
    lengths = np.clip(np.random.default_rng(5).lognormal(np.log(300), 0.9, size), 5, CAPACITY)
    np.save(folder / "lengths.npy", lengths.astype(np.int32))


def _facts(lengths: np.ndarray, rows: int) -> dict:
    fill = float(lengths.sum(dtype=np.int64)) / (rows * CAPACITY)
    return {"fill": fill, "columns": {"full": f"{fill:.2%}"}}


def engine(folder: Path, size: int) -> Work:
    from engine.data.packing import pack

    lengths = np.load(folder / "lengths.npy")

    def work() -> dict:
        return _facts(lengths, len(pack(lengths, CAPACITY)))

    return work


def first_fit(folder: Path, size: int) -> Work:
    lengths = np.load(folder / "lengths.npy")[:_FIRST_FIT_EXAMPLES]
    todo = lengths.tolist()

    def work() -> dict:
        started = time.perf_counter()
        room: list[int] = []
        rows: list[list[int]] = []
        for example, length in enumerate(todo):
            for row, free in enumerate(room):
                if free >= length:
                    room[row] -= length
                    rows[row].append(example)
                    break
            else:
                room.append(CAPACITY - length)
                rows.append([example])
        seconds = (time.perf_counter() - started) * size / len(todo)
        return _facts(lengths, len(rows)) | {"seconds": seconds}

    return work


SIDES = {"engine": engine, "first-fit in Python": first_fit}


def compare(engine: dict, other: dict) -> str:
    return "" if engine["fill"] >= max(0.99, other["fill"]) else f"{engine['fill']:.2%} full"
