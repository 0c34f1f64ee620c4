"""Megatron's `.bin/.idx` pair: `PREFIX.bin` holds all tokens, `PREFIX.idx` where each document begins.

Byte for byte the format of megatron.core.datasets.indexed_dataset; csrc/index reads it. A dataset is one pair, or its
shards `PREFIX-00000-of-00007.bin/.idx` to `PREFIX-00006-of-00007.bin/.idx`.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine import _index
from engine.data.indexed_writer import DTYPES, IndexedDatasetWriter, dtype_code
from engine.data.verified import Verified, now_ns
from engine.errors import UserError

__all__ = ["DTYPES", "IndexedDataset", "IndexedDatasetWriter", "Pair", "dtype_code", "prefixes_of", "reading",
           "shard_name"]
_REBUILD = "Prepare the data again (`mainspring prepare`) or copy the file anew"
_SMALL = 1 << 20  # bytes: read before threads have started
_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})\.(bin|idx)$")


def shard_name(name: str, number: int, count: int) -> str:
    """The prefix of shard ``number`` of ``count``: "train", 0, 7 is "train-00000-of-00007"."""
    return f"{name}-{number:05d}-of-{count:05d}"


class Pair:
    """One `.bin/.idx`, mapped. The header is checked on opening; ``verify`` checks the rest."""

    def __init__(self, prefix: Path):
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.idx = _map(self.idx_path, partner=self.bin_path)
        with self._damage():
            self.code, count, documents, sizes_at, pointers_at, documents_at = _index.read_header(self.idx)
        self.dtype = np.dtype(DTYPES[self.code])
        self.sizes = np.frombuffer(memoryview(self.idx), "<i4", count, sizes_at)  # tokens of each document
        self.pointers = np.frombuffer(memoryview(self.idx), "<i8", count, pointers_at)  # bytes in the .bin
        self.document_indices = np.frombuffer(memoryview(self.idx), "<i8", documents, documents_at)
        self.num_tokens, self.fingerprint = 0, ""  # of verify
        self.bin = _map(self.bin_path, partner=self.idx_path)

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except ValueError as problem:
            raise UserError(f"damaged index: {problem}", where=str(self.idx_path), fix=_REBUILD) from None

    def check_tables(self, threads: int) -> int:
        """Checks every entry of the index and returns the tokens. UserError names the first wrong one."""
        with self._damage():
            return _index.check_tables(self.idx, threads)

    def check_bin(self, size: int) -> None:
        """UserError unless a `.bin` of ``size`` bytes is the one of this index."""
        expected = self.num_tokens * self.dtype.itemsize
        if size == expected:
            return
        kind = "truncated" if size < expected else "too long"
        raise UserError(
            f"{kind}: {size} bytes, but {self.idx_path.name} lists {self.num_tokens} tokens of type {self.dtype.name}, "
            f"{expected} bytes; the two files are not one pair",
            where=str(self.bin_path),
            fix=_REBUILD,
        )


class IndexedDataset:
    """A prepared split, memory-mapped: ``len`` documents (in Megatron's words: sequences), counted through the shards.

    Every field of every index is checked on opening, and the size of the `.bin` against it; ``remember``, a folder,
    spares this for files that were checked before and have not changed (`engine.data.verified`). Raises UserError for a
    missing, truncated, foreign or mismatched file, for a set of shards that is not complete, and for a pair and shards
    of one name.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, remember: Path | None = None):
        self.prefix = Path(prefix)
        prefixes = prefixes_of(self.prefix)
        self.sharded = prefixes != [self.prefix]
        self.pairs = [Pair(each) for each in prefixes]
        for pair in self.pairs[1:]:
            if pair.code != self.pairs[0].code:
                raise UserError(f"has tokens of type {pair.dtype.name}, {self.pairs[0].idx_path.name} has "
                                f"{self.pairs[0].dtype.name}", where=str(pair.idx_path), fix=_REBUILD)
        self._verified = Verified(remember, self.prefix)
        self._verify()
        self.code, self.dtype = self.pairs[0].code, self.pairs[0].dtype
        self.corpus = _index.Corpus([(pair.idx, pair.bin, pair.num_tokens) for pair in self.pairs])
        self.num_tokens: int = self.corpus.tokens
        self._first = [0]  # document of each pair
        for pair in self.pairs[:-1]:
            self._first.append(self._first[-1] + len(pair.sizes))

    def _verify(self) -> None:
        began = now_ns()
        known = [self._verified.recall(pair.idx_path, pair.idx) for pair in self.pairs]
        unknown = [pair for pair, found in zip(self.pairs, known, strict=True) if not found]
        for pair, found in zip(self.pairs, known, strict=True):
            if found:
                pair.num_tokens, pair.fingerprint = found["tokens"], found["sha256"]
        for pair, (tokens, fingerprint) in zip(unknown, _check(unknown), strict=True):
            pair.num_tokens, pair.fingerprint = tokens, fingerprint
            self._verified.note(pair.idx_path, pair.idx, {"tokens": tokens, "sha256": fingerprint}, began)
        for pair in self.pairs:
            pair.check_bin(len(pair.bin))
        self._verified.save()

    @property
    def where(self) -> str:
        """What messages call it: the `.bin`, or the prefix of the shards."""
        return str(self.prefix if self.sharded else self.pairs[0].bin_path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index: of the `.idx` file, or of the shards' hashes one behind another."""
        if not self.sharded:
            return self.pairs[0].fingerprint
        return hashlib.sha256("".join(pair.fingerprint for pair in self.pairs).encode()).hexdigest()

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document, int32; of several shards a copy of 4 bytes a document."""
        return self.pairs[0].sizes if len(self.pairs) == 1 else np.concatenate([pair.sizes for pair in self.pairs])

    @property
    def document_indices(self) -> np.ndarray:
        """Megatron's documents, each of one sequence or more: where they begin, and the end; int64."""
        if len(self.pairs) == 1:
            return self.pairs[0].document_indices
        parts = [pair.document_indices[1:] + first for pair, first in zip(self.pairs, self._first, strict=True)]
        return np.concatenate([[0], *parts])

    def __len__(self) -> int:
        return self.corpus.documents

    def __getitem__(self, document: int) -> np.ndarray:
        """The document's tokens, [length], a read-only view of the file."""
        return self.get(document)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """``length`` tokens (default: the rest) of a document from ``offset``, a read-only view. IndexError outside."""
        if not -len(self) <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        document %= len(self)
        place = bisect.bisect_right(self._first, document) - 1
        pair, own = self.pairs[place], document - self._first[place]
        size = int(pair.sizes[own])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset} to {offset + length} of document {document}, which has {size}")
        first = int(pair.pointers[own]) + offset * self.dtype.itemsize
        if not length:
            return np.empty(0, self.dtype)
        return np.frombuffer(memoryview(pair.bin), self.dtype, length, first)

    def bin_sha256(self) -> list[str]:
        """Content hash of each pair's `.bin`, reading all of them, side by side."""
        began = now_ns()
        known = [self._verified.recall(pair.bin_path, pair.bin).get("sha256") for pair in self.pairs]
        with ThreadPoolExecutor(_cores()) as pool:
            hashes = list(pool.map(lambda pair, found: found or _sha256(pair.bin), self.pairs, known))
        for pair, found, value in zip(self.pairs, known, hashes, strict=True):
            if found is None:
                self._verified.note(pair.bin_path, pair.bin, {"sha256": value}, began)
        self._verified.save()
        return hashes


def _check(pairs: Sequence[Pair]) -> list[tuple[int, str]]:
    """(tokens, SHA-256) of each index, after a check of every entry: side by side, where they are not soon read."""
    if sum(len(pair.idx) for pair in pairs) < _SMALL:
        return [(pair.check_tables(1), _sha256(pair.idx)) for pair in pairs]
    with ThreadPoolExecutor(min(2 * len(pairs), max(2, _cores()))) as pool:
        tokens = [pool.submit(pair.check_tables, 0 if len(pairs) == 1 else 1) for pair in pairs]
        hashes = [pool.submit(_sha256, pair.idx) for pair in pairs]
        return [(count.result(), sha256.result()) for count, sha256 in zip(tokens, hashes, strict=True)]


@contextlib.contextmanager
def reading(datasets: Sequence[IndexedDataset]) -> Iterator[None]:
    """Around calls that read the files: UserError when one was truncated since it was opened."""
    try:
        yield
    except _index.Truncated as error:
        path, size = error.args
        for pair in (pair for dataset in datasets for pair in dataset.pairs):
            if str(pair.bin_path) == path:
                pair.check_bin(size)
            elif str(pair.idx_path) == path:
                raise UserError(f"truncated while it is read: {size} bytes of {len(pair.idx)}", where=path,
                                fix=_REBUILD) from None
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sha256(map: _index.Map) -> str:
    return hashlib.sha256(map).hexdigest()


def prefixes_of(prefix: Path) -> list[Path]:
    """The pairs' prefixes: the one itself, or its shards in order."""
    shards: dict[str, set[int]] = {}
    if prefix.parent.is_dir():
        for path in prefix.parent.iterdir():
            match = _SHARD.match(path.name, len(prefix.name)) if path.name.startswith(prefix.name) else None
            if match:
                shards.setdefault(match[2], set()).add(int(match[1]))
    if not shards:
        return [prefix]
    counts = sorted(shards, key=int)
    if Path(f"{prefix}.bin").exists() or Path(f"{prefix}.idx").exists():
        raise UserError(f"there are both {prefix.name}.bin/.idx and shards of it (of {counts[0]})", where=str(prefix),
                        fix="Remove the older of the two")
    if len(counts) > 1:
        raise UserError(f"there are shards of two sets, of {counts[0]} and of {counts[1]}", where=str(prefix),
                        fix="Remove the older set")
    count = int(counts[0])
    if wrong := [number for number in shards[counts[0]] if number >= count]:
        raise UserError(f"shard {min(wrong)} of {count} cannot be", where=str(prefix), fix=_REBUILD)
    return [prefix.parent / shard_name(prefix.name, number, count) for number in range(count)]


def _map(path: Path, *, partner: Path) -> _index.Map:
    try:
        return _index.Map(os.fsencode(path))
    except FileNotFoundError:
        beside = f" ({partner.name} is there)" if partner.exists() else ""
        fix = f"A dataset is the pair {partner.stem}.bin and {partner.stem}.idx; write it with `mainspring prepare`"
        raise UserError(f"file not found{beside}", where=str(path), fix=fix) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="Check its permissions") from None
