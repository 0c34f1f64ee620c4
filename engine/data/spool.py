"""Cleaned documents of one unit between the passes of `prepare`: their text, and a record each.

`text` holds the UTF-8 of the documents one after the other, `documents` a `RECORD` of each in the same order. Both are
written as they come, so memory does not grow with a unit.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from engine.errors import UserError

# length: bytes of UTF-8. digest: see `engine.data.dedup.content_digest`. key: see `split_key`. slice: number within the
# unit. row: of the slice's file, NO_ROW where the document is all of it.
RECORD = np.dtype(
    [("length", "<u8"), ("digest", "<u8", 2), ("key", "<u8"), ("slice", "<u4"), ("row", "<u8")]
)  # fmt: skip
NO_ROW = 2**64 - 1
_PACK = struct.Struct("<Q16sQIQ")
assert _PACK.size == RECORD.itemsize

_FLUSH_RECORDS = 1 << 16
# Enough text at once to keep the tokenizer's threads busy, little enough to hold its ids in memory.
_BATCH_BYTES = 4_000_000
_BATCH_DOCUMENTS = 1 << 14


class SpoolWriter:
    """Writes into ``folder``; a context manager. ``count`` documents and ``size`` bytes of text so far."""

    def __init__(self, folder: Path):
        self.count, self.size = 0, 0
        self._records = bytearray()
        self._text = open(folder / "text", "wb", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__
        self._file = open(folder / "documents", "wb")  # noqa: SIM115

    def append(self, raw: bytes, digest: bytes, key: int, slice_number: int, row: int | None) -> None:
        """A document of UTF-8 ``raw``, its 16-byte ``digest`` and its ``key``."""
        self._text.write(raw)
        self._records += _PACK.pack(len(raw), digest, key, slice_number, NO_ROW if row is None else row)
        self.count += 1
        self.size += len(raw)
        if len(self._records) >= _FLUSH_RECORDS * RECORD.itemsize:
            self._flush()

    def _flush(self) -> None:
        self._file.write(self._records)
        self._records.clear()

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._file.close()
            self._text.close()


class Spool:
    """What a `SpoolWriter` wrote into ``folder``. ``records`` is a read-only map of the file, [documents] RECORD.

    Raises UserError if the file is not a whole number of records.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "documents"
        size = path.stat().st_size
        if size % RECORD.itemsize:
            raise UserError("damaged: cut within a record", where=str(path), fix="Remove its folder and run again.")
        self.records: np.ndarray = np.memmap(path, RECORD, "r") if size else np.empty(0, RECORD)

    def __len__(self) -> int:
        return len(self.records)

    def batches(self, picked: np.ndarray) -> Iterator[tuple[np.ndarray, bytes, np.ndarray]]:
        """The documents where ``picked`` [documents] bool, in order, a few MB at a time: their numbers [n], their UTF-8
        one after the other, and its lengths [n] int64, in bytes.

        Raises UserError where the text ends before its records do.
        """
        numbers = np.flatnonzero(picked)
        if not len(numbers):
            return
        lengths = self.records["length"].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        with open(self.folder / "text", "rb") as stream:
            for part in _cut(numbers, lengths[numbers]):
                yield part, self._text(stream, starts[part], lengths[part]), lengths[part]

    def _text(self, stream: BinaryIO, starts: np.ndarray, lengths: np.ndarray) -> bytes:
        """The documents there, read in as few pieces as they lie in."""
        ends = starts + lengths
        breaks = np.flatnonzero(starts[1:] != ends[:-1])
        pieces = []
        for first, last in zip([0, *breaks + 1], [*breaks, len(starts) - 1], strict=True):
            stream.seek(int(starts[first]))
            pieces.append(stream.read(int(ends[last] - starts[first])))
        text = b"".join(pieces)
        if len(text) != lengths.sum():
            raise UserError("damaged: shorter than its records say", where=str(self.folder / "text"),
                            fix="Remove its folder and run again.")  # fmt: skip
        return text


def split_texts(text: bytes, lengths: np.ndarray) -> list[bytes]:
    """The documents of a batch, one by one."""
    ends = np.cumsum(lengths).tolist()
    return [text[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _cut(numbers: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """``numbers`` in consecutive parts of at most _BATCH_DOCUMENTS, that end where _BATCH_BYTES are passed."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(numbers):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + _BATCH_BYTES)) + 1
        last = min(last, first + _BATCH_DOCUMENTS, len(numbers))
        yield numbers[first:last]
        first = last


def split_key(digest: bytes, seed: int) -> int:
    """A uniform 64-bit number of a document's content and the seed alone: data added later moves no document."""
    return int.from_bytes(hashlib.sha256(str(seed).encode() + b":" + digest).digest()[:8], "big")
