"""Batches that need no prepared data, laid out over ranks as ``engine.data.loader`` lays them out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from engine.data.loader import Batch


class SyntheticData:
    """Random tokens with uneven loss masks, the same global batch under every layout.

    Sample j = (m dp_size + r) b + k of the batch at a position is drawn from (seed, position, j): row k of micro-batch
    m on data-parallel rank r. Nine tenths of the first sample's tokens are supervised, ever fewer of those after it and
    a twentieth of the last's: ranks and micro-batches never hold equally many. ``packed``: rows of documents.
    """

    def __init__(self, vocab_size: int, seed: int, *, dp_rank: int, dp_size: int, packed: bool = False):
        self.vocab_size, self.seed, self.packed = vocab_size, seed, packed
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def micro_batches(
        self, position_tokens: int, *, global_batch_size: int, micro_batch_size: int, seq_length: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch at a position."""
        for m in range(global_batch_size // (micro_batch_size * self.dp_size)):
            first = (m * self.dp_size + self.dp_rank) * micro_batch_size
            samples = [self._sample(position_tokens, j, seq_length, 0.9 - 0.85 * j / global_batch_size)
                       for j in range(first, first + micro_batch_size)]
            tokens_bs, mask_bs, positions_bs = (torch.stack([sample[i] for sample in samples]) for i in range(3))
            yield Batch(tokens_bs=tokens_bs[:, :-1].contiguous(), labels_bs=tokens_bs[:, 1:].contiguous(),
                        loss_mask_bs=mask_bs, position_ids_bs=positions_bs,
                        cu_seqlens_b=[_boundaries(row_s) for row_s in positions_bs] if self.packed else None)

    def _sample(self, position: int, j: int, length: int, share: float) -> tuple[torch.Tensor, ...]:
        """(tokens [s + 1], loss mask [s], position in the document [s])."""
        digest = hashlib.sha256(f"{self.seed}:{position}:{j}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        tokens_s = torch.randint(self.vocab_size, (length + 1,), generator=draw)
        mask_s = torch.zeros(length)
        mask_s[torch.randperm(length, generator=draw)[: max(1, round(share * length))]] = 1.0
        positions_s = torch.arange(length)
        if self.packed:  # three documents, or fewer where two begin at one place
            starts = torch.randint(length, (2,), generator=draw).sort().values
            first_s = torch.zeros_like(positions_s)
            for start in starts:
                first_s[start:] = start
            positions_s = positions_s - first_s
        return tokens_s, mask_s, positions_s


def _boundaries(positions_s: torch.Tensor) -> torch.Tensor:
    """Where a row's documents begin, and its end: int32."""
    starts = (positions_s == 0).nonzero().flatten()
    return torch.cat([starts, torch.tensor([len(positions_s)])]).to(torch.int32)
