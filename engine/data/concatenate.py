"""Several `.bin/.idx` pairs as one, without the tokens passing through this process where the system can copy them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.data.indexed import IndexedDataset, Pair, prefixes_of
from engine.data.indexed_writer import IndexedDatasetWriter, PairFiles, parts
from engine.errors import UserError

_CHUNK = 1 << 30
# What kernels and file systems answer that cannot do a kind of copy at all.
_UNABLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def concatenate(
    shards: Sequence[str | os.PathLike[str]], prefix: str | os.PathLike[str], vocab_size: int | None = None
) -> None:
    """Writes `PREFIX.bin/.idx` with the documents of the pairs at the prefixes ``shards``, in this order.

    Each may itself be a set of shards. Every index is checked first. The files appear when both are whole, under their
    own names. ``vocab_size`` gives an empty pair its type of token when there are no shards. Raises UserError for a
    pair that is missing, damaged or of another type of token than the first, and when the files cannot be written.
    """
    if not shards:
        if vocab_size is None:
            raise ValueError("nothing to concatenate")
        return IndexedDatasetWriter(prefix, vocab_size).close()
    first = Pair(prefixes_of(Path(shards[0]))[0])
    pairs = _Pairs([each for shard in shards for each in prefixes_of(Path(shard))])
    files = PairFiles(prefix)
    try:
        with files.disk_errors():
            files.bin.flush()
            for shard in shards:
                for pair in IndexedDataset(shard).pairs:
                    if pair.code != first.code:
                        raise UserError(
                            f"has tokens of type {pair.dtype.name}, {first.bin_path} has {first.dtype.name}",
                            where=str(pair.bin_path), fix="Join only data of one tokenizer")  # fmt: skip
                    with open(pair.bin_path, "rb") as source:
                        copy(source, files.bin, pair.num_tokens * pair.dtype.itemsize)
        documents = sum(len(pair.document_indices) - 1 for pair in pairs)
        files.publish(_Sizes(pairs), first.code, (documents, _ends(pairs)))
    except BaseException:
        files.abort()
        raise


class _Pairs(Sequence[Pair]):
    """Opened one at a time: of all at once the maps alone would be as large as the data."""

    def __init__(self, prefixes: list[Path]):
        self._prefixes = prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def __getitem__(self, number):
        return Pair(self._prefixes[number])


class _Sizes(Sequence[np.ndarray]):
    """Tokens of each sequence, pair by pair."""

    def __init__(self, pairs: _Pairs):
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, number):
        return self._pairs[number].sizes


def _ends(pairs: _Pairs) -> Iterator[np.ndarray]:
    """How many sequences there are at the end of each document of the pairs, counted through."""
    before = 0
    for pair in pairs:
        for part in parts(pair.document_indices[1:]):
            yield part + before
        before += len(pair.sizes)


def copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Appends ``size`` bytes of the file ``source``, both unbuffered at this point: shared blocks where the file system
    has them (copy_file_range), else within the kernel (sendfile), else through this process. OSError; EIO when the
    source ends early."""
    done = 0
    for way in (_range, _sendfile):
        while done < size:
            try:
                sent = way(source.fileno(), target.fileno(), done, min(_CHUNK, size - done))
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                break
            if sent == 0:  # some file systems answer so instead of an error
                break
            done += sent
    if done < size:
        source.seek(done)
        target.seek(0, os.SEEK_END)
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        done = source.tell()
    if done != size:
        raise OSError(errno.EIO, f"{Path(source.name).name} is {done} bytes long, not {size}")


def _range(source: int, target: int, offset: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "not on this system")
    return os.copy_file_range(source, target, count, offset_src=offset)


def _sendfile(source: int, target: int, offset: int, count: int) -> int:
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, "not on this system")
    return os.sendfile(target, source, offset, count)
