"""Where the samples of 4,096 tokens begin, for an epoch of a shuffled corpus: the engine's index beside Megatron's.

Megatron's side is the C++ builder alone, with the lengths in memory and the documents' order made before the clock
starts. "megatron, all" is what its dataset does for an epoch: the documents' order, the builder, the samples' order.
The engine's index is the tokens of each group of 512 documents and an epoch's order of the groups, after which any
block is found when it is asked for; what that costs, for blocks anywhere in the epoch, is the column "µs a block".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

UNIT = "documents"
SIZE = 100_000_000
BAR = 3.0
CURVE = (10**5, 10**6, 10**7, 10**8)

SEQ_LENGTH = 4096
_PROBES = 20_000

Work = Callable[[], dict]


def make(folder: Path, size: int) -> None:
    """A pair of files of documents of 20 to 1,000 tokens; the .bin is all holes."""
    from engine.data.indexed_writer import dtype_code, write_index

    lengths = np.random.default_rng(4).integers(20, 1001, size, dtype=np.int32)
    with open(folder / "train.idx", "wb") as idx:
        write_index(idx, [lengths], dtype_code(50_000))
    with open(folder / "train.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))


def engine(folder: Path, size: int) -> Work:
    from engine import _index
    from engine.data.indexed import IndexedDataset

    dataset = IndexedDataset(folder / "train")

    def work() -> dict:
        started = time.perf_counter()
        order = _index.SampleOrder(dataset.corpus, dataset.corpus.group_tokens(), SEQ_LENGTH, 1234)
        order.starts(0, order.locate(np.zeros(1, np.int64))[1])  # the epoch's order of the groups is made by its first
        seconds = time.perf_counter() - started
        blocks = np.random.default_rng(1).integers(0, order.blocks, _PROBES)
        started = time.perf_counter()
        order.starts(0, blocks)
        cost = (time.perf_counter() - started) / _PROBES
        return {"seconds": seconds, "samples": order.blocks, "columns": {"µs a block": 1e6 * cost}}

    return work


def _lengths(folder: Path) -> np.ndarray:
    from engine.data.indexed import IndexedDataset

    return np.array(IndexedDataset(folder / "train").sizes)


def _built(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    from megatron.core.datasets import helpers

    return helpers.build_sample_idx(lengths, order, SEQ_LENGTH, 1, int(lengths.sum(dtype=np.int64)))


def builder(folder: Path, size: int) -> Work:
    lengths = _lengths(folder)
    order = np.random.default_rng(1234).permutation(size).astype(np.int32)
    _built(lengths[:100], np.arange(100, dtype=np.int32))  # what it imports is not its speed
    return lambda: {"samples": len(_built(lengths, order)) - 1}


def megatron_all(folder: Path, size: int) -> Work:
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    lengths = _lengths(folder)
    documents = np.arange(size, dtype=np.int32)
    _built(lengths[:100], documents[:100])

    def work() -> dict:
        random = np.random.RandomState(1234)
        order = _build_document_index(documents, 1, random, False)
        samples = len(_built(lengths, order)) - 1
        _build_shuffle_index(samples, samples, random)
        return {"samples": samples}

    return work


SIDES = {"engine": engine, "megatron": builder, "megatron, all": megatron_all}


def compare(engine: dict, other: dict) -> str:
    """The same number of samples."""
    return "" if engine["samples"] == other["samples"] else f"{engine['samples']} samples, there {other['samples']}"
