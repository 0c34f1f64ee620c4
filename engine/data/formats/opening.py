"""Bytes of a file: a piece of it, hashed and counted as it passes, unpacked where it is compressed.

Nothing here holds more than a few megabytes, however far a compressed file expands.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from engine.data.quarantine import Refused

CHUNK = 1 << 20
_OUT = 1 << 20  # bytes that one call of a decompressor may give
# zstandard's calls have no such bound. A block of four bytes stands for at most 128 KB, so this gives 16 MB at worst.
_ZSTD_IN = 1 << 9
_IN = 1 << 16
_XZ_MEMORY = 1 << 28  # `xz -9` needs 65 MB; a file that claims gigabytes is refused
_AGAIN = "Fetch or pack it again."

_MAGIC = {".gz": (b"\x1f\x8b",), ".bz2": (b"BZh",), ".xz": (b"\xfd7zXZ\x00",),
          ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16)))}  # fmt: skip
PACKED = tuple(_MAGIC)


def packing_of(path: Path) -> str | None:
    """The suffix that says how the file is compressed; None if it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else None


def packing_inside(head: bytes) -> str | None:
    """The suffix that a file beginning with these 10 bytes should have, if it is compressed after all."""
    for packing, magics in _MAGIC.items():
        # "BZh" alone may begin a text; the others are no UTF-8.
        if head.startswith(magics) and (packing != ".bz2" or head[4:10] == b"1AY&SY"):
            return packing
    return None


class Counted(io.RawIOBase):
    """The bytes from ``start`` to ``end`` of a file; what was read is counted in ``size`` and hashed."""

    def __init__(self, stream: BinaryIO, start: int = 0, end: int | None = None):
        self.size = 0
        self._digest = hashlib.sha256()
        self._stream = stream
        self._left = None if end is None else end - start
        if start:
            stream.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if self._left is not None:
            view = view[: self._left]
        count = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._digest.update(view[:count])
        self.size += count
        if self._left is not None:
            self._left -= count
        return count

    def drain(self) -> None:
        """Reads the rest, so that it is counted."""
        buffer = bytearray(CHUNK)
        while self.readinto(buffer):
            pass

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class Stream:
    """Bytes of a raw stream, in order. Unlike `io.BufferedReader` it loses nothing of what came before an exception:
    the rows before the break of a file are good."""

    def __init__(self, raw: io.RawIOBase):
        self._raw, self._held = raw, b""

    def read(self, size: int) -> bytes:
        """At least one byte and at most ``size``, none at the end."""
        if self._held:
            found, self._held = self._held[:size], self._held[size:]
            return found
        return self._raw.read(size) or b""

    def read_full(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end and before what cannot be read, which the next call tells apart."""
        pieces: list[bytes] = []
        try:
            while size > 0 and (piece := self.read(min(size, CHUNK))):
                pieces.append(piece)
                size -= len(piece)
        except (Refused, OSError):
            if not pieces:
                raise
        return b"".join(pieces)

    def readline(self, limit: int) -> bytes:
        """To the end of the line, or ``limit`` bytes; fewer as `read_full`."""
        pieces: list[bytes] = []
        try:
            while limit > 0 and (piece := self.read(min(limit, CHUNK))):
                before, newline, behind = piece.partition(b"\n")
                pieces.append(before + newline)
                limit -= len(before)
                if newline:
                    self._held = behind + self._held
                    break
        except (Refused, OSError):
            if not pieces:
                raise
        return b"".join(pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def stream_of(raw: io.RawIOBase, packing: str | None) -> Stream:
    """``raw`` to read from, unpacked. Reading raises Refused where the compressed data are not whole."""
    return Stream(Unpacked(raw, packing) if packing else raw)


def open_bytes(path: Path) -> Stream:
    """A file to read from, unpacked where its suffix says that it is compressed."""
    return stream_of(open(path, "rb", buffering=0), packing_of(path))


class Unpacked(io.RawIOBase):
    """What compressed data hold: all members of a .gz, all frames of a .zst, and so on, one after another.

    Refused, once all that is good was read: not of this kind, cut short, damaged, or followed by something else.
    """

    def __init__(self, raw: io.RawIOBase, packing: str):
        self._raw, self._packing = raw, packing
        self._input: bytes = b""  # read, and not yet given to a decompressor
        self._output = memoryview(b"")
        self._member: _Member | None = None
        self._members = 0
        self._trouble: Refused | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        if self._trouble is not None and not self._output:
            raise self._trouble
        try:
            while not self._output:
                if self._member is None and not self._next_member():
                    return 0
                self._advance()
        except Refused as bad:
            self._trouble = bad
            raise
        view = memoryview(buffer)
        count = min(len(view), len(self._output))
        view[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _next_member(self) -> bool:
        while True:
            if self._members:  # zeros may follow a member: tape blocks of gzip, padding of xz
                self._input = self._input.lstrip(b"\0")
            if len(self._input) >= 8:
                break
            more = self._raw.read(_IN)
            if not more:
                break
            self._input += more
        if not self._input and self._members:
            return False
        if not self._input.startswith(_MAGIC[self._packing]):
            if self._members:
                raise Refused("trailing_garbage", f"something follows the {self._packing} data in it", _AGAIN)
            what = "is empty" if not self._input else f"is no {self._packing} file"
            raise Refused("wrong_suffix", f"{what}, whatever its name says", "Rename it, or fetch it again.")
        self._member = _MEMBERS[self._packing]()
        self._members += 1
        return True

    def _advance(self) -> None:
        """One call of the decompressor."""
        assert self._member is not None
        if not self._input and self._member.wants_input:
            self._input = self._raw.read(_IN) or b""
            if not self._input:
                raise Refused("cut_short", f"the {self._packing} data end too early", _AGAIN)
        try:
            output, self._input, finished = self._member.step(self._input)
        except (zlib.error, OSError, ValueError, EOFError, lzma.LZMAError, zstandard.ZstdError, MemoryError) as error:
            problem = " ".join(str(error).split())[:120]
            raise Refused("damaged", f"the {self._packing} data in it are damaged ({problem})", _AGAIN) from None
        self._output = memoryview(output)
        if finished:
            self._member = None


class _Member:
    """One compressed piece. ``step(data)`` gives (output, what is left of data, is it complete)."""

    wants_input = True

    def step(self, data: bytes) -> tuple[bytes, bytes, bool]:
        raise NotImplementedError


class _Zlib(_Member):
    def __init__(self) -> None:
        self._one = zlib.decompressobj(wbits=31)

    def step(self, data: bytes) -> tuple[bytes, bytes, bool]:
        # What waits inside when all input is taken comes before the checksum, so there is input to come.
        output = self._one.decompress(data, _OUT)
        return output, self._one.unused_data if self._one.eof else self._one.unconsumed_tail, self._one.eof


class _Library(_Member):
    """bz2 and lzma, whose decompressors are alike and keep the input themselves."""

    def __init__(self, one: Any):
        self._one = one

    def step(self, data: bytes) -> tuple[bytes, bytes, bool]:
        output = self._one.decompress(data, _OUT)
        self.wants_input = self._one.needs_input
        return output, self._one.unused_data if self._one.eof else b"", self._one.eof


class _Zstd(_Member):
    def __init__(self) -> None:
        self._one = zstandard.ZstdDecompressor().decompressobj()

    def step(self, data: bytes) -> tuple[bytes, bytes, bool]:
        found: list[bytes] = []
        size = at = 0
        while at < len(data) and size < _OUT and not self._one.eof:
            found.append(self._one.decompress(data[at : at + _ZSTD_IN]))
            size += len(found[-1])
            at += _ZSTD_IN
        rest = self._one.unused_data + data[at:] if self._one.eof else data[at:]
        return b"".join(found), rest, self._one.eof


_MEMBERS: dict[str, Callable[[], _Member]] = {
    ".gz": _Zlib,
    ".bz2": lambda: _Library(bz2.BZ2Decompressor()),
    ".xz": lambda: _Library(lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)),
    ".zst": _Zstd,
}
