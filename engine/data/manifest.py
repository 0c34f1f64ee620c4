"""manifest.json of a prepared directory: reading it, holding the files against it, saying what changed since.

It holds nothing that differs between two runs on the same input: no times, no host. ``sources.jsonl`` beside it
lists every file read with its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from engine import disk
from engine.config.prepare import PrepareConfig
from engine.data import collectors
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.data.units import Slice
from engine.errors import UserError

# Raised when the same input and settings would give other bytes.
VERSION = 2
MANIFEST, SOURCES, SHARDS, QUARANTINE = "manifest.json", "sources.jsonl", "shards.jsonl", "quarantine.jsonl"
SPLITS = ("train", "validation")
_AGAIN = "Prepare it again with --overwrite."

# These say where to look, and what was found is compared itself; or they change nothing in the output.
_NOT_COMPARED = {"input", "output", "overwrite", "exclude", "include_hidden", "follow_symlinks"}
# Of no consequence for what is written.
_NOT_SETTINGS = {"input", "output", "overwrite", "workers", "executor", "cluster"}

# (number of the input, path below it, where in the file it starts) -> SHA-256
Sources = dict[tuple[int, str, int], str]


def sha256_file(path: Path) -> str:
    """Of the file's bytes; empty where it cannot be read."""
    try:
        return disk.sha256(path)
    except OSError:
        return ""


def settings_of(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The configuration as the manifest records it, a tokenizer by its content; paths are left to ``sources``."""
    settings = config.model_dump(mode="json", exclude=_NOT_SETTINGS)
    settings["decontaminate"]["sets"] = [_by_content(entry) for entry in config.decontaminate.sets]
    if tokenizer is not None:
        return settings | {"tokenizer": tokenizer.sha256}
    return settings | {"vocab_size": config.trained_vocab_size}


def _by_content(entry: str) -> str:
    name, _, path = entry.partition("=")
    return f"{name}={sha256_file(Path(path).expanduser())}"


def is_prepared(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def load(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared directory. UserError if there is none or it is not one."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("not a prepared directory (no manifest.json)", where=str(directory), fix=_AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), fix=_AGAIN) from None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in ("splits", "settings")):
        raise UserError("not a manifest of prepared data", where=str(path), fix=_AGAIN)
    return manifest


def load_sources(directory: Path) -> Sources:
    """What ``sources.jsonl`` lists; empty where it is missing or damaged, so that everything counts as changed."""
    try:
        lines = (directory / SOURCES).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        return {(item["input"], item["path"], item.get("start", 0)): item["sha256"] for item in items}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def current_sources(pieces: Sequence[Slice]) -> Sources:
    """The same of the files as they are now. Reads them all, in several threads: hashing lets others run."""
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_sha256_slice, pieces)
        return {
            (piece.file.input, piece.file.name, piece.start): found
            for piece, found in zip(pieces, hashes, strict=True)
        }


def _sha256_slice(piece: Slice) -> str:
    """As `Reader.sha256` will be."""
    file = piece.file
    if file.kind == "collector":
        return collectors.load(file.path).identity()
    if file.kind != "jsonl":
        return hashlib.sha256().hexdigest() if piece.start else sha256_file(file.path)
    try:
        return disk.sha256_range(file.path, piece.start, piece.end)
    except OSError:
        return ""


def verify(directory: Path, manifest: dict[str, Any]) -> None:
    """UserError that names the first file that is not what the manifest says. Reads every byte."""
    for name, described in shards_of(manifest).items():
        for suffix in ("bin", "idx"):
            path = directory / f"{name}.{suffix}"
            found = sha256_file(path)
            if found != described.get(f"{suffix}_sha256"):
                problem = "missing or unreadable" if not found else "damaged, its SHA-256 is not the manifest's"
                raise UserError(problem, where=str(path), fix=_AGAIN)
    if load_tokenizer(directory / "tokenizer").sha256 != manifest.get("tokenizer_sha256"):
        raise UserError("damaged, not the tokenizer of the manifest", where=str(directory / "tokenizer"), fix=_AGAIN)


def shards_of(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name without suffix -> what the manifest says of that pair of files; of a split in one piece its own name."""
    splits = {split: manifest["splits"].get(split, {}) for split in [*SPLITS, *manifest["splits"]]}
    found: dict[str, dict[str, Any]] = {}
    for split, described in splits.items():
        shards = described.get("shards")
        found |= {split: described} if shards is None else {shard["name"]: shard for shard in shards}
    return found


def changes(old: dict[str, Any], old_sources: Sources, settings: dict[str, Any], sources: Sources) -> list[str]:
    """In words, what differs between a prepared directory and a new request; empty if nothing."""
    found = []
    if old.get("version") != VERSION:
        found.append(f"prepared by another version of this program ({old.get('version')}, now {VERSION})")
    before, now = _flat(old.get("settings", {})), _flat(settings)
    defaults = _flat({
        name: field.get_default(call_default_factory=True) for name, field in PrepareConfig.model_fields.items()
    })  # fmt: skip
    for name in [*now, *(name for name in before if name not in now)]:  # a section that is unset has no fields
        old_value, value = (values.get(name, defaults.get(name)) for values in (before, now))
        if name not in _NOT_COMPARED and old_value != value:
            found.append(f"{name} {_brief(old_value)} -> {_brief(value)}")
    kinds = {
        "changed": [key for key in sources if key in old_sources and old_sources[key] != sources[key]],
        "added": [key for key in sources if key not in old_sources],
        "removed": [key for key in old_sources if key not in sources],
    }
    for kind, keys in kinds.items():
        if keys:
            found.append(f"{len(keys):,} file{'s' * (len(keys) > 1)} {kind} ({keys[0][1]}{', …' * (len(keys) > 1)})")
    return found


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Sections dissolved into dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        else:
            found[name] = value
    return found


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"
