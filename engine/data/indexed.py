"""Megatron's `.bin/.idx` pair: `PREFIX.bin` holds all tokens, `PREFIX.idx` where each document begins.

Byte for byte the format of megatron.core.datasets.indexed_dataset; csrc/index/format.cpp reads and writes the index.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from engine import _index, disk
from engine.errors import UserError

DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_REBUILD = "Prepare the data again (`mainspring prepare`) or copy the file anew"


def dtype_code(vocab_size: int) -> int:
    """Megatron's choice: uint16 (8) below 65500 token ids, int32 (4) from there on."""
    return 8 if vocab_size < 65500 else 4


class IndexedDataset:
    """A prepared split, memory-mapped: ``len`` documents (in Megatron's words: sequences).

    Every field of the index is checked on opening, and the size of the `.bin` against it. Raises UserError for a
    missing, truncated, foreign or mismatched file.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = Path(prefix)
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        idx = _map(self.idx_path, partner=self.bin_path)
        try:
            code, count, documents, tokens, sizes_at, pointers_at, documents_at = _index.parse_index(idx)
        except ValueError as problem:
            raise UserError(f"damaged index: {problem}", where=str(self.idx_path), fix=_REBUILD) from None
        self.code: int = code
        self.dtype = np.dtype(DTYPES[code])
        self.num_tokens: int = tokens
        self.sizes = np.frombuffer(idx, "<i4", count, sizes_at)  # tokens of each document
        self.pointers = np.frombuffer(idx, "<i8", count, pointers_at)  # byte of each document in the .bin
        self.document_indices = np.frombuffer(idx, "<i8", documents, documents_at)
        self.fingerprint: str = hashlib.sha256(idx).hexdigest()
        self._bin = _map(self.bin_path, partner=self.idx_path)
        self._check_bin(len(self._bin))

    def _check_bin(self, size: int) -> None:
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

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> np.ndarray:
        """The document's tokens, [length], a read-only view of the file."""
        return self.get(document)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """``length`` tokens (default: the rest) of a document from ``offset``, a read-only view. IndexError outside."""
        if not -len(self) <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        size = int(self.sizes[document])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset} to {offset + length} of document {document}, which has {size}")
        first = int(self.pointers[document]) + offset * self.dtype.itemsize
        return np.frombuffer(self._bin, self.dtype, length, first) if length else np.empty(0, self.dtype)

    def gather(
        self, order: np.ndarray | None, pieces_p4: np.ndarray, tokens: np.ndarray, labels: np.ndarray
    ) -> tuple[int, int]:
        """Copies token ranges into int64 arrays; see `engine._index.gather`. Returns the smallest and largest token.

        Raises UserError if the file was truncated since it was opened, where the bare mapping would kill the process.
        """
        if isinstance(self._bin, mmap.mmap):
            self._check_bin(self._bin.size())
        return _index.gather(self._bin, self.code, self.sizes, self.pointers, order, pieces_p4, tokens, labels)

    def bin_sha256(self) -> str:
        """Content hash of the `.bin`, reading all of it."""
        return hashlib.sha256(self._bin).hexdigest()


def _map(path: Path, *, partner: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped, and an empty .bin is a legal pair of an empty .idx
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        beside = f" ({partner.name} is there)" if partner.exists() else ""
        fix = f"A dataset is the pair {partner.stem}.bin and {partner.stem}.idx; write it with `mainspring prepare`"
        raise UserError(f"file not found{beside}", where=str(path), fix=fix) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="Check its permissions") from None


class IndexedDatasetWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx` under temporary names; `close()` puts both in place, or neither.

    A context manager: leaving it with an exception removes what was written. An older pair at the prefix stays as it
    is until `close()`.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int):
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.code = dtype_code(vocab_size)
        self.num_tokens = 0
        self._sizes = array.array("i")
        self._temporary = {end: Path(f"{prefix}.{end}.tmp-{os.getpid()}") for end in ("bin", "idx")}
        with self._disk_errors():
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temporary["bin"], "wb", buffering=2**20)  # noqa: SIM115 - close() or abort() closes it

    def add_document(self, tokens: np.ndarray) -> None:
        """Appends one document, [length] integers in [0, vocab_size). UserError when a token lies outside."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise TypeError(f"a document is a 1-D array of integers, not {tokens.dtype} {list(tokens.shape)}")
        self._check_document(tokens)
        with self._disk_errors():
            self._bin.write(tokens.astype(DTYPES[self.code], copy=False).tobytes())
        self._sizes.append(tokens.size)
        self.num_tokens += tokens.size

    def _check_document(self, tokens: np.ndarray) -> None:
        number, where = len(self._sizes), str(self.prefix)
        if tokens.size >= 2**31:
            raise UserError(f"document {number} has {tokens.size} tokens, the format allows 2147483647",
                            where=where, fix="Split the document")
        low, high = (tokens.min(), tokens.max()) if tokens.size else (0, 0)
        if low < 0 or high >= max(self.vocab_size, 1):
            raise UserError(f"document {number} has token {low if low < 0 else high}, outside the vocabulary of "
                            f"{self.vocab_size}", where=where, fix="Use the tokenizer that the vocabulary belongs to")

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(self.prefix.parent),
                            fix="Free space there or choose another folder") from error

    def close(self) -> None:
        """Puts both files in place, on disk when this returns. On an error nothing is left and it is raised."""
        if self._bin.closed:
            return
        try:
            with self._disk_errors():
                _to_disk(self._bin)
                with open(self._temporary["idx"], "wb") as idx:
                    idx.write(_index.index_bytes(np.frombuffer(self._sizes, np.int32), self.code))
                    _to_disk(idx)
                # Without its .idx an old .bin cannot be opened: a crash between the renames leaves no mixed pair.
                Path(f"{self.prefix}.idx").unlink(missing_ok=True)
                for end, temporary in self._temporary.items():
                    os.replace(temporary, f"{self.prefix}.{end}")
                disk.sync(self.prefix.parent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Drops everything written so far."""
        with contextlib.suppress(OSError):  # a full disk can fail the last flush too; the file goes anyway
            self._bin.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
