"""What several tests of the data room share."""

from __future__ import annotations

import random
from types import SimpleNamespace

from engine.config import TrainConfig


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


def loader_config(path=None, *, blend=(), num_workers=0, cache_dir=None, shuffle_seed=None, seed=1, seq_length=16,
                  blend_by="tokens", changes=(), **train):
    """What loader.build reads of a Config, with values that Config itself would refuse allowed.

    ``blend``: (path, weight) or (path, weight, max_epochs); ``changes``: (step, weights); ``train``: TrainConfig's.
    """
    blend = [SimpleNamespace(path=path, weight=weight, max_epochs=limit[0] if limit else None)
             for path, weight, *limit in blend]
    changes = [SimpleNamespace(step=step, weights=weights) for step, weights in changes]
    data = SimpleNamespace(path=path, blend=blend, num_workers=num_workers, cache_dir=cache_dir,
                           shuffle_seed=shuffle_seed, blend_by=blend_by, blend_changes=changes)
    return SimpleNamespace(seed=seed, model=SimpleNamespace(seq_length=seq_length), data=data,
                           train=TrainConfig(**train))
