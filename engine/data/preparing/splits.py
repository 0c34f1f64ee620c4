"""Which split a document is in: by its key alone, but for a handful of documents where a split would be empty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config.prepare import PrepareConfig

TRAIN, VALIDATION, TEST = range(3)
_NAMES = ("train", "validation", "test")

# (key, unit, document): sorts by key, ties by place
Keyed = tuple[int, int, int]


def names_of(config: PrepareConfig) -> tuple[str, ...]:
    """The splits that are written: test only where it was asked for."""
    return _NAMES if config.test_fraction else _NAMES[:2]


@dataclass(frozen=True)
class Thresholds:
    """Keys below ``validation`` are held out for validation, those from there to ``test`` for test."""

    validation: int
    test: int

    @classmethod
    def of(cls, config: PrepareConfig) -> Thresholds:
        share = int(config.validation_fraction * 2**64)
        return cls(share, min(2**64 - 1, share + int(config.test_fraction * 2**64)))

    def splits(self, keys: np.ndarray) -> np.ndarray:
        """[documents] uint8 of [documents] uint64."""
        held_out = np.where(keys < np.uint64(self.validation), np.uint8(VALIDATION), np.uint8(TEST))
        return np.where(keys < np.uint64(self.test), held_out, np.uint8(TRAIN))


@dataclass
class Extremes:
    """Of each split the documents with the smallest and with the largest keys: all that `forced` needs to know."""

    lowest: list[list[Keyed]]
    highest: list[list[Keyed]]
    counts: list[int]

    KEPT = 3

    @classmethod
    def of(cls, unit: int, keys: np.ndarray, documents: np.ndarray, thresholds: Thresholds) -> Extremes:
        """``keys`` [n] uint64 of the unit's kept ``documents`` [n], their numbers."""
        splits = thresholds.splits(keys)
        lowest, highest, counts = [], [], []
        for split in range(len(_NAMES)):
            inside = np.flatnonzero(splits == split)
            order = inside[np.lexsort((documents[inside], keys[inside]))]
            for found, ends in ((lowest, order[: cls.KEPT]), (highest, order[-cls.KEPT :])):
                found.append([(int(keys[at]), unit, int(documents[at])) for at in ends])
            counts.append(len(inside))
        return cls(lowest, highest, counts)

    @classmethod
    def merged(cls, parts: Iterable[Extremes]) -> Extremes:
        total = cls([[], [], []], [[], [], []], [0, 0, 0])
        for part in parts:
            for split in range(len(_NAMES)):
                total.lowest[split] = sorted([*total.lowest[split], *part.lowest[split]])[: cls.KEPT]
                total.highest[split] = sorted([*total.highest[split], *part.highest[split]])[-cls.KEPT :]
                total.counts[split] += part.counts[split]
        return total

    def as_json(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "highest": self.highest, "counts": self.counts}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Extremes:
        def keyed(lists):
            return [[(key, unit, document) for key, unit, document in items] for items in lists]

        return cls(keyed(data["lowest"]), keyed(data["highest"]), data["counts"])


def forced(extremes: Extremes, config: PrepareConfig) -> dict[tuple[int, int], int]:
    """(unit, document) -> split, for those that are not where their key says. At most three.

    One document is train; of two, one is validation if that is wanted; of three, one is test if that is. A document
    moves only where the fractions of so few would be none: the one with the largest key to train, with the smallest
    to the others.
    """
    total = sum(extremes.counts)
    ends = (extremes.lowest, extremes.highest)
    where = {keyed: split for known in ends for split in range(len(_NAMES)) for keyed in known[split]}
    counts, moved = list(extremes.counts), {}
    wanted = [
        (TRAIN, 1, True, (TEST, VALIDATION)),
        (VALIDATION, 2, config.validation_fraction > 0, (TRAIN, TEST)),
        (TEST, 3, config.test_fraction > 0, (TRAIN, VALIDATION)),
    ]
    for split, least, is_wanted, givers in wanted:
        if not is_wanted or total < least or counts[split]:
            continue
        # A split that matters less may give its last.
        giver = next(other for other in givers if counts[other] > (1 if other < split else 0))
        choose = max if split == TRAIN else min
        keyed = choose(keyed for keyed, there in where.items() if there == giver)
        counts[giver], counts[split], where[keyed] = counts[giver] - 1, counts[split] + 1, split
        moved[keyed[1:]] = split
    return moved
