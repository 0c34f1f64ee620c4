"""How the input is cut: at line borders, wholly, by nothing but the files and unit_mb; and the lines' own numbers."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readings import config, read, tree

from engine.data.quarantine import Quarantine, merged
from engine.data.reading import Reader
from engine.data.sources import list_files
from engine.data.units import LineNumbers, Slice, Unit, plan_units
from engine.errors import UserError


def units_of(cfg) -> list[Unit]:
    return plan_units(list_files(cfg), cfg)


LINE = st.sampled_from([b"", b" ", b"{", b'{"text": "\xff"}', b'{"text": 5}']) | st.integers(0, 300).map(
    lambda size: json.dumps({"text": "x" * size}).encode())


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, min_size=1, max_size=60), unit=st.integers(1, 2000), ended=st.booleans(),
       mark=st.booleans())  # fmt: skip
def test_pieces_of_json_lines_hold_what_the_whole_holds(tmp_path, lines, unit, ended, mark):
    raw = b"\xef\xbb\xbf" * mark + b"\n".join(lines) + b"\n" * ended
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    whole, cut = config(path.parent), config(path.parent, unit_mb=unit / 1e6)
    assert len(units_of(whole)) == 1
    pieces = [piece for one in units_of(cut) for piece in one.slices]
    if len(raw) <= unit:
        assert pieces == [Slice(pieces[0].file)]
    else:
        borders = [piece.start for piece in pieces] + [pieces[-1].end]
        assert borders[0] == 0
        assert borders[-1] == len(raw)
        assert all(raw[border - 1 : border] == b"\n" for border in borders[1:-1])
        assert [piece.end for piece in pieces] == borders[1:]
        # Each goes on to the first end of a line at or behind the limit, no further.
        for piece in pieces[:-1]:
            assert piece.end is not None
            assert raw.find(b"\n", piece.start + unit - 1) == piece.end - 1
    expected, found = read(whole), read(cut)
    assert found[:2] == expected[:2]
    assert found[2].records == expected[2].records
    reader = Reader(cut, Quarantine(io.StringIO()))
    for piece in pieces:
        assert all(place.source.startswith(f"{path}+{piece.start}:" if piece.start else f"{path}:")
                   for place in reader.read(piece))  # fmt: skip
        held = raw[piece.start : piece.end]
        assert (reader.sha256, reader.size) == (hashlib.sha256(held).hexdigest(), len(held))


def test_a_piece_ends_with_the_line_that_fills_it(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl").write_text('{"a": 12}\n' * 9)
    (unit, *_) = units_of(config(root, unit_mb=20e-6))
    assert [(piece.start, piece.end) for piece in unit.slices] == [(0, 20)]
    pieces = [piece for unit in units_of(config(root, unit_mb=21e-6)) for piece in unit.slices]
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 30), (30, 60), (60, 90)]


def test_one_line_longer_than_units_is_one_piece(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    short = b'{"text": "a"}\n'
    (root / "a.jsonl").write_bytes(short * 10 + b'{"text": "' + b"x" * 5_000_000 + b'"}\n' + short * 10)
    pieces = [piece for unit in units_of(config(root, unit_mb=0.0001)) for piece in unit.slices]
    sizes = [(piece.end or 0) - piece.start for piece in pieces]
    assert sorted(sizes)[-1] > 5_000_000
    assert [size < 200 for size in sizes].count(False) == 1
    assert len(read(config(root, unit_mb=0.0001))[0]) == 21


def test_small_files_share_a_unit_and_nothing_else_is_cut(tmp_path):
    root = tree(tmp_path / "in", *(f"{number:03}.txt" for number in range(100)))
    (root / "big.csv").write_text("text\n" + "row\n" * 50_000)
    units = units_of(config(root, unit_mb=0.05))
    assert [unit.number for unit in units] == list(range(len(units)))
    names = [piece.file.name for unit in units for piece in unit.slices]
    assert names == sorted(names)
    assert len(names) == 101
    assert all(piece.whole for unit in units for piece in unit.slices)
    assert [len(unit.slices) for unit in units] == [12] * 8 + [4, 1]


def test_a_unit_as_json_is_the_same(tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.txt", b"a.jsonl"):
        with open(bytes(tmp_path / "in") + b"/" + name, "w") as stream:
            stream.write('{"text": "x"}\n' * 50)
    units = units_of(config(tmp_path / "in", unit_mb=0.0001))
    assert len(units) > 3
    assert [Unit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units] == units


@pytest.mark.parametrize("change", [b"short", b'{"text": "longer, and no line begins there"}\n' * 9])
def test_a_file_that_is_no_longer_what_was_cut_is_an_error(tmp_path, change):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "x"}\n' * 20)
    cfg = config(path.parent, unit_mb=0.0001)
    last = units_of(cfg)[-1].slices[-1]
    path.write_bytes(change)
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read"):
        list(Reader(cfg, Quarantine(io.StringIO())).read(last))


def test_a_file_that_is_gone_is_for_the_reader_to_say(tmp_path):
    root = tree(tmp_path / "in", "a.txt", "b.jsonl", "c.parquet")
    cfg = config(root)
    listing = list_files(cfg)
    for file in listing.files:
        file.path.unlink()
    stream = io.StringIO()
    reader = Reader(cfg, Quarantine(stream))
    for unit in plan_units(listing, cfg):
        for piece in unit.slices:
            assert list(reader.read(piece)) == []
            assert reader.sha256 == ""
    assert [json.loads(line)["reason"] for line in stream.getvalue().splitlines()] == ["unreadable"] * 3


def test_places_in_pieces_become_lines_of_the_file(tmp_path):
    root = tree(tmp_path / "in", "a.jsonl", "b.jsonl")
    a, b = list_files(config(root)).files
    numbers = LineNumbers([(Slice(a, 0, 10), 3), (Slice(a, 10, 30), 4), (Slice(a, 30, 40), 2), (Slice(b, 0, 5), 1),
                           (Slice(b, 5, 9), 1)])  # fmt: skip
    assert numbers.place(f"{a.path}:2") == f"{a.path}:2"
    assert numbers.place(f"{a.path}+10:1") == f"{a.path}:4"
    assert numbers.place(f"{a.path}+30:2") == f"{a.path}:9"
    assert numbers.place(f"{b.path}+5:1") == f"{b.path}:2"
    assert numbers.place("other+30:2") == "other+30:2", "a file may be called so"
    assert numbers.item({"file": str(a.path), "line": 2, "start": 30, "reason": "x"}) == {
        "file": str(a.path), "line": 9, "reason": "x"}  # fmt: skip
    assert numbers.item({"file": str(a.path), "line": None}) == {"file": str(a.path), "line": None}


@settings(deadline=None, max_examples=50)
@given(items=st.lists(st.tuples(st.sampled_from("abcde"), st.none() | st.integers(1, 9)), max_size=60),
       cuts=st.lists(st.integers(0, 60), max_size=5), most=st.integers(0, 8))  # fmt: skip
def test_quarantines_of_units_add_up_to_one_of_all(items, cuts, most):
    def quarantine(some) -> Quarantine:
        one = Quarantine(io.StringIO(), most)
        for number, (reason, line) in enumerate(some):
            one.add(f"file {number}", line, reason, "detail")
        return one

    numbered = list(enumerate(items))
    borders = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    parts = []
    for a, b in pairwise(borders):
        one = Quarantine(io.StringIO(), most)
        for number, (reason, line) in numbered[a:b]:
            one.add(f"file {number}", line, reason, "detail")
        parts.append(one.as_manifest())
    assert merged(parts, most) == quarantine(items).as_manifest()
