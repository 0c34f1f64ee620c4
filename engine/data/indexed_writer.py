"""Writes Megatron's `.bin/.idx` pair, document by document or many at once, and joins pairs into one.

The memory of a writer is 4 bytes a document: the index is written from the lengths, a piece at a time.
"""

from __future__ import annotations

import array
import contextlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from engine import disk
from engine.errors import UserError

DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
Documents = tuple[int, Iterable[np.ndarray]]
LONGEST = 2**31 - 1  # tokens of a document: the format's lengths are int32
_PIECE = 1 << 18  # documents whose index entries are in memory at once


def dtype_code(vocab_size: int) -> int:
    """Megatron's choice: uint16 (8) below 65500 token ids, int32 (4) from there on."""
    return 8 if vocab_size < 65500 else 4


def write_index(file: BinaryIO, lengths: Sequence[np.ndarray], code: int, documents: Documents | None = None) -> None:
    """Writes the `.idx` of sequences with these int32 ``lengths`` in tokens (pieces, one behind another).

    ``documents``: where a document may have several sequences, how many there are, and int64 pieces with the number of
    sequences at the end of each.
    """
    count = sum(len(piece) for piece in lengths)
    number, ends = documents or (count, _counted(count))
    file.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, code, count, number + 1))
    for piece in lengths:
        for part in parts(piece):
            file.write(np.ascontiguousarray(part, "<i4").data)
    item, byte = np.dtype(DTYPES[code]).itemsize, 0
    for piece in lengths:
        for part in parts(piece):
            pointers = np.empty(len(part) + 1, "<i8")
            pointers[0] = byte
            np.cumsum(part, dtype=np.int64, out=pointers[1:])
            pointers[1:] = pointers[1:] * item + byte
            byte = int(pointers[-1])
            file.write(pointers[:-1].data)
    file.write(struct.pack("<q", 0))
    for piece in ends:
        for part in parts(piece):
            file.write(np.ascontiguousarray(part, "<i8").data)


def _counted(count: int) -> Iterator[np.ndarray]:
    for first in range(0, count, _PIECE):
        yield np.arange(first + 1, min(first + _PIECE, count) + 1, dtype=np.int64)


def parts(piece: np.ndarray) -> Iterator[np.ndarray]:
    """The array a piece at a time, so that work on it needs little memory."""
    for first in range(0, len(piece), _PIECE):
        yield piece[first : first + _PIECE]


class PairFiles:
    """`PREFIX.bin` and `PREFIX.idx` under temporary names until ``publish``; ``abort`` drops them. OSError is a
    UserError that names the folder. ``durable``: flushed to the disk before they get their names."""

    def __init__(self, prefix: str | os.PathLike[str], *, durable: bool = True):
        self.prefix = Path(prefix)
        self._durable = durable
        self._temporary = {end: Path(f"{prefix}.{end}.tmp-{os.getpid()}") for end in ("bin", "idx")}
        with self.disk_errors():
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self.bin = open(self._temporary["bin"], "wb", buffering=2**20)  # noqa: SIM115 - publish() or abort() closes it

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(self.prefix.parent),
                            fix="Free space there or choose another folder") from error

    def publish(self, lengths: Sequence[np.ndarray], code: int, documents: Documents | None = None) -> None:
        """Writes the index and puts both files in place, on disk if ``durable``. On an error nothing is left."""
        try:
            with self.disk_errors():
                self._finish(self.bin)
                with open(self._temporary["idx"], "wb", buffering=2**20) as idx:
                    write_index(idx, lengths, code, documents)
                    self._finish(idx)
                # Without its .idx an old .bin cannot be opened: a crash between the renames leaves no mixed pair.
                Path(f"{self.prefix}.idx").unlink(missing_ok=True)
                for end, temporary in self._temporary.items():
                    os.replace(temporary, f"{self.prefix}.{end}")
                if self._durable:
                    disk.sync(self.prefix.parent)
        except BaseException:
            self.abort()
            raise

    def _finish(self, file: BinaryIO) -> None:
        file.flush()
        if self._durable:
            os.fsync(file.fileno())
        file.close()

    def abort(self) -> None:
        """Drops everything written so far."""
        with contextlib.suppress(OSError):  # a full disk can fail the last flush too; the file goes anyway
            self.bin.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)


class IndexedDatasetWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx` under temporary names; `close()` puts both in place, or neither.

    A context manager: leaving it with an exception removes what was written. An older pair at the prefix stays as it
    is until `close()`. Not ``durable``: where a crash of the machine loses no more than work that is done again.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int, *, durable: bool = True):
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.code = dtype_code(vocab_size)
        self.num_tokens = 0
        self._lengths = array.array("i")
        self._files = PairFiles(prefix, durable=durable)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, tokens: np.ndarray) -> None:
        """Appends one document, [length] integers in [0, vocab_size). UserError when a token lies outside."""
        self.add_documents(tokens, np.array([np.size(tokens)], np.int64))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents, their integers in [0, vocab_size) one behind another: tokens [their sum], lengths [n].

        Raises UserError when a token lies outside the vocabulary or a document is longer than 2^31 - 1, ValueError
        when the lengths are not those of the tokens. Nothing of the batch is written then.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        for name, values in (("a document", tokens), ("the lengths", lengths)):
            if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
                raise TypeError(f"{name} must be a 1-D array of integers, not {values.dtype} {list(values.shape)}")
        lengths = lengths.astype(np.int64, copy=False)
        if (lengths.size and lengths.min() < 0) or int(lengths.sum()) != tokens.size:
            raise ValueError(f"lengths of {lengths.sum()} tokens in all, there are {tokens.size}")
        self._check(tokens, lengths)
        with self._files.disk_errors():
            self._files.bin.write(np.ascontiguousarray(tokens, DTYPES[self.code]).data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.num_tokens += tokens.size

    def _check(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        where, first = str(self.prefix), len(self._lengths)
        if lengths.size and lengths.max() > LONGEST:
            place = int(lengths.argmax())
            raise UserError(f"document {first + place} has {lengths[place]} tokens, the format allows {LONGEST}",
                            where=where, fix="Split the document")
        if not tokens.size or (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            return
        wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        place = int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
        raise UserError(f"document {first + place} has token {tokens[wrong]}, outside the vocabulary of "
                        f"{self.vocab_size}", where=where, fix="Use the tokenizer that the vocabulary belongs to")

    def close(self) -> None:
        """Puts both files in place, on disk if ``durable``. On an error nothing is left and it is raised."""
        if not self._files.bin.closed:
            self._files.publish([np.frombuffer(self._lengths, np.int32)], self.code)

    def abort(self) -> None:
        """Drops everything written so far."""
        self._files.abort()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
