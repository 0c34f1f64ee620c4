"""Near-duplicate documents in `prepare` (``--near_dedup.threshold 0.8``): what is compared, and how like is alike."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from engine.config.base import Problem, Section, option

# A candidate too many costs a comparison of two signatures, one too few leaves a duplicate in the data.
_MISSED_WEIGHT = 0.9


class NearDedupConfig(Section):
    """MinHash signatures over word shingles, found by locality-sensitive hashing in bands, then compared whole."""

    threshold: float = option(0.8, "share of shingles in common (Jaccard), from which on two documents are the same",
                              "fraction", ge=0.3, le=1)  # fmt: skip
    permutations: int = option(128, "numbers in a signature, a multiple of 16; twice as many halve the variance", ge=16,
                               le=1024)  # fmt: skip
    shingle_words: int = option(5, "consecutive words that make a shingle; a shorter text has no near-duplicates",
                                "words", ge=1, le=32)  # fmt: skip
    bands: int | None = option(None, "bands of a signature; documents that agree in one of them are compared", ge=1)
    rows: int | None = option(None, "numbers in a band; unset, both follow from threshold and permutations", ge=1)
    seed: int = option(1, "seed of the permutations", ge=0, lt=2**64)

    def problems(self) -> Iterator[Problem]:
        if self.permutations % 16:
            text = f"{self.permutations} is no multiple of 16"
            yield Problem("permutations", text, f"Use {self.permutations // 16 * 16 + 16}")
        if (self.bands is None) != (self.rows is None):
            given, other = ("rows", "bands") if self.bands is None else ("bands", "rows")
            yield Problem(given, f"is set without {other}", "Set both or none")
        elif self.bands and self.rows and self.bands * self.rows > self.permutations:
            text = f"{self.bands} bands of {self.rows} rows need {self.bands * self.rows} permutations"
            yield Problem("bands", text, f"Use {self.permutations // self.rows} at most, or more permutations")

    @property
    def split(self) -> tuple[int, int]:
        """(bands, rows in each)."""
        if self.bands is not None and self.rows is not None:
            return self.bands, self.rows
        return best_split(self.threshold, self.permutations)


@lru_cache(maxsize=64)
def best_split(threshold: float, permutations: int, missed_weight: float = _MISSED_WEIGHT) -> tuple[int, int]:
    """(bands, rows) with the smallest weighted error over all similarities, evenly spread.

    Documents of similarity s agree in a band with 1 - (1 - s^rows)^bands; the error is that below the threshold, and
    what is missing to 1 above it (datasketch's criterion, by the midpoint rule).
    """
    steps = 100
    below = [threshold * (i + 0.5) / steps for i in range(steps)]
    above = [threshold + (1 - threshold) * (i + 0.5) / steps for i in range(steps)]

    def error(bands: int, rows: int) -> float:
        false = sum(1 - (1 - s**rows) ** bands for s in below) * threshold / steps
        missed = sum((1 - s**rows) ** bands for s in above) * (1 - threshold) / steps
        return (1 - missed_weight) * false + missed_weight * missed

    splits = ((bands, rows) for rows in range(1, permutations + 1) for bands in range(1, permutations // rows + 1))
    return min(splits, key=lambda split: (error(*split), split))
