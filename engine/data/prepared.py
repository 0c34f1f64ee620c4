"""A prepared directory as the loader sees it: the pair of files of a split, and what manifest.json says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from engine.data.indexed import IndexedDataset
from engine.errors import UserError

# The whole .bin is hashed on opening up to this size (0.2 s with SHA instructions); larger ones by their size alone.
HASHED_BYTES = 256 * 2**20
_PREPARE = "Prepare the data again with `mainspring prepare`"


@dataclass(frozen=True)
class PreparedSplit:
    """An opened split; vocab_size is None when there is no manifest (files made by Megatron's own tools)."""

    dataset: IndexedDataset
    vocab_size: int | None


def open_split(directory: Path, split: str) -> PreparedSplit:
    """Opens `directory/split.bin/.idx` and holds them against the manifest, if there is one.

    Raises UserError for a directory or file that is missing, damaged, or not the one the manifest describes.
    """
    if not directory.is_dir():
        problem = "not a directory" if directory.exists() else "no such directory"
        raise UserError(problem, where=str(directory), fix="data.path names a folder written by `mainspring prepare`")
    dataset = IndexedDataset(directory / split)
    manifest = _manifest(directory / "manifest.json")
    _check(dataset, manifest.get("splits", {}).get(split, {}))
    return PreparedSplit(dataset, manifest.get("vocab_size"))


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), fix=_PREPARE) from None
    if not isinstance(manifest, dict):
        raise UserError("is no JSON object", where=str(path), fix=_PREPARE)
    return manifest


def _check(dataset: IndexedDataset, described: dict) -> None:
    found = {"tokens": dataset.num_tokens, "idx_sha256": dataset.fingerprint}
    if "bin_sha256" in described and dataset.num_tokens * dataset.dtype.itemsize <= HASHED_BYTES:
        found["bin_sha256"] = dataset.bin_sha256()
    for name, value in found.items():
        if described.get(name, value) != value:
            file = dataset.bin_path if name == "bin_sha256" else dataset.idx_path
            raise UserError(f"is not the file manifest.json describes ({name} {value}, there {described[name]})",
                            where=str(file), fix=_PREPARE)
