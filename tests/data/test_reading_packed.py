"""Compressed files: the same bytes as before they were packed, and nothing of what is broken taken for whole."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from readings import config, read, refused

from engine.data.formats import opening
from engine.data.formats.opening import Stream, Unpacked
from engine.data.quarantine import Refused
from engine.errors import UserError

PACK = {
    ".gz": lambda raw: gzip.compress(raw, mtime=0),
    ".zst": lambda raw: zstandard.ZstdCompressor(write_checksum=True).compress(raw),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ROWS = [f"row {number} " + hashlib.sha256(bytes([number])).hexdigest() for number in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in ROWS).encode()
packings = pytest.mark.parametrize("packing", PACK)


def unpacked(raw: bytes, packing: str) -> tuple[bytes, str | None]:
    """What can be read of it, and why no more."""
    stream, found = Stream(Unpacked(io.BytesIO(raw), packing)), b""  # type: ignore[arg-type]
    try:
        while chunk := stream.read(50):
            found += chunk
    except Refused as bad:
        return found, bad.reason
    return found, None


@packings
@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.jsonl", "a.json", "a.csv"])
def test_every_kind_is_the_same_packed(tmp_path, packing, name):
    table = "text\n" + "\n".join(ROWS) + "\n"
    raw = {"a.jsonl": LINES, "a.json": json.dumps([{"text": text} for text in ROWS]).encode()}.get(name, table.encode())
    for folder in ("plain", "packed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "plain" / name).write_bytes(raw)
    packed = PACK[packing](raw)
    (tmp_path / "packed" / (name + packing)).write_bytes(packed)
    plain, _, _ = read(config(tmp_path / "plain"))
    found, quarantine, reader = read(config(tmp_path / "packed", unit_mb=0.001))
    assert [text for _, text in found] == [text for _, text in plain] == (ROWS if name[2:] in ("jsonl", "json", "csv")
                                                                          else [raw.decode()])  # fmt: skip
    assert [place.partition(packing)[2] for place, _ in found] == [place.partition(name)[2] for place, _ in plain]
    assert (quarantine, reader.size, reader.sha256) == ([], len(packed), hashlib.sha256(packed).hexdigest())


@settings(deadline=None, max_examples=60)
@given(members=st.lists(st.binary(max_size=300) | st.integers(0, 9).map(lambda n: bytes([n]) * 4_000), min_size=1,
                        max_size=4), zeros=st.integers(0, 3), packing=st.sampled_from(list(PACK)),
       out=st.sampled_from([5, 700, 1 << 20]), feed=st.sampled_from([1, 9, 1 << 16]),
       zstd=st.sampled_from([1, 9, 512]))  # fmt: skip
def test_members_frames_and_padding_at_any_buffer_sizes(members, zeros, packing, out, feed, zstd):
    raw = b"".join(PACK[packing](member) for member in members) + bytes(4 * zeros)
    with patch.multiple(opening, _OUT=out, _IN=feed, _ZSTD_IN=zstd):
        assert unpacked(raw, packing) == (b"".join(members), None)


def test_an_xz_file_that_wants_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(opening, "_XZ_MEMORY", 1 << 20)
    assert unpacked(PACK[".xz"](b"text"), ".xz") == (b"", "damaged")


def test_a_frame_of_zstandard_that_is_to_be_skipped():
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    assert unpacked(skipped + PACK[".zst"](b"text") + skipped, ".zst") == (b"text", None)


@packings
def test_cut_anywhere_it_gives_what_is_good_and_says_that_it_is_cut(packing):
    raw = PACK[packing](LINES[:3000])
    for at in range(len(raw)):
        found, reason = unpacked(raw[:at], packing)
        assert LINES.startswith(found)
        assert reason in (("wrong_suffix", "cut_short") if at < 8 else ("cut_short",)), at
    behind = raw + raw[:at]
    assert unpacked(behind, packing)[1] == "cut_short"
    assert unpacked(behind, packing)[0].startswith(LINES[:3000])


@packings
def test_a_flipped_bit_never_passes(packing):
    raw = PACK[packing](LINES[:3000])
    start = 10 if packing == ".gz" else 0  # a gzip header's time and system are checked by nobody
    for at in range(start, len(raw)):
        found, reason = unpacked(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :], packing)
        assert reason is not None or found == LINES[:3000], at


@packings
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_packed_file_without_its_suffix_is_one_item(tmp_path, packing, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(PACK[packing](LINES))
    documents, quarantine, reader = read(config(path.parent))
    assert (documents, refused(quarantine), reader.records) == ([], [(None, "wrong_suffix")], 0)
    assert reader.sha256 == hashlib.sha256(PACK[packing](LINES)).hexdigest()
    _, quarantine, reader = read(config(path.parent, unit_mb=0.001))
    assert ({item["reason"] for item in quarantine}, reader.records) == ({"wrong_suffix"}, 0), "in pieces too"
    with pytest.raises(UserError, match=rf"holds \{packing} data, .*\. Give it a name that ends in \{packing}\."):
        read(config(path))
    path.write_text("BZh9 is how this text begins\n")
    assert name != "a.txt" or len(read(config(path))[0]) == 1


@packings
def test_what_is_broken_stays_broken(packing):
    """It is asked again: a line that was cut is given first, then the reason for it."""
    raw = PACK[packing](LINES[:3000])
    middle = raw[:60] + b"\xff" * 9 + raw[69:]
    for broken in (raw[:-9], raw[:-9] + b"\xff" * 9, middle, raw + b"garbage"):
        stream, reasons = Unpacked(io.BytesIO(broken), packing), set()  # type: ignore[arg-type]
        while True:
            try:
                if not stream.read(4000):
                    break
            except Refused as bad:
                reasons.add(str(bad))
                break
        for _ in range(3):
            with pytest.raises(Refused) as again:
                stream.read(4000)
            reasons.add(str(again.value))
        assert len(reasons) == 1, reasons


@packings
@pytest.mark.parametrize(("damage", "reason", "rows"), [
    (lambda raw: raw[:-1], "cut_short", 200),
    (lambda raw: raw + b"and more", "trailing_garbage", 200),
    (lambda raw: b"plain text, whatever the name says", "wrong_suffix", 0),
    (lambda raw: b"", "wrong_suffix", 0),
])  # fmt: skip
def test_a_broken_file_is_in_quarantine_and_its_good_rows_are_kept(tmp_path, packing, damage, reason, rows):
    root = tmp_path / "in"
    root.mkdir()
    path = root / f"a.jsonl{packing}"
    path.write_bytes(damage(PACK[packing](LINES)))
    (root / "b.jsonl").write_text('{"text": "the next file"}\n')
    documents, quarantine, reader = read(config(root))
    assert [text for _, text in documents] == [*ROWS[:rows], "the next file"]
    assert refused(quarantine) == [(None, reason)]
    assert quarantine[0]["file"] == str(path)
    assert quarantine[0]["detail"].endswith(f", after {rows:,} rows") == bool(rows)
    assert reader.records == rows + 1
    with pytest.raises(UserError, match=rf"a\.jsonl\{packing}: .*\. (Fetch|Rename)"):
        read(config(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_half_of_a_large_gzip_keeps_the_rows_of_its_half(tmp_path, name):
    path = tmp_path / "in" / f"{name}.gz"
    path.parent.mkdir()
    rows = [hashlib.sha512(str(number).encode()).hexdigest() for number in range(5000)]
    records = [{"text": text} for text in rows]
    raw = {
        "a.jsonl": "".join(json.dumps(record) + "\n" for record in records), "a.json": json.dumps(records),
        "a.csv": "text\n" + "\n".join(rows), "a.txt": "\n".join(rows),
    }[name].encode()  # fmt: skip
    packed = gzip.compress(raw)
    path.write_bytes(packed[: len(packed) // 2])
    documents, quarantine, _ = read(config(path.parent))
    texts = [text for _, text in documents]
    assert texts == rows[: len(texts)]
    assert len(texts) > 2000 or name == "a.txt"
    assert refused(quarantine) == [(None, "cut_short")]


class Halting(io.RawIOBase):
    """Gives its pieces one at a time, then an error again and again."""

    def __init__(self, pieces: list[bytes], error: Exception | None):
        self.pieces, self.error = [piece for piece in pieces if piece], error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        if not self.pieces:
            if self.error is not None:
                raise self.error
            return 0
        count = min(len(buffer), len(self.pieces[0]))
        buffer[:count] = self.pieces[0][:count]
        self.pieces[0] = self.pieces[0][count:]
        self.pieces = [piece for piece in self.pieces if piece]
        return count


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(st.lists(st.sampled_from([b"\n", b"ab", b"c\nd\n", b"e" * 9])).map(b"".join), max_size=6),
       calls=st.lists(st.tuples(st.sampled_from(["read", "read_full", "readline"]), st.integers(1, 12)), max_size=20),
       error=st.sampled_from([None, Refused("x", "y"), OSError(5, "z")]),
       chunk=st.sampled_from([1, 3, 1 << 20]))  # fmt: skip
@example([b"a\nb\nc\nd\ne"], [("readline", 12), ("readline", 3), ("readline", 4)], None, 1 << 20)
def test_a_stream_gives_all_that_came_before_an_error(pieces, calls, error, chunk):
    """Held against the bytes themselves: every call goes on exactly where the last one ended."""
    whole, at = b"".join(pieces), 0
    stream = Stream(Halting(pieces, error))
    with patch.object(opening, "CHUNK", chunk):
        for name, size in [*calls, *[("read", 5)] * (len(whole) + 1)]:
            rest = whole[at:]
            if not rest and error is not None:
                with pytest.raises(type(error)):
                    getattr(stream, name)(size)
                continue
            found = getattr(stream, name)(size)
            line = rest[: rest.find(b"\n") + 1] or rest
            wanted = {"read_full": rest[:size], "readline": line[:size]}
            assert found == wanted.get(name, rest[: len(found)])
            assert len(found) <= size
            assert found or not rest
            at += len(found)
    assert at == len(whole)


@packings
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_a_bomb_goes_to_quarantine_in_little_memory(tmp_path, packing, name):
    size = 60_000_000 if packing in (".gz", ".zst") else 12_000_000
    root = tmp_path / "in"
    root.mkdir()
    (root / (name + packing)).write_bytes(PACK[packing](b'{"text": "' + b"0" * size))
    tracemalloc.start()
    try:
        documents, quarantine, _ = read(config(root, max_line_mb=1, max_characters=1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6  # zstandard's blocks of four bytes for 128 KB; the others stay below 10 MB
    if name == "a.txt":
        assert [len(text) for _, text in documents] == [4000]
    else:
        assert not documents
        assert [item["reason"] for item in quarantine] in (["line_too_long"], ["too_long"])
