"""Rows for evaluation: each source in file order, cut every s tokens; a source's N tokens give N - 1 predictions.

b rows of a batch, s tokens of a row, p pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.indexed import reading
from engine.data.prepared import PreparedSplit
from engine.data.stream import check_vocabulary
from engine.errors import UserError


class EvaluationRows:
    """All rows of the sources, one source behind another; ``len`` of them. UserError when nothing can be predicted."""

    def __init__(self, splits: Sequence[PreparedSplit], seq_length: int):
        usable = [split for split in splits if split.dataset.num_tokens >= 2]
        if not usable:
            raise UserError(f"{splits[0].dataset.num_tokens} tokens, evaluation needs at least 2",
                            where=splits[0].dataset.where, fix="Prepare a larger validation split")
        splits = usable  # a source of a blend may be too small to hold out a document
        self._splits, self._seq_length = splits, seq_length
        predictions = np.array([split.dataset.num_tokens - 1 for split in splits], np.int64)
        self._rows = -(-predictions // seq_length)
        self._first = np.concatenate([[0], np.cumsum(self._rows)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, row_b: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens_bs, labels_bs int64, loss_mask_bs float32); rows from ``count`` on are padding."""
        tokens_bs = np.zeros((len(row_b), self._seq_length), np.int64)
        labels_bs, mask_bs = np.zeros_like(tokens_bs), np.zeros(tokens_bs.shape, np.float32)
        for number, split in enumerate(self._splits):
            low, high = self._first[number], min(self._first[number + 1], count)
            place_p = np.flatnonzero((row_b >= low) & (row_b < high))
            if not len(place_p):
                continue
            token_p = (row_b[place_p] - low) * self._seq_length
            length_p = np.minimum(self._seq_length, split.dataset.num_tokens - 1 - token_p)
            pieces_p3 = np.stack([token_p, length_p, place_p * self._seq_length], axis=1)
            with reading([split.dataset]):
                seen = split.dataset.corpus.gather(pieces_p3, tokens_bs, labels_bs)
            check_vocabulary(split.dataset.where, seen, split.vocab_size)
            mask_bs[place_p] = np.arange(self._seq_length) < length_p[:, None]
        return tokens_bs, labels_bs, mask_bs
