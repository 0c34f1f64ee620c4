"""A Hugging Face checkpoint's safetensors files: what they hold, and slices of it without reading the rest.

r rows, c columns, g groups of 32 values that share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.export.names import GROUP, IGNORED, Piece, Stored

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_AGAIN = "Download or export the model again"
_TYPES = {"values": ("F32", "BF16", "F16", "F64"), "blocks": ("U8",), "scales": ("U8",)}
# The sixteen values of FP4 (E2M1) by their codes: OCP Microscaling Formats 1.0, section 5.3.3.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Files:
    """The tensors of a directory by name. A context manager; raises ``UserError`` for files that are missing, cut off
    or not as the index says."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._opened: list[Any] = []
        self._slices: dict[str, Any] = {}
        listed = _listed(directory)
        for file in sorted(set(listed.values())) if listed else [SINGLE]:
            self._open(directory / file)
        missing = sorted(listed.keys() - self._slices.keys())
        if missing:
            raise UserError(f"does not hold {_some(missing)}, which {INDEX} says it does",
                            where=str(directory / listed[missing[0]]), fix=_AGAIN)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UserError("this file of the model is missing", where=str(path), fix=_AGAIN)
        try:
            file = safe_open(path, framework="pt")
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"is damaged or not whole ({error})", where=str(path), fix=_AGAIN) from None
        if twice := sorted(found.keys() & self._slices.keys()):
            raise UserError(f"holds {_some(twice)}, which another file holds as well", where=str(path), fix=_AGAIN)
        self._opened.append(file)
        self._slices |= found

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._slices.clear()
        self._opened.clear()

    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """In the words of safetensors: F32, BF16, F16, U8, …"""
        return self._slices[name].get_dtype()

    def check(self, wanted: dict[str, Stored], spare: Iterable[str] = ()) -> None:
        """Refuses tensors that are missing, left over, or of another shape or type than ``wanted``."""
        ours = {name for name in self.names() if not IGNORED.search(name)} - set(spare)
        for problem, names in (("does not hold {}", wanted.keys() - ours),
                               ("holds {}, which this model does not have", ours - wanted.keys())):
            if names:
                raise UserError(problem.format(_some(sorted(names))), where=str(self.directory),
                                fix="Check that config.json and the files belong to one model")
        for name, expected in wanted.items():
            dtype = self._slices[name].get_dtype()
            if self.shape(name) != expected.shape:
                raise UserError(f"{name} is {list(self.shape(name))}, config.json makes it {list(expected.shape)}",
                                where=str(self.directory),
                                fix="Check that config.json and the files belong to one model")
            if dtype not in _TYPES[expected.kind]:
                raise UserError(f"{name} is stored as {dtype}, which is not known here", where=str(self.directory),
                                fix=f"Convert the model to {' or '.join(_TYPES['values'][:3])}")

    def rows(self, piece: Piece, first: int, last: int, columns: range | None) -> torch.Tensor:
        """Rows ``first`` to ``last`` of a piece, [r, c] or [r]; of its columns only those asked for."""
        start = piece.start + first * piece.step
        rows = slice(start, start + (last - first - 1) * piece.step + 1)
        lead = () if piece.expert is None else (piece.expert,)
        if piece.packed:
            assert columns is not None
            return self._packed(piece, lead, rows, columns)
        taken = self._slices[piece.name]
        if columns is None:
            return taken[(*lead, rows)][:: piece.step]
        across = slice(columns.start, columns.stop)
        if piece.transposed:
            return taken[(*lead, across, rows)].t()[:: piece.step]
        return taken[(*lead, rows, across)][:: piece.step]

    def _packed(self, piece: Piece, lead: tuple, rows: slice, columns: range) -> torch.Tensor:
        first = columns.start // GROUP
        groups = slice(first, -(-columns.stop // GROUP))
        blocks_rgb = self._slices[f"{piece.name}_blocks"][(*lead, rows, groups)][:: piece.step]
        scales_rg = self._slices[f"{piece.name}_scales"][(*lead, rows, groups)][:: piece.step]
        values_rc = mxfp4(blocks_rgb, scales_rg)
        return values_rc[:, columns.start - first * GROUP : columns.stop - first * GROUP]


def mxfp4(blocks_rgb: torch.Tensor, scales_rg: torch.Tensor) -> torch.Tensor:
    """Values of MXFP4 in fp32 [r, 32 g], exactly: FP4 codes, the low half of a byte first, times 2^(scale - 127)."""
    codes_rgc = torch.stack([blocks_rgb & 15, blocks_rgb >> 4], dim=-1).flatten(2)
    values_rgc = torch.tensor(_FP4)[codes_rgc.long()]
    return torch.ldexp(values_rgc, scales_rg.int()[..., None] - 127).flatten(1)


def _listed(directory: Path) -> dict[str, str]:
    """The index: the file of each tensor; empty where one file holds them all."""
    index = directory / INDEX
    if (directory / SINGLE).is_file() or not index.is_file():  # as Transformers, which takes the one file before shards
        if not (directory / SINGLE).is_file():
            pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
            fix = ("Convert its pickled weights, which could run code, with Transformers' "
                   "save_pretrained(…)" if pickled else "Give a directory that holds the weights")
            raise UserError(f"holds neither {SINGLE} nor {INDEX}", where=str(directory), fix=fix)
        return {}
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        if not listed or any(not isinstance(f, str) or "/" in f for f in listed.values()):
            raise ValueError("weight_map does not name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot be read ({error})", where=str(index), fix=_AGAIN) from None
    return listed


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
