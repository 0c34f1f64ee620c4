"""Sample order of one dataset: epoch after epoch of blocks of S + 1 tokens, each epoch shuffled anew.

Epoch e permutes the documents with key (seed, e), lays them in one row of N tokens and cuts it into (N - 1) // S
blocks; block b has the tokens [b S, b S + S], so neighbours share one, and every token of a block but the last has its
label. The blocks are permuted with key (seed, e) too. Nothing else enters: not the number of steps, ranks or workers.

p pieces; a piece is a row (position in the document order, offset, length, place in the batch).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from engine import _index
from engine.data.index_cache import IndexCache
from engine.data.indexed import IndexedDataset
from engine.errors import UserError

DOCUMENTS, BLOCKS = 0, 1  # purposes of the random streams of an epoch
_FORMAT = 1
_EPOCHS_HELD = 3  # a step may straddle two epochs while the next one is prefetched


@dataclass(frozen=True)
class Epoch:
    """One epoch's index (n documents, k blocks)."""

    order_n: np.ndarray  # int64, document at each place of the row
    starts_k2: np.ndarray  # int64, (place in order_n, offset in that document) of each block in the row
    blocks_k: np.ndarray  # int64, which block of the row comes when


class SampleIndex:
    """Infinitely many epochs of a dataset, each built on first use and kept on disk.

    Raises UserError when the dataset has not one block of ``seq_length`` + 1 tokens.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, seed: int, cache: IndexCache):
        if dataset.num_tokens == 0:
            raise UserError("the dataset is empty (0 tokens)", where=str(dataset.bin_path),
                            fix="Prepare it again from sources that leave text after cleaning")
        self.blocks_per_epoch = (dataset.num_tokens - 1) // seq_length
        if self.blocks_per_epoch == 0:
            raise UserError(
                f"{dataset.num_tokens} tokens are less than one sample of {seq_length + 1} (model.seq_length + 1)",
                where=str(dataset.bin_path),
                fix=f"Add data, or set model.seq_length to {dataset.num_tokens - 1} or less"
                if dataset.num_tokens > 1 else "Add data",
            )
        self.dataset, self.seq_length, self.seed = dataset, seq_length, seed % 2**64
        self._cache = cache
        self._held: OrderedDict[int, Epoch] = OrderedDict()
        self._lock = threading.Lock()  # prefetch threads share the index

    def epoch(self, number: int) -> Epoch:
        """Index of epoch ``number``, counted from 0."""
        with self._lock:
            if number not in self._held:
                self._held[number] = self._load(number)
                while len(self._held) > _EPOCHS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(number)
            return self._held[number]

    def _load(self, epoch: int) -> Epoch:
        documents, blocks = len(self.dataset), self.blocks_per_epoch
        fingerprint = self.dataset.fingerprint
        key = {"format": _FORMAT, "idx_sha256": fingerprint, "seq_length": self.seq_length, "seed": self.seed,
               "epoch": epoch}
        name = f"{fingerprint[:16]}-length{self.seq_length}-seed{self.seed}-epoch{epoch}.samples"
        flat = self._cache.load_or_build(name, key, documents + 3 * blocks, lambda: self._build(epoch))
        order_n, starts, blocks_k = np.split(flat, [documents, documents + 2 * blocks])
        return Epoch(order_n, starts.reshape(blocks, 2), blocks_k)

    def _build(self, epoch: int) -> np.ndarray:
        order_n = _index.shuffled(len(self.dataset), self.seed, epoch, DOCUMENTS)
        starts_k2 = _index.sample_starts(self.dataset.sizes, order_n, self.seq_length, self.blocks_per_epoch)
        blocks_k = _index.shuffled(self.blocks_per_epoch, self.seed, epoch, BLOCKS)
        return np.concatenate([order_n, starts_k2.reshape(-1), blocks_k])

    def locate(self, sample_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch [p], block of that epoch's row [p]) of the dataset's n-th blocks in shuffled order."""
        epoch_p, turn_p = np.divmod(sample_p, self.blocks_per_epoch)
        block_p = np.empty_like(turn_p)
        for number in np.unique(epoch_p):
            chosen = epoch_p == number
            block_p[chosen] = self.epoch(int(number)).blocks_k[turn_p[chosen]]
        return epoch_p, block_p

    def read(
        self, epoch_p: np.ndarray, block_p: np.ndarray, ranges_p3: np.ndarray, tokens: np.ndarray, labels: np.ndarray
    ) -> tuple[int, int]:
        """Copies parts of blocks, ranges_p3 = (offset in the block, length, place in tokens), tokens and labels being
        int64 arrays of one shape. Returns the smallest and the largest token read."""
        low, high = [], []
        for number in np.unique(epoch_p):
            chosen = epoch_p == number
            epoch = self.epoch(int(number))
            pieces_p4 = np.concatenate([epoch.starts_k2[block_p[chosen]], ranges_p3[chosen, 1:]], axis=1)
            pieces_p4[:, 1] += ranges_p3[chosen, 0]
            seen = self.dataset.gather(epoch.order_n, pieces_p4, tokens, labels)
            low.append(seen[0])
            high.append(seen[1])
        return min(low), max(high)
