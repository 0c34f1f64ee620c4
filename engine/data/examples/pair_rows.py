"""Rows of preference pairs. A pair stays in one row, so that no micro-batch holds half of one.

P, C, R tokens of prompt, chosen and rejected answer. With the prompt shared, a pair is three documents of
(P - 1) + C + R positions: prompt[:-1], then two branches that go on from it and also see it, prompt[-1:] + chosen[:-1]
with the labels chosen, and prompt[-1:] + rejected[:-1] with the labels rejected. Else it is two documents of
(P + C - 1) + (P + R - 1) positions, prompt + chosen and prompt + rejected, with the same labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.data.examples.loader import Canvas, Corpus, ExampleLoader
from engine.data.examples.store import Pair, Store
from engine.data.loader import Batch, Pairs


def positions(prompt, chosen, rejected, *, shared: bool):
    """How many positions a pair of these lengths takes; numbers or arrays."""
    return (prompt - 1) * (1 if shared else 2) + chosen + rejected


class PairCorpus(Corpus):
    """Stores of pairs. ``reference_n2``: log-probabilities of every pair's answers by its place, once known."""

    shared = True
    reference_n2: torch.Tensor | None = None  # float64

    def positions(self, store: Store) -> np.ndarray:
        return positions(*store.lengths_np.T, shared=self.shared).astype(np.int32)

    def batch(self, rows: Sequence[tuple[int, np.ndarray]]) -> Batch:
        canvas = Canvas(len(rows), self.seq_length, self.pad_id)
        branch_bs = np.full((len(rows), self.seq_length), -1, np.int64)
        prefixes_b: list[list[tuple[int, int] | None]] = []
        ids: list[int] = []
        for row, (source, examples) in enumerate(rows):
            prefixes_b.append([])
            for example in examples.tolist():
                write = self._branches if self.shared else self._whole
                write(canvas, row, self.stores[source].pair(example), branch_bs[row], 2 * len(ids), prefixes_b[-1])
                ids.append(int(self.first_example[source]) + example)
        batch = canvas.finish()
        if self.shared:
            for prefixes, ends in zip(prefixes_b, canvas.ends_b, strict=True):
                prefixes += [None] * (len(ends) - 1 - len(prefixes))  # the padding
            batch.prefixes_b = prefixes_b
        ids_p = torch.tensor(ids, dtype=torch.int64)
        reference_p2 = None if self.reference_n2 is None else self.reference_n2[ids_p]
        batch.pairs = Pairs(torch.from_numpy(branch_bs), ids_p, reference_p2)
        return batch

    @staticmethod
    def _branches(canvas: Canvas, row: int, pair: Pair, branch_s: np.ndarray, branch: int,
                  prefixes: list[tuple[int, int] | None]) -> None:
        seen, shared = None, len(pair.prompt) - 1
        if shared:
            place = canvas.document(row, pair.prompt[:-1], pair.prompt[1:], 0.0)
            prefixes.append(None)
            seen = (place.start, place.stop)
        for number, answer in enumerate((pair.chosen, pair.rejected)):
            tokens = np.concatenate([pair.prompt[-1:], answer[:-1]])
            branch_s[canvas.document(row, tokens, answer, 1.0, first=shared)] = branch + number
            prefixes.append(seen)

    @staticmethod
    def _whole(canvas: Canvas, row: int, pair: Pair, branch_s: np.ndarray, branch: int,
               prefixes: list[tuple[int, int] | None]) -> None:
        for number, answer in enumerate((pair.chosen, pair.rejected)):
            tokens = np.concatenate([pair.prompt, answer])
            mask = np.arange(1, len(tokens)) >= len(pair.prompt)
            place = canvas.document(row, tokens[:-1], tokens[1:], mask)
            branch_s[place][mask] = branch + number


class _UnsharedPairCorpus(PairCorpus):
    shared = False


class PairLoader(ExampleLoader):
    """Rows of preference pairs for one data-parallel rank, the prompt computed once for both answers."""

    corpus_type = PairCorpus
    corpus: PairCorpus

    def set_reference(self, reference_n2: torch.Tensor) -> None:
        """The reference's summed log-probabilities [n, 2] (chosen, rejected) of every pair, by ``Pairs.ids_p``.

        Batches read from here on carry them; what was read ahead is dropped.
        """
        if reference_n2.shape != (self.num_examples, 2):
            raise ValueError(f"reference {tuple(reference_n2.shape)} must be [{self.num_examples}, 2]")
        self._drop_ahead()
        self.corpus.reference_n2 = reference_n2.double()

    def __enter__(self) -> PairLoader:
        return self


class UnsharedPairLoader(PairLoader):
    """The same pairs as two documents each, which know nothing of each other."""

    corpus_type = _UnsharedPairCorpus
