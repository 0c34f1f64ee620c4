"""From a position in the token stream to this rank's micro-batches.

b rows of a micro-batch, s tokens of a row. Sample j of a global batch reads [position + j s, position + (j + 1) s)
of the stream; row k of micro-batch m on data-parallel rank r is j = (m dp_size + r) b + k. So the samples and their
order do not depend on dp_size, the micro-batch size or the number of reader threads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.blend import BlendIndex
from engine.data.evaluation import EvaluationRows
from engine.data.index_cache import IndexCache, default_folder
from engine.data.prefetch import ReaderPool
from engine.data.prepared import PreparedSplit, open_split
from engine.data.samples import SampleIndex
from engine.data.stream import TokenStream
from engine.errors import UserError


@dataclass
class Batch:
    """One micro-batch, CPU tensors [b, s]. labels are the next tokens; loss_mask 1 where they count, 0 in padding.

    Rows packed with documents that do not see each other say where these end: cu_seqlens_b holds for each row the
    boundaries [0, …, s], and position_ids restart at each.
    """

    tokens_bs: torch.Tensor  # int64
    labels_bs: torch.Tensor  # int64
    loss_mask_bs: torch.Tensor  # float32
    position_ids_bs: torch.Tensor  # int64
    cu_seqlens_b: list[torch.Tensor] | None = None  # int32, one a row


@dataclass(frozen=True)
class _Step:
    """What one call of micro_batches reads; positions and lengths in tokens, batch sizes in sequences."""

    position: int
    global_batch_size: int
    micro_batch_size: int
    seq_length: int

    def next(self) -> _Step:
        end = self.position + self.global_batch_size * self.seq_length
        return _Step(end, self.global_batch_size, self.micro_batch_size, self.seq_length)


class Loader:
    """Reads one split for one data-parallel rank; made by `build`. Close it, or use it as a context manager."""

    def __init__(self, splits: list[PreparedSplit], weights: list[float], *, seq_length: int, seed: int,
                 caches: list[IndexCache], dp_rank: int, dp_size: int, num_workers: int):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} of dp_size {dp_size}")
        self.seq_length, self.dp_rank, self.dp_size = seq_length, dp_rank, dp_size
        self._splits, self._weights, self._seed, self._caches = splits, weights, seed, caches
        self._pool = ReaderPool(num_workers)
        self._ahead: tuple[_Step, list[Future]] | None = None
        self._closed = False

    @functools.cached_property
    def stream(self) -> TokenStream:
        """The shuffled, blended stream. UserError when a source is smaller than one sample."""
        sources = [SampleIndex(split.dataset, self.seq_length, self._seed, cache)
                   for split, cache in zip(self._splits, self._caches, strict=True)]
        return TokenStream(sources, BlendIndex(self._weights), [split.vocab_size for split in self._splits])

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, all sources together."""
        return sum(split.dataset.num_tokens for split in self._splits)

    def micro_batches(
        self, position_tokens: int, *, global_batch_size: int, micro_batch_size: int, seq_length: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch at a position; see the top of the file.

        The reader threads go on with the step that follows, and a call that continues there finds it read. Raises
        UserError when the batch does not divide or the length exceeds model.seq_length; errors of reading are raised
        by the iterator.
        """
        step = _Step(position_tokens, global_batch_size, micro_batch_size, seq_length)
        self._check(step)
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1]
            self._ahead = None
        else:
            batches = self._submit(step)
        if self._ahead is None or self._ahead[0] != step.next():  # a pipeline stage may ask for the same step twice
            self._drop_ahead()
            self._ahead = (step.next(), self._submit(step.next()))
        return _results(batches)

    def sample_ids(self, position_tokens: int, global_batch_size: int, seq_length: int) -> list:
        """What every sample of the global batch (all ranks) reads, in order, for audits: a tuple of pieces
        (source, epoch, block, offset in the block, length)."""
        self._check(_Step(position_tokens, global_batch_size, 1, seq_length), whole_batch=True)
        position_b = position_tokens + np.arange(global_batch_size, dtype=np.int64) * seq_length
        return self.stream.ids(position_b, seq_length)

    def evaluation_batches(
        self, micro_batch_size: int, seq_length: int, max_sequences: int | None = None
    ) -> Iterator[Batch]:
        """The split in file order, unshuffled: every token but a source's first is predicted exactly once over all
        ranks. The last rows are padded with loss_mask 0, and every rank gets the same number of batches."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        rows = EvaluationRows(self._splits, seq_length)
        count = len(rows) if max_sequences is None else min(len(rows), max_sequences)
        stride = micro_batch_size * self.dp_size
        for first in range(0, count, stride):
            row_b = first + self.dp_rank * micro_batch_size + np.arange(micro_batch_size)
            yield _batch(*rows.read(row_b, count))

    def close(self) -> None:
        """Ends the reader threads. The loader cannot be read afterwards."""
        self._closed = True
        self._drop_ahead()
        self._pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, step: _Step, whole_batch: bool = False) -> None:
        if self._closed:
            raise RuntimeError("the loader is closed")
        if not 1 <= step.seq_length <= self.seq_length:
            raise UserError(f"{step.seq_length} tokens are not between 1 and model.seq_length ({self.seq_length})",
                            where="train.seq_length_schedule", fix="Shorten it or raise model.seq_length")
        per_round = step.micro_batch_size * (1 if whole_batch else self.dp_size)
        if per_round < 1 or step.global_batch_size < 1 or step.global_batch_size % per_round:
            raise UserError(
                f"{step.global_batch_size} sequences do not divide into micro-batches of {step.micro_batch_size} on "
                f"{self.dp_size} data-parallel ranks",
                where="train.global_batch_size", fix=f"Make it a multiple of {max(per_round, 1)}",
            )
        if step.position < 0:
            raise ValueError(f"position {step.position} is negative")

    def _submit(self, step: _Step) -> list[Future]:
        rounds = step.global_batch_size // (step.micro_batch_size * self.dp_size)
        return [self._pool.submit(functools.partial(_read, self.stream, self._positions(step, m), step.seq_length))
                for m in range(rounds)]

    def _positions(self, step: _Step, micro_batch: int) -> np.ndarray:
        first = (micro_batch * self.dp_size + self.dp_rank) * step.micro_batch_size
        return step.position + (first + np.arange(step.micro_batch_size, dtype=np.int64)) * step.seq_length

    def _drop_ahead(self) -> None:
        for future in self._ahead[1] if self._ahead else ():
            future.cancel()
        self._ahead = None


def build(cfg: Any, split: str, *, dp_rank: int, dp_size: int) -> Loader:
    """The loader of a split ("train" or "validation") of `cfg.data.path` or of every source of `cfg.data.blend`.

    Raises UserError for a missing, damaged or foreign file, a bad weight, a source listed twice, and, for training,
    a source smaller than one sample.
    """
    data = cfg.data
    if (data.path is None) == (not data.blend):
        raise UserError("set either data.path or data.blend", where="data",
                        fix="Name a folder written by `mainspring prepare`")
    entries = [(data.path, 1.0)] if data.path is not None else [(entry.path, entry.weight) for entry in data.blend]
    paths = [Path(path) for path, _ in entries]
    for place, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:place]]:
            raise UserError("is listed twice", where=f"data.blend[{place}] {path}", fix="Add up the weights")
    if data.num_workers < 0:
        raise UserError(f"{data.num_workers} is negative", where="data.num_workers", fix="0 reads without threads")
    seed = cfg.seed if data.shuffle_seed is None else data.shuffle_seed
    caches = [IndexCache(default_folder(path) if data.cache_dir is None else Path(data.cache_dir),
                         required=data.cache_dir is not None) for path in paths]
    splits = [open_split(path, split) for path in paths]
    loader = Loader(splits, [weight for _, weight in entries], seq_length=cfg.model.seq_length, seed=seed,
                    caches=caches, dp_rank=dp_rank, dp_size=dp_size, num_workers=data.num_workers)
    if split == "train":
        _ = loader.stream  # too little data is an error now, not at the first step
    return loader


def _results(batches: list[Future]) -> Iterator[Batch]:
    batches.reverse()
    while batches:
        yield batches.pop().result()  # popped first: a batch the caller is done with is freed


def _read(stream: TokenStream, position_b: np.ndarray, seq_length: int) -> Batch:
    return _batch(*stream.read(position_b, seq_length))


def _batch(tokens_bs: np.ndarray, labels_bs: np.ndarray, loss_mask_bs: np.ndarray | None = None) -> Batch:
    tokens = torch.from_numpy(tokens_bs)
    mask = torch.ones(tokens.shape) if loss_mask_bs is None else torch.from_numpy(loss_mask_bs)
    # Each row its own positions, not an expanded view: Megatron slices and pins these tensors.
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    return Batch(tokens, torch.from_numpy(labels_bs), mask, positions)
