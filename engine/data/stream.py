"""The virtual token stream: all blocks of a blend, one behind another, read from any position.

b rows, s tokens of a row; p pieces. A position counts tokens. Block j is at [j S, (j + 1) S), and a row
[position, position + s) with s <= S lies in one block or straddles two; each token keeps the label of its own block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine import _index
from engine.data.blend import BlendIndex
from engine.data.indexed import reading
from engine.data.samples import SampleIndex
from engine.errors import UserError


class TokenStream:
    """Blocks of ``sources`` in the order of ``blend``; all sources have the same S. ``vocab_sizes`` None: unchecked."""

    def __init__(self, sources: Sequence[SampleIndex], blend: BlendIndex, vocab_sizes: Sequence[int | None]):
        self.sources, self.blend, self._vocab_sizes = list(sources), blend, list(vocab_sizes)
        self.seq_length = sources[0].seq_length
        self._datasets, self._orders = [s.dataset for s in sources], [s.order for s in sources]

    def _pieces(self, position_b: np.ndarray, seq_length: int) -> np.ndarray:
        """[p, 5] = source, its n-th block, offset in the block, length, place in the flat batch."""
        pieces_p5 = _index.pieces(position_b, seq_length, self.seq_length)
        pieces_p5[:, 0], pieces_p5[:, 1] = self.blend.locate(pieces_p5[:, 1])
        return pieces_p5

    def read(self, position_b: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_bs, labels_bs), int64, of rows of ``seq_length`` <= S tokens from int64 positions."""
        tokens_bs = np.empty((len(position_b), seq_length), np.int64)
        labels_bs = np.empty_like(tokens_bs)
        pieces_p5 = self._pieces(position_b, seq_length)
        with reading(self._datasets):
            ranges = _index.gather(self._orders, pieces_p5, tokens_bs, labels_bs)
        for dataset, vocab_size, seen in zip(self._datasets, self._vocab_sizes, ranges, strict=True):
            check_vocabulary(dataset.where, seen, vocab_size)
        return tokens_bs, labels_bs

    def ids(self, position_b: np.ndarray, seq_length: int) -> list[tuple[tuple[int, int, int, int, int], ...]]:
        """What each row reads, piece by piece: (source, epoch, block of that epoch's row, offset, length)."""
        found: list[list[tuple[int, int, int, int, int]]] = [[] for _ in position_b]
        for source, own, offset, length, place in self._pieces(position_b, seq_length).tolist():
            epoch, block = self.sources[source].locate(np.array([own]))
            found[place // seq_length].append((source, int(epoch[0]), int(block[0]), offset, length))
        return [tuple(pieces) for pieces in found]


def check_vocabulary(where: str, seen: tuple[int, int], vocab_size: int | None) -> None:
    """UserError when the smallest or largest token read is not one of ``vocab_size``; (larger, smaller) is nothing."""
    low, high = seen
    if vocab_size is not None and low <= high and not 0 <= low <= high < vocab_size:
        raise UserError(f"holds token {low if low < 0 else high}, outside the vocabulary of {vocab_size} in "
                        "manifest.json", where=where, fix="Prepare the data again with `mainspring prepare`")
