"""What attention must know of a micro-batch's rows: which of their tokens this rank holds, and where documents end.

It travels to the layers as Megatron's ``packed_seq_params``. Without one, a model takes its tokens for whole sequences.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from engine.data.loader import Batch
from engine.parallel import context
from engine_kernels.documents import Documents


@dataclass(frozen=True, eq=False)
class Sequence:
    """``length``: tokens of a whole row t. ``group``: the context-parallel ranks that share it, or None.

    ``documents_b``: for each row the boundaries [0, …, t] between its documents, or None where a row is one document.
    ``positions_bs``: for rows of documents, every token's position in its own, for this rank's s tokens.
    ``prefixes_b``: for each row and document the range [first, end) of the row that it goes on from, or None.
    """

    length: int
    group: Any = None
    documents_b: list[list[int]] | None = None
    positions_bs: torch.Tensor | None = None
    prefixes_b: list[list[tuple[int, int] | None]] | None = None

    @functools.cached_property
    def documents(self) -> Documents | None:
        """The same for the kernels: this rank's queries of those rows. One object, for what they keep in it."""
        if self.documents_b is None:
            return None
        return Documents(self.documents_b, context.chunks(self.length, self.group), prefixes_b=self.prefixes_b)


def share(batch: Batch, group: Any, device: torch.device) -> tuple[list[torch.Tensor], Sequence | None]:
    """This rank's [tokens, positions, labels, loss mask] [b, s] of a micro-batch, on the device, and their layout.

    The layout is None where rows are whole and hold one document each. Raises ``ValueError`` when a row's document
    boundaries do not run from 0 to the row's length. Prefixes are checked when attention first asks for them.
    """
    whole = (batch.tokens_bs, batch.position_ids_bs, batch.labels_bs, batch.loss_mask_bs)
    own = [context.slice_sequence(x_bs, group).to(device, non_blocking=True) for x_bs in whole]
    length, split = batch.tokens_bs.shape[1], group.size() > 1
    if batch.cu_seqlens_b is None:
        return own, Sequence(length, group) if split else None
    documents_b = [row.tolist() for row in batch.cu_seqlens_b]
    for row in documents_b:
        if row[0] != 0 or row[-1] != length or any(a >= b for a, b in itertools.pairwise(row)):
            raise ValueError(f"document boundaries {row} do not rise from 0 to the row's {length} tokens")
    return own, Sequence(length, group if split else None, documents_b, own[1], batch.prefixes_b)
