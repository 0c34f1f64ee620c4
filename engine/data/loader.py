"""From a position in the token stream to this rank's micro-batches.

b rows of a micro-batch, s tokens of a row. Sample j of a global batch reads [position + j s, position + (j + 1) s)
of the stream; which rank reads which: engine/data/ahead.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.ahead import Step, StepReader
from engine.data.blend_plan import BlendPlan, Wanted
from engine.data.evaluation import EvaluationRows
from engine.data.index_cache import IndexCache, default_folder
from engine.data.ledger import Given
from engine.data.order import TOKENS
from engine.data.prepared import PreparedSplit, open_split, same_tokenizer
from engine.data.samples import SampleIndex
from engine.data.stream import TokenStream
from engine.errors import UserError


@dataclass
class Pairs:
    """The p preference pairs of a micro-batch, each within one of its rows."""

    branch_bs: torch.Tensor  # int64: 2 i where the label is of pair i's chosen answer, 2 i + 1 of the rejected, else -1
    ids_p: torch.Tensor  # int64: the pair's place in the dataset
    reference_p2: torch.Tensor | None = None  # float64: the reference's, of chosen and rejected, summed


@dataclass
class Batch:
    """One micro-batch, CPU tensors [b, s]. labels are the next tokens; loss_mask 1 where they count, 0 in padding.

    Rows packed with documents that do not see each other say where these end: cu_seqlens_b holds for each row the
    boundaries [0, …, s], and position_ids restart at each. A document may go on from another: prefixes_b holds for each
    row, for each of its documents, the range [first, end) of the row whose keys its tokens see before their own, or
    None; its position_ids then begin at end - first.
    """

    tokens_bs: torch.Tensor  # int64
    labels_bs: torch.Tensor  # int64
    loss_mask_bs: torch.Tensor  # float32
    position_ids_bs: torch.Tensor  # int64
    cu_seqlens_b: list[torch.Tensor] | None = None  # int32, one a row
    prefixes_b: list[list[tuple[int, int] | None]] | None = None
    pairs: Pairs | None = None


def uncounted(batch: Batch) -> Batch:
    """The same rows, of which nothing counts."""
    pairs = batch.pairs
    if pairs is not None:
        pairs = replace(pairs, branch_bs=torch.full_like(pairs.branch_bs, -1), ids_p=pairs.ids_p[:0],
                        reference_p2=None if pairs.reference_p2 is None else pairs.reference_p2[:0])
    return replace(batch, loss_mask_bs=torch.zeros_like(batch.loss_mask_bs), pairs=pairs)


class Loader(StepReader):
    """Reads one split for one data-parallel rank; made by `build`. Close it, or use it as a context manager."""

    def __init__(self, splits: list[PreparedSplit], blend: Wanted, *, seq_length: int, seed: int,
                 caches: list[IndexCache], dp_rank: int, dp_size: int, num_workers: int):
        super().__init__(seq_length=seq_length, dp_rank=dp_rank, dp_size=dp_size, num_workers=num_workers)
        self._splits, self._blend, self._seed, self._caches = splits, blend, seed, caches

    @functools.cached_property
    def _indices(self) -> list[SampleIndex]:
        return [SampleIndex(split.dataset, self.seq_length, self._seed, cache)
                for split, cache in zip(self._splits, self._caches, strict=True)]

    @functools.cached_property
    def plan(self) -> BlendPlan:
        """What each source gives when: of a run that begins, until ``begin`` says otherwise."""
        return self._blend.plan(self._indices)

    @functools.cached_property
    def stream(self) -> TokenStream:
        """The shuffled, blended stream. UserError when a source is smaller than one sample."""
        return self._stream()

    def _stream(self) -> TokenStream:
        return TokenStream(self._indices, self.plan.index, [split.vocab_size for split in self._splits])

    def begin(self, *, steps: int, step: int = 0, position: int = 0, record: dict[str, Any] | None = None
              ) -> tuple[str, ...]:
        """See ``StepReader.begin``. UserError where the sources do not last for the steps, or the record is of other
        samples (model.seq_length, data.shuffle_seed)."""
        self._drop_ahead()
        self.plan = self._blend.plan(self._indices, step=step, position=position, record=record)
        self.stream = self._stream()
        self.plan.check_enough(steps)
        return tuple(self.plan.notes)

    def record(self, position: int) -> dict[str, Any]:
        return self.plan.record(position)

    def given(self, position: int) -> list[Given]:
        return self.plan.given(position)

    @property
    def order(self) -> str:
        return TOKENS

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, all sources together."""
        return sum(split.dataset.num_tokens for split in self._splits)

    def _reader(self) -> Callable[[np.ndarray, int], Batch]:
        return functools.partial(_read, self.stream)

    def sample_ids(self, position_tokens: int, global_batch_size: int, seq_length: int) -> list:
        """What every sample of the global batch (all ranks) reads, in order, for audits: a tuple of pieces
        (source, epoch, block, offset in the block, length)."""
        self._check(Step(position_tokens, global_batch_size, 1, seq_length), whole_batch=True)
        position_b = position_tokens + np.arange(global_batch_size, dtype=np.int64) * seq_length
        return self.stream.ids(position_b, seq_length)

    def evaluation_batches(
        self, micro_batch_size: int, seq_length: int, max_sequences: int | None = None
    ) -> Iterator[Batch]:
        """The split in file order, unshuffled: every token but a source's first is predicted exactly once over all
        ranks. The last rows are padded with loss_mask 0, and every rank gets the same number of batches."""
        self._check_open()
        rows = EvaluationRows(self._splits, seq_length)
        count = len(rows) if max_sequences is None else min(len(rows), max_sequences)
        stride = micro_batch_size * self.dp_size
        for first in range(0, count, stride):
            row_b = first + self.dp_rank * micro_batch_size + np.arange(micro_batch_size)
            yield _batch(*rows.read(row_b, count))

    def __enter__(self) -> Loader:
        return self


def build(cfg: Any, split: str, *, dp_rank: int, dp_size: int) -> Loader:
    """The loader of a split ("train" or "validation") of `cfg.data.path` or of every source of `cfg.data.blend`.

    Raises UserError for a missing, damaged or foreign file, a bad weight, a source listed twice or tokenized by another
    tokenizer than the first, and, for training, a source smaller than one sample.
    """
    data = cfg.data
    if (data.path is None) == (not data.blend):
        raise UserError("set either data.path or data.blend", where="data",
                        fix="Name a folder written by `mainspring prepare`")
    paths = [Path(data.path)] if data.path is not None else [Path(entry.path) for entry in data.blend]
    known: set[Path] = set()
    for place, path in enumerate(paths):
        if path.resolve() in known:
            raise UserError("is listed twice", where=f"data.blend[{place}] {path}", fix="Add up the weights")
        known.add(path.resolve())
    if data.num_workers < 0:
        raise UserError(f"{data.num_workers} is negative", where="data.num_workers", fix="0 reads without threads")
    seed = cfg.seed if data.shuffle_seed is None else data.shuffle_seed
    caches = [IndexCache(default_folder(path) if data.cache_dir is None else Path(data.cache_dir),
                         required=data.cache_dir is not None) for path in paths]
    splits = [open_split(path, split, remember=cache.folder) for path, cache in zip(paths, caches, strict=True)]
    same_tokenizer(paths, splits)
    loader = Loader(splits, Wanted.of(cfg), seq_length=cfg.model.seq_length, seed=seed,
                    caches=caches, dp_rank=dp_rank, dp_size=dp_size, num_workers=data.num_workers)
    if split == "train":
        _ = loader.stream  # too little data is an error now, not at the first step
    return loader


def _read(stream: TokenStream, position_b: np.ndarray, seq_length: int) -> Batch:
    return _batch(*stream.read(position_b, seq_length))


def _batch(tokens_bs: np.ndarray, labels_bs: np.ndarray, loss_mask_bs: np.ndarray | None = None) -> Batch:
    tokens = torch.from_numpy(tokens_bs)
    mask = torch.ones(tokens.shape) if loss_mask_bs is None else torch.from_numpy(loss_mask_bs)
    # Each batch its own, which may be written, and each row its own, which Megatron slices and pins.
    return Batch(tokens, torch.from_numpy(labels_bs), mask, _positions(*tokens.shape).clone())


@functools.lru_cache(maxsize=8)
def _positions(rows: int, length: int) -> torch.Tensor:
    return torch.arange(length).repeat(rows, 1)
