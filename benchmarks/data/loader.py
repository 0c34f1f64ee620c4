"""Shuffled batches of 4,096 tokens: the engine's loader without threads, on one core, beside Megatron's GPTDataset.

Both read the same pair of files of 200,000 documents of 20 to 1,000 tokens and have their indices ready; Megatron's
items are put into batches by torch's default collation, as its training does, and its masks are cached.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

UNIT = "tokens"
SIZE = 40_000_000  # read in a run
BAR = 2.0

SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 4096, 4, 32
_DOCUMENTS, _VOCABULARY = 200_000, 50_000

Work = Callable[[], dict]


def make(folder: Path, size: int) -> None:
    """A prepared split without a manifest."""
    from engine.data.indexed import IndexedDatasetWriter

    random = np.random.default_rng(4)
    with IndexedDatasetWriter(folder / "train", _VOCABULARY) as writer:
        for _ in range(20):
            lengths = random.integers(20, 1001, _DOCUMENTS // 20)
            writer.add_documents(random.integers(1, _VOCABULARY, int(lengths.sum())), lengths)


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def engine(folder: Path, size: int) -> Work:
    from benchmarks.harness import ROOT
    from engine.config import load_config
    from engine.data.loader import build

    _one_core()
    config = load_config(ROOT / "configs/pretrain/demo_cpu.yaml", {
        "data.path": folder, "data.num_workers": 0, "model.seq_length": SEQ_LENGTH})
    data = build(config, "train", dp_rank=0, dp_size=1)
    step = SEQ_LENGTH * GLOBAL_BATCH

    def read(first: int, steps: int) -> int:
        total = 0
        for number in range(first, first + steps):
            for batch in data.micro_batches(number * step, global_batch_size=GLOBAL_BATCH,
                                            micro_batch_size=MICRO_BATCH, seq_length=SEQ_LENGTH):
                total += int(batch.tokens_bs[0, 0] >= 0) * batch.tokens_bs.numel()
        return total

    read(0, 2)
    return lambda: {"tokens": read(2, size // step)}


def megatron(folder: Path, size: int) -> Work:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from torch.utils.data import default_collate

    _one_core()
    step = SEQ_LENGTH * GLOBAL_BATCH
    tokenizer: Any = _Tokenizer()
    config = GPTDatasetConfig(
        random_seed=1234, sequence_length=SEQ_LENGTH, blend=([str(folder / "train")], None), split="1,0,0",
        path_to_cache=str(folder / "megatron_cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, tokenizer=tokenizer,
    )  # fmt: skip
    steps = size // step
    sizes: Any = [(steps + 2) * GLOBAL_BATCH, None, None]
    builder: Any = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    data = builder.build()[0]

    def read(first: int, steps: int) -> int:
        total = 0
        for start in range(first * GLOBAL_BATCH, (first + steps) * GLOBAL_BATCH, MICRO_BATCH):
            batch = default_collate([data[sample] for sample in range(start, start + MICRO_BATCH)])
            total += int(batch["tokens"][0, 0] >= 0) * batch["tokens"].numel()
        return total

    read(0, 2)
    return lambda: {"tokens": read(2, steps)}


class _Tokenizer:
    """What GPTDataset asks of one."""

    eod = pad = 0
    vocab_size = _VOCABULARY
    unique_identifiers: ClassVar[dict[str, str]] = {"class": "none"}


SIDES = {"engine": engine, "megatron": megatron}


def compare(engine: dict, other: dict) -> str:
    """As many tokens."""
    return "" if engine["tokens"] == other["tokens"] else f"{engine['tokens']} tokens, there {other['tokens']}"
