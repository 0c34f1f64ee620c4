"""Recovery from lack of memory keeps the global batch, the loss and the weights."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from engine.train.oom import is_out_of_memory, smaller_micro_batch


@pytest.mark.parametrize(("micro", "batch", "ranks", "smaller"), [
    (8, 16, 1, 4), (8, 24, 1, 4), (6, 12, 1, 3), (7, 14, 1, 2), (8, 16, 2, 4), (3, 9, 1, 1), (2, 6, 3, 1)])
def test_smaller_micro_batch_divides_the_ranks_share(micro, batch, ranks, smaller):
    assert smaller_micro_batch(micro, batch, ranks) == smaller
    assert batch // ranks % smaller == 0


def test_a_single_sequence_cannot_shrink():
    with pytest.raises(UserError, match=r"train\.micro_batch_size: out of memory with a single sequence"):
        smaller_micro_batch(1, 8, 1)


def test_only_lack_of_memory_counts():
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(MemoryError("can't allocate memory"))
