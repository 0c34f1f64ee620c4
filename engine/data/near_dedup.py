"""Near-duplicates: of documents with nearly the same words the first stays, in the order of the sources.

In steps that run apart, each a function of files and numbers alone: `Signer` and `write_signatures` for every unit,
`write_pairs` for every band and range of keys, `near_clusters` once. `near_duplicates` does the last two in one call.
A document goes only if its signature says that it is at least ``threshold`` like one that stays: likeness is not handed
on from one to the next, so no chain of resemblances loses a document.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from typing_extensions import Buffer

from engine import _dedup
from engine.config.near_dedup import NearDedupConfig
from engine.data.dedup import as_duplicates, from_files

# Of one unit: [documents] bool, who still takes part; None for all.
Keep = Callable[[int], np.ndarray | None]

_PAIR_BYTES = 64  # a document of the range, while its keys are compared: the records as they grow, and sorted
_PAIRS_AT_ONCE = 4_000_000


class Signer:
    """MinHash signatures of texts; the same text has the same one on every machine, with any number of threads."""

    def __init__(self, config: NearDedupConfig):
        self.config = config
        self._minhash = _dedup.Minhash(config.permutations, config.shingle_words, config.seed)

    def sign(self, texts: Sequence[str | bytes], threads: int = 1) -> np.ndarray:
        """[texts, permutations] uint32; 0xFFFFFFFF throughout for a text of fewer words than a shingle.

        ``threads`` 0 takes the available cores. bytes are read as UTF-8, what is none separates words. Raises
        UnicodeEncodeError for a str with a lone surrogate.
        """
        return self._minhash.sign(tuple(texts), threads)

    def sign_packed(self, utf8: Buffer, lengths_n: np.ndarray, threads: int = 1) -> np.ndarray:
        """The same for texts that lie one after another in ``utf8``; ``lengths_n`` [texts] uint64, in bytes."""
        return self._minhash.sign_packed(utf8, np.ascontiguousarray(lengths_n, np.uint64), threads)


def write_signatures(path: Path, signatures: np.ndarray, config: NearDedupConfig, threads: int = 1) -> None:
    """Write what `Signer` made of one unit, with sorted band keys and checksums.

    About permutations + 14 * bands bytes a document: of each number of a signature the file keeps a byte, which is
    enough to compare with (b-bit minwise hashing). ``threads`` 0 takes the available cores. Raises OSError.
    """
    bands, rows = config.split
    path.write_bytes(_dedup.signature_bytes(signatures, bands, rows, _settings(config), threads))


def near_parts(files: Sequence[Path], config: NearDedupConfig, memory_mb: float = 256) -> int:
    """Into how many ranges the keys of a band are cut so that each is compared in about ``memory_mb`` MB.

    A function of the files' sizes alone; signatures of 65,536 documents at a time come on top of it.
    """
    bands, _ = config.split
    documents = sum(path.stat().st_size for path in files) / (config.permutations + 4 + 14 * bands)
    return max(1, math.ceil(documents * _PAIR_BYTES / (memory_mb * 1e6)))


def write_pairs(
    path: Path,
    files: Sequence[Path],
    config: NearDedupConfig,
    band: int,
    *,
    keep: Keep | None = None,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Write the pairs of documents that agree in ``band`` and whose signatures are ``threshold`` alike: 20 bytes each.

    ``files[u]`` is what `write_signatures` left for unit u. Only keys in range ``part`` of ``parts`` are looked at.
    ``keep(u)`` says which documents of unit u there still are (the others are no reason for one to go); it is called
    once for each unit. Raises OSError, UserError for a file that is missing, damaged or of other settings.
    """
    bands, _ = config.split
    if not 0 <= band < bands:
        raise ValueError(f"band {band} of {bands}")
    # Of numbers that differ one of 256 has the same byte. A little leeway, for what a fraction is in binary.
    share = config.threshold + (1 - config.threshold) / 256
    matches = max(1, math.ceil(share * config.permutations - 1e-6))
    names = [str(file) for file in files]
    path.write_bytes(from_files(_dedup.pairs, names, keep, band, part, parts, matches, _settings(config)))


def near_clusters(pairs: Sequence[Path], units: int) -> np.ndarray:
    """The documents that go, from the files of `write_pairs` of all bands and parts.

    ``units``: their number. In the order of the documents one goes if it is in a pair with an earlier one that stays,
    and is counted for the first of these. Memory: 64 MB of pairs (more only if a single unit has more), and 40 bytes
    for each that goes.

    Returns:
        [documents] `DUPLICATE`, sorted by (unit, doc); what is in first_unit and first_doc stays.

    Raises:
        UserError: a file is missing, damaged or cut off; it names the file.
    """
    names = [str(file) for file in pairs]
    return as_duplicates(from_files(_dedup.clusters, names, units, _PAIRS_AT_ONCE))


def near_duplicates(
    files: Sequence[Path],
    config: NearDedupConfig,
    *,
    keep: Keep | None = None,
    threads: int = 1,
    memory_mb: float = 256,
    folder: Path | None = None,
) -> np.ndarray:
    """`write_pairs` for every band and part, ``threads`` of them at once, then `near_clusters`.

    The pairs wait in ``folder`` (default: where temporary files go) and are deleted. ``memory_mb`` for each thread.
    """
    parts = near_parts(files, config, memory_mb)
    with tempfile.TemporaryDirectory(dir=folder) as place, ThreadPoolExecutor(max(1, threads)) as pool:
        jobs = [(band, part) for band in range(config.split[0]) for part in range(parts)]
        paths = [Path(place) / f"{band}-{part}.pairs" for band, part in jobs]
        running = [
            pool.submit(write_pairs, path, files, config, band, keep=keep, part=part, parts=parts)
            for path, (band, part) in zip(paths, jobs, strict=True)
        ]
        for job in running:
            job.result()
        return near_clusters(paths, len(files))


def _settings(config: NearDedupConfig) -> int:
    """What two files of signatures must have in common to be compared, as 64 bits."""
    parts = (config.permutations, config.shingle_words, config.seed, *config.split)
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
