"""Tokenized examples of one source on disk: written once, beside their place, and renamed; then mapped by every rank.

An entry is a folder: ``manifest.json`` (the key in full, counts, sizes and hashes), ``quarantine.jsonl`` (every row
that was refused, with its place and the reason) and for each split ``SPLIT.tokens`` and ``SPLIT.lengths``, both
little-endian int32. An example is one or three runs of tokens one behind another (its own; or prompt, chosen,
rejected), ``lengths`` has a row for each example. Token t is stored as t where it is supervised, else as ~t = -t - 1:
one file, one read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from engine import disk
from engine.data.reading import Quarantine
from engine.errors import UserError

VERSION = 1
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
_HASHED_BYTES = 256 * 2**20  # a larger file is checked by its size alone, as prepared data is


class Example(NamedTuple):
    """Tokens [n], and which of them are predicted in the loss."""

    tokens: np.ndarray  # int32
    mask: np.ndarray  # bool


class Pair(NamedTuple):
    """Two answers to one prompt; each run of tokens has at least one."""

    prompt: np.ndarray  # int32
    chosen: np.ndarray
    rejected: np.ndarray


def stored(example: Example) -> np.ndarray:
    return np.where(example.mask, example.tokens, ~example.tokens)


@dataclass(frozen=True, eq=False)
class Store:
    """One split of an entry, mapped: ``len`` examples of ``lengths_np`` (p parts) tokens."""

    source: str  # as the user named it
    lengths_np: np.ndarray  # int32
    tokens: np.ndarray  # int32, of all examples
    starts_n: np.ndarray  # int64, where each begins in tokens

    @classmethod
    def of(cls, source: str, items: Sequence[Example] | Sequence[Pair]) -> Store:
        """The same in memory, of at least one example."""
        runs_n = [[stored(item)] if isinstance(item, Example) else list(item) for item in items]
        lengths_np = np.array([[len(run) for run in runs] for runs in runs_n], np.int32)
        tokens = np.concatenate([run for runs in runs_n for run in runs]).astype(np.int32)
        return cls(source, lengths_np, tokens, _starts(lengths_np))

    def __len__(self) -> int:
        return len(self.lengths_np)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def _run(self, number: int) -> np.ndarray:
        first = int(self.starts_n[number])
        return self.tokens[first:first + int(self.lengths_np[number].sum())]

    def example(self, number: int) -> Example:
        run = self._run(number)
        mask = run >= 0
        return Example(np.where(mask, run, ~run), mask)

    def pair(self, number: int) -> Pair:
        prompt, chosen, _ = (int(length) for length in self.lengths_np[number])
        run = self._run(number)
        return Pair(run[:prompt], run[prompt:prompt + chosen], run[prompt + chosen:])


class Writer:
    """Writes an entry into an empty folder; ``finish`` makes it complete."""

    def __init__(self, folder: Path, parts: int):
        self.folder, self.parts = folder, parts
        self._counts = {split: {"examples": 0, "tokens": 0, "supervised_tokens": 0} for split in SPLITS}
        self._open = contextlib.ExitStack()
        self._files: dict[str, IO] = {
            name: self._open.enter_context(open(folder / name, "wb", buffering=2**20))  # noqa: SIM115
            for name in (f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "lengths"))}
        quarantine = self._open.enter_context(open(folder / QUARANTINE, "w", encoding="utf-8"))  # noqa: SIM115
        self.quarantine, self._files[QUARANTINE] = Quarantine(quarantine), quarantine

    def add(self, split: str, item: Example | Pair) -> None:
        if isinstance(item, Example):
            runs, supervised = [stored(item)], int(item.mask.sum())
        else:
            runs, supervised = list(item), len(item.chosen) + len(item.rejected)
        assert len(runs) == self.parts
        lengths = np.array([len(run) for run in runs], "<i4")
        for run in runs:
            self._files[f"{split}.tokens"].write(run.astype("<i4").tobytes())
        self._files[f"{split}.lengths"].write(lengths.tobytes())
        counts = self._counts[split]
        counts["examples"] += 1
        counts["tokens"] += int(lengths.sum())
        counts["supervised_tokens"] += supervised

    def finish(self, key: dict[str, Any], more: dict[str, Any]) -> None:
        """Flushes everything to the disk, the manifest last."""
        files = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": disk.sha256(self.folder / name)}
        examples = sum(counts["examples"] for counts in self._counts.values())
        refused = self.quarantine.as_manifest()
        manifest = {"version": VERSION, "key": key, "parts": self.parts, "splits": self._counts, "refused": refused,
                    "rows": examples + refused["files"] + refused["lines"], "files": files}
        (self.folder / MANIFEST).write_text(json.dumps(manifest | more, indent=2) + "\n", encoding="utf-8")
        disk.sync(self.folder / MANIFEST)
        disk.sync(self.folder)

    def close(self) -> None:
        self._open.close()


def key_hash(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, key: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a whole entry for this key; or None, and what is wrong with it (empty if there is none)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["version"] != VERSION or manifest["key"] != json.loads(json.dumps(key)):
            return None, "is of another version or other settings"
        for name, described in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != described["bytes"]:
                return None, f"{name} has not the size that its manifest says"
            if described["bytes"] <= _HASHED_BYTES and disk.sha256(file) != described["sha256"]:
                return None, f"{name} is damaged (its SHA-256 is not the manifest's)"
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing" if folder.exists() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"cannot be read ({type(error).__name__}: {error})"
    return manifest, ""


def open_split(folder: Path, manifest: dict[str, Any], split: str, source: str) -> Store:
    """Maps a split of an entry that ``read_manifest`` found whole."""
    lengths_np = _map(folder / f"{split}.lengths").reshape(-1, manifest["parts"])
    tokens = _map(folder / f"{split}.tokens")
    if len(tokens) != lengths_np.sum(dtype=np.int64):
        raise UserError("its lengths do not add up to its tokens", where=str(folder), fix="Delete this folder")
    return Store(source, lengths_np, tokens, _starts(lengths_np))


def _starts(lengths_np: np.ndarray) -> np.ndarray:
    length_n = lengths_np.sum(1, dtype=np.int64)
    return length_n.cumsum() - length_n


def _map(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, "<i4")  # an empty file cannot be mapped
    return np.memmap(path, "<i4", "r").view(np.ndarray)  # the subclass makes every slice slow
