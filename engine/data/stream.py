"""The virtual token stream: all blocks of a blend, one behind another, read from any position.

b rows, s tokens of a row; p pieces. A position counts tokens. Block j is at [j S, (j + 1) S), and a row
[position, position + s) with s <= S lies in one block or straddles two; each token keeps the label of its own block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.blend import BlendIndex
from engine.data.samples import SampleIndex
from engine.errors import UserError


class TokenStream:
    """Blocks of ``sources`` in the order of ``blend``; all sources have the same S. ``vocab_sizes`` None: unchecked."""

    def __init__(self, sources: Sequence[SampleIndex], blend: BlendIndex, vocab_sizes: Sequence[int | None]):
        self.sources, self.blend, self._vocab_sizes = list(sources), blend, list(vocab_sizes)
        self.seq_length = sources[0].seq_length

    def _pieces(self, position_b: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(block [p] of the stream, [p, 3] = offset in the block, length, place in the flat batch)."""
        block_b, offset_b = np.divmod(position_b, self.seq_length)
        length_b = np.minimum(seq_length, self.seq_length - offset_b)
        place_b = np.arange(len(position_b), dtype=np.int64) * seq_length
        head_b3 = np.stack([offset_b, length_b, place_b], axis=1)
        tail_b3 = np.stack([np.zeros_like(offset_b), seq_length - length_b, place_b + length_b], axis=1)
        pieces_p3, block_p = np.concatenate([head_b3, tail_b3]), np.concatenate([block_b, block_b + 1])
        present = pieces_p3[:, 1] > 0
        return block_p[present], pieces_p3[present]

    def read(self, position_b: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_bs, labels_bs), int64, of rows of ``seq_length`` <= S tokens from int64 positions."""
        tokens_bs = np.empty((len(position_b), seq_length), np.int64)
        labels_bs = np.empty_like(tokens_bs)
        block_p, pieces_p3 = self._pieces(position_b, seq_length)
        source_p, own_p = self.blend.locate(block_p)
        for number in np.unique(source_p):
            chosen, source = source_p == number, self.sources[number]
            seen = source.read(*source.locate(own_p[chosen]), pieces_p3[chosen], tokens_bs, labels_bs)
            check_vocabulary(source.dataset.bin_path, seen, self._vocab_sizes[number])
        return tokens_bs, labels_bs

    def ids(self, position_b: np.ndarray, seq_length: int) -> list[tuple[tuple[int, int, int, int, int], ...]]:
        """What each row reads, piece by piece: (source, epoch, block of that epoch's row, offset, length)."""
        block_p, pieces_p3 = self._pieces(position_b, seq_length)
        source_p, own_p = self.blend.locate(block_p)
        found: dict[int, list] = {}
        for source, own, (offset, length, place) in zip(source_p, own_p, pieces_p3, strict=True):
            epoch, block = self.sources[source].locate(np.array([own]))
            piece = (int(source), int(epoch[0]), int(block[0]), int(offset), int(length))
            found.setdefault(int(place) // seq_length, []).append(piece)
        return [tuple(found[row]) for row in range(len(position_b))]


def check_vocabulary(path, seen: tuple[int, int], vocab_size: int | None) -> None:
    """UserError when the smallest or largest token read is not one of ``vocab_size``."""
    if vocab_size is not None and not 0 <= seen[0] <= seen[1] < vocab_size:
        wrong = seen[0] if seen[0] < 0 else seen[1]
        raise UserError(f"holds token {wrong}, outside the vocabulary of {vocab_size} in manifest.json",
                        where=str(path), fix="Prepare the data again with `mainspring prepare`")
