"""Sample order of one dataset: epoch after epoch of blocks of S + 1 tokens, each epoch shuffled anew.

The N documents are in G = ceil(N / 512) groups: group g has the documents g, g + G, g + 2 G, …, so that each samples
the whole dataset. Epoch e lays the groups in an order of key (seed, e) in one row, the documents of each group in an
order of key (seed, e, g), and cuts the row of T tokens into (T - 1) // S blocks; block b has the tokens [b S, b S +
S], so neighbours share one, and every token of a block but the last has its label. The blocks come in an order of key
(seed, e). Nothing else enters: not the number of steps, ranks or workers, and not how the dataset is cut into shards.

No array is as long as the documents or the blocks. The tokens of each group (8 bytes of 512 documents) do not depend on
the epoch; they are computed once and kept on disk. The rest is csrc/index/samples.hpp: orders are computed a place at a
time, and a block is found by a search in the groups' running sum and a walk of at most 512 documents.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from engine import _index
from engine.data.index_cache import IndexCache
from engine.data.indexed import IndexedDataset, reading
from engine.errors import UserError

GROUP = 512  # documents, at most: csrc/index/samples.hpp has it too, and it is part of the order
_FORMAT = 2
_ENDS = 1 << 14  # tokens


class SampleIndex:
    """Infinitely many epochs of a dataset. ``order`` is what `engine._index.gather` reads from.

    Raises UserError when the dataset has not one block of ``seq_length`` + 1 tokens.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, seed: int, cache: IndexCache):
        if dataset.num_tokens == 0:
            raise UserError("the dataset is empty (0 tokens)", where=dataset.where,
                            fix="Prepare it again from sources that leave text after cleaning")
        self.blocks_per_epoch = (dataset.num_tokens - 1) // seq_length
        if self.blocks_per_epoch == 0:
            raise UserError(
                f"{dataset.num_tokens} tokens are less than one sample of {seq_length + 1} (model.seq_length + 1)",
                where=dataset.where,
                fix=f"Add data, or set model.seq_length to {dataset.num_tokens - 1} or less"
                if dataset.num_tokens > 1 else "Add data",
            )
        self.dataset, self.seq_length, self.seed = dataset, seq_length, seed % 2**64
        self._totals = group_tokens(dataset, cache)
        self.order = _index.SampleOrder(dataset.corpus, self._totals, seq_length, self.seed)

    @functools.cached_property
    def content(self) -> str:
        """What tells these data from others, the same in one pair of files as in shards: SHA-256 of the documents'
        number, their lengths by group, and the first and last tokens (the lengths are the same where all documents
        were cut to one)."""
        tokens = self.dataset.num_tokens
        ends_4k = np.zeros((4, min(tokens - 1, _ENDS)), np.int64)
        length = ends_4k.shape[1]
        with reading([self.dataset]):
            for place, first in enumerate((0, tokens - 1 - length)):
                pieces = np.array([[first, length, 0]])
                self.dataset.corpus.gather(pieces, ends_4k[2 * place], ends_4k[2 * place + 1])
        digest = hashlib.sha256(f"{len(self.dataset)} ".encode())
        digest.update(self._totals.data)
        digest.update(ends_4k.data)
        return digest.hexdigest()

    def locate(self, sample_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch [p], block of that epoch's row [p]) of the dataset's n-th blocks in shuffled order."""
        return self.order.locate(sample_p)


def group_tokens(dataset: IndexedDataset, cache: IndexCache) -> np.ndarray:
    """Tokens of each group, int64 [G]; from the cache, or in one pass over the lengths and then kept there."""
    groups = -(-len(dataset) // GROUP)
    key = {"format": _FORMAT, "idx_sha256": dataset.fingerprint, "group": GROUP}
    return cache.load_or_build(f"{dataset.fingerprint[:16]}.groups", key, groups, dataset.corpus.group_tokens)
