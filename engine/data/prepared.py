"""A prepared directory as the loader sees it: the pair of files of a split, and what manifest.json says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.indexed import IndexedDataset
from engine.errors import UserError

# The whole .bin is hashed on opening up to this size (0.2 s with SHA instructions); larger ones by their size alone.
HASHED_BYTES = 256 * 2**20
_PREPARE = "Prepare the data again with `mainspring prepare`"


@dataclass(frozen=True)
class PreparedSplit:
    """An opened split; the rest is None when there is no manifest (files made by Megatron's own tools)."""

    dataset: IndexedDataset
    vocab_size: int | None
    tokenizer_sha256: str | None = None


def open_split(directory: Path, split: str, *, remember: Path | None = None) -> PreparedSplit:
    """Opens `directory/split.bin/.idx`, or its shards, and holds them against the manifest, if there is one.

    ``remember``: a folder that spares files the checks they passed before (`engine.data.verified`). Raises UserError
    for a directory or file that is missing, damaged, or not the one the manifest describes.
    """
    if not directory.is_dir():
        problem = "not a directory" if directory.exists() else "no such directory"
        raise UserError(problem, where=str(directory), fix="data.path names a folder written by `mainspring prepare`")
    dataset = IndexedDataset(directory / split, remember=remember)
    manifest = _manifest(directory / "manifest.json")
    splits = _object(manifest.get("splits", {}), directory, "splits")
    if split in splits:
        _check(dataset, _shards(_object(splits[split], directory, f"splits.{split}"), directory, split))
    return PreparedSplit(dataset, manifest.get("vocab_size"), manifest.get("tokenizer_sha256"))


def same_tokenizer(directories: Sequence[Path], splits: Sequence[PreparedSplit]) -> None:
    """UserError where one tokenizer did not make all tokens: an id would mean different text in each source."""
    named = [(path, split.tokenizer_sha256) for path, split in zip(directories, splits, strict=True)
             if split.tokenizer_sha256 is not None]
    for path, sha256 in named:
        if sha256 != named[0][1]:
            raise UserError(f"was tokenized by another tokenizer than {named[0][0]}", where=str(path),
                            fix="Prepare it again with --tokenizer of the first")


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), fix=_PREPARE) from None
    if not isinstance(manifest, dict):
        raise UserError("is no JSON object", where=str(path), fix=_PREPARE)
    for name, kind, wanted in (("vocab_size", int, "a number"), ("tokenizer_sha256", str, "a text")):
        if not isinstance(manifest.get(name), kind | None):
            raise UserError(f"{name} is not {wanted}", where=str(path), fix=_PREPARE)
    return manifest


def _object(value: Any, directory: Path, name: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{name} is no JSON object", where=str(directory / "manifest.json"), fix=_PREPARE)
    return value


def _shards(described: dict, directory: Path, split: str) -> list[dict]:
    """What is said of each pair of files."""
    shards = described.get("shards", [described])
    if not isinstance(shards, list):
        raise UserError(f"splits.{split}.shards is no list", where=str(directory / "manifest.json"), fix=_PREPARE)
    return [_object(shard, directory, f"splits.{split}.shards[{n}]") for n, shard in enumerate(shards)]


def _check(dataset: IndexedDataset, shards: Sequence[dict]) -> None:
    if len(shards) != len(dataset.pairs):
        raise UserError(f"has {len(dataset.pairs)} shards, manifest.json describes {len(shards)}", where=dataset.where,
                        fix=_PREPARE)
    hashed = dataset.num_tokens * dataset.dtype.itemsize <= HASHED_BYTES and any("bin_sha256" in s for s in shards)
    hashes = dataset.bin_sha256() if hashed else [None] * len(shards)
    for pair, shard, bin_sha256 in zip(dataset.pairs, shards, hashes, strict=True):
        _compare(pair.idx_path, shard, tokens=pair.num_tokens, idx_sha256=pair.fingerprint)
        if bin_sha256 is not None:
            _compare(pair.bin_path, shard, bin_sha256=bin_sha256)


def _compare(file: Path, described: dict, **found: int | str) -> None:
    for name, value in found.items():
        if described.get(name, value) != value:
            raise UserError(f"is not the file manifest.json describes ({name} {value}, there {described[name]})",
                            where=str(file), fix=_PREPARE)
