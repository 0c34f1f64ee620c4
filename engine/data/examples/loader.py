"""Rows of examples by position: row j of the run is [j s, (j + 1) s) of the positions, whatever the ranks.

b rows of a micro-batch, s positions of a row. Sources give rows in proportion to their weights, each source's own rows
epoch after epoch (engine/data/packing.py). Documents of a row do not see each other; what is left of it is one more,
of padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.data import packing
from engine.data.ahead import Step, StepReader
from engine.data.blend import BlendIndex
from engine.data.examples.store import Store
from engine.data.ledger import Given
from engine.data.loader import Batch
from engine.data.order import BLENDED_ROWS, ROWS
from engine.errors import UserError


class RowId(NamedTuple):
    """What a row holds, for audits: places of examples in a source's store."""

    source: int
    epoch: int
    row: int
    examples: tuple[int, ...]


class Share(NamedTuple):
    """What a source gives to a run."""

    source: str
    rows: int
    epochs: float


class Canvas:
    """A micro-batch being written: [b, s] of padding at first, and for each row where its documents end."""

    def __init__(self, rows: int, seq_length: int, pad_id: int):
        self.seq_length = seq_length
        self.tokens_bs = np.full((rows, seq_length), pad_id, np.int64)
        self.labels_bs = self.tokens_bs.copy()
        self.mask_bs = np.zeros((rows, seq_length), np.float32)
        self.positions_bs = np.zeros((rows, seq_length), np.int64)
        self.ends_b: list[list[int]] = [[0] for _ in range(rows)]

    def document(self, row: int, tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray | float, first: int = 0
                 ) -> slice:
        """Appends a document to a row; its positions count from ``first``. -> where it stands in the row."""
        begin = self.ends_b[row][-1]
        place = slice(begin, begin + len(tokens))
        assert place.stop <= self.seq_length, "a row was packed too full"
        self.tokens_bs[row, place], self.labels_bs[row, place], self.mask_bs[row, place] = tokens, labels, mask
        self.positions_bs[row, place] = np.arange(first, first + len(tokens))
        self.ends_b[row].append(place.stop)
        return place

    def finish(self) -> Batch:
        for row, ends in enumerate(self.ends_b):
            if rest := self.seq_length - ends[-1]:
                self.positions_bs[row, ends[-1]:] = np.arange(rest)
                ends.append(self.seq_length)
        return Batch(torch.from_numpy(self.tokens_bs), torch.from_numpy(self.labels_bs), torch.from_numpy(self.mask_bs),
                     torch.from_numpy(self.positions_bs),
                     cu_seqlens_b=[torch.tensor(ends, dtype=torch.int32) for ends in self.ends_b])


class Corpus:
    """Stores in a blend, as rows of examples: what the reader threads know. Subclasses say what an example becomes."""

    def __init__(self, stores: Sequence[Store], weights: Sequence[float], *, seq_length: int, seed: int, pad_id: int,
                 packed: bool):
        self.stores, self.seq_length, self.pad_id, self.packed = list(stores), seq_length, pad_id, packed
        self.sizes = [self.positions(store) for store in stores]
        self.indices = [packing.RowIndex(sizes, seq_length, seed, packing=packed) for sizes in self.sizes]
        self.blend = BlendIndex(weights) if stores else BlendIndex([1.0])
        self.first_example = np.concatenate([[0], np.cumsum([len(store) for store in stores])])

    def positions(self, store: Store) -> np.ndarray:
        """How many positions of a row each example takes: an example of n tokens, n - 1."""
        return store.lengths_np.sum(1, dtype=np.int32) - 1

    def batch(self, rows: Sequence[tuple[int, np.ndarray]]) -> Batch:
        """(source, its examples) of every row -> the micro-batch."""
        canvas = Canvas(len(rows), self.seq_length, self.pad_id)
        for row, (source, examples) in enumerate(rows):
            for example in examples.tolist():
                tokens, mask = self.stores[source].example(example)
                canvas.document(row, tokens[:-1], tokens[1:], mask[1:])
        return canvas.finish()

    def locate(self, row_b: np.ndarray) -> list[tuple[int, int]]:
        """(source, which of its rows) of rows of the run."""
        source_b, own_b = self.blend.locate(row_b)
        return list(zip(source_b.tolist(), own_b.tolist(), strict=True))

    def read(self, position_b: np.ndarray, seq_length: int) -> Batch:
        return self.batch([(source, self.indices[source].examples(own))
                           for source, own in self.locate(position_b // seq_length)])

    @functools.cached_property
    def in_order(self) -> list[packing.Packing]:
        """The rows of each source for evaluation: packed in the order of the store."""
        return [packing.pack(sizes, self.seq_length, packing=self.packed) for sizes in self.sizes]


class ExampleLoader(StepReader):
    """Rows of supervised examples for one data-parallel rank; has the interface of ``engine.data.loader.Loader``."""

    corpus_type: type[Corpus] = Corpus
    report: tuple[str, ...] = ()  # a line for people of every source
    fingerprint: str = ""  # hash of all tokens, in the order of the sources

    def __init__(self, stores: Sequence[Store], weights: Sequence[float], *, seq_length: int, seed: int, pad_id: int,
                 packed: bool, dp_rank: int, dp_size: int, num_workers: int):
        self.corpus = self.corpus_type(stores, weights, seq_length=seq_length, seed=seed, pad_id=pad_id, packed=packed)
        super().__init__(seq_length=seq_length, dp_rank=dp_rank, dp_size=dp_size, num_workers=num_workers)

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples together, each counted once."""
        return sum(store.num_tokens for store in self.corpus.stores)

    @property
    def order(self) -> str:  # of more than one source it depends on the blend's too
        return ROWS if len(self.corpus.stores) < 2 else BLENDED_ROWS

    @property
    def num_examples(self) -> int:
        return int(self.corpus.first_example[-1])

    @property
    def rows_per_epoch(self) -> int:
        """As many rows as all sources have: with one source, or weights like the sources' sizes, each example once."""
        return sum(index.rows_per_epoch for index in self.corpus.indices)

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch's rows that examples take, the rest being padding."""
        taken = sum(int(sizes.sum(dtype=np.int64)) for sizes in self.corpus.sizes)
        return taken / max(1, self.rows_per_epoch * self.seq_length)

    def sample_ids(self, position_tokens: int, global_batch_size: int, seq_length: int) -> list[RowId]:
        """What every row of the global batch (all ranks) holds, in order, for audits."""
        self._check(Step(position_tokens, global_batch_size, 1, seq_length), whole_batch=True)
        rows = self.corpus.locate(position_tokens // seq_length + np.arange(global_batch_size, dtype=np.int64))
        found = [(source, self.corpus.indices[source], own) for source, own in rows]
        return [RowId(source, *index.locate(own), tuple(index.examples(own).tolist())) for source, index, own in found]

    def ledger(self, rows: int) -> list[Share]:
        """What each source gives to a run's first ``rows`` rows."""
        counts = self.corpus.blend.counts(rows).tolist()
        return [Share(store.source, count, count / index.rows_per_epoch)
                for store, index, count in zip(self.corpus.stores, self.corpus.indices, counts, strict=True)]

    def given(self, position: int) -> list[Given]:
        return [Given(share.source, share.rows, share.rows * self.seq_length, share.epochs, share.epochs * len(store))
                for share, store in zip(self.ledger(position // self.seq_length), self.corpus.stores, strict=True)]

    def evaluation_batches(
        self, micro_batch_size: int, seq_length: int, max_sequences: int | None = None
    ) -> Iterator[Batch]:
        """Every example once over all ranks, in the order of the files as far as packing leaves it; or of the first
        ``max_sequences`` rows. Every rank gets the same number of batches, the last ones filled up with padding."""
        self._check(Step(0, micro_batch_size * self.dp_size, micro_batch_size, seq_length))
        rows = [(source, row) for source, order in enumerate(self.corpus.in_order) for row in range(len(order))]
        rows = rows[:max_sequences]
        empty = np.empty(0, np.int64)
        for first in range(0, len(rows), micro_batch_size * self.dp_size):
            own = rows[first + self.dp_rank * micro_batch_size:][:micro_batch_size]
            filled = [(source, self.corpus.in_order[source][row]) for source, row in own]
            yield self.corpus.batch([*filled, *[(0, empty)] * (micro_batch_size - len(filled))])

    def __enter__(self) -> ExampleLoader:
        return self

    def _reader(self) -> Callable[[np.ndarray, int], Batch]:
        return self.corpus.read

    def _check(self, step: Step, whole_batch: bool = False) -> None:
        super()._check(step, whole_batch)
        if step.seq_length != self.seq_length:
            raise UserError(f"rows of examples are packed to model.seq_length ({self.seq_length}), not to "
                            f"{step.seq_length}", where="train.seq_length_schedule", fix="Leave it empty")
        if step.position % step.seq_length:
            raise UserError(f"position {step.position} is not at the beginning of a row of {step.seq_length}",
                            where="resume_from_checkpoint",
                            fix="Resume with the model.seq_length that the checkpoint was trained with")
