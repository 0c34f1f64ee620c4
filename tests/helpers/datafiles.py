"""What several tests of the data room share."""

from __future__ import annotations

import random
from types import SimpleNamespace


class Shuffled(list):
    """What os.scandir returns, in another order each time."""

    def __init__(self, entries):
        with entries:
            super().__init__(entries)
        random.shuffle(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def loader_config(path=None, *, blend=(), num_workers=0, cache_dir=None, shuffle_seed=None, seed=1, seq_length=16):
    """What loader.build reads of a Config, with values that Config itself would refuse allowed."""
    blend = [SimpleNamespace(path=path, weight=weight) for path, weight in blend]
    data = SimpleNamespace(path=path, blend=blend, num_workers=num_workers, cache_dir=cache_dir,
                           shuffle_seed=shuffle_seed)
    return SimpleNamespace(seed=seed, model=SimpleNamespace(seq_length=seq_length), data=data)
