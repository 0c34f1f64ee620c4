"""manifest.json of a prepared directory: reading it, holding the files against it, saying what changed since.

It holds nothing that differs between two runs on the same input: no times, no host. ``sources.jsonl`` beside it
lists every file read with its SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine import disk
from engine.config.prepare import PrepareConfig
from engine.data.sources import SourceFile
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError

# Raised when the same input and settings would give other bytes.
VERSION = 1
MANIFEST, SOURCES, QUARANTINE = "manifest.json", "sources.jsonl", "quarantine.jsonl"
SPLITS = ("train", "validation")
_AGAIN = "Prepare it again with --overwrite."

# These say where to look, and what was found is compared itself; or they change nothing in the output.
_NOT_COMPARED = {"input", "output", "overwrite", "exclude", "include_hidden", "follow_symlinks"}

Sources = dict[tuple[int, str], str]  # (number of the input, path below it) -> SHA-256


def sha256_file(path: Path) -> str:
    """Of the file's bytes; empty where it cannot be read."""
    try:
        return disk.sha256(path)
    except OSError:
        return ""


def settings_of(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The configuration as the manifest records it, a tokenizer by its content; paths are left to ``sources``."""
    settings = config.model_dump(mode="json", exclude={"input", "output", "overwrite"})
    if tokenizer is not None:
        return settings | {"tokenizer": tokenizer.sha256}
    return settings | {"vocab_size": config.trained_vocab_size}


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
        return {(item["input"], item["path"]): item["sha256"] for item in items}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def current_sources(files: Iterable[SourceFile]) -> Sources:
    """The same of the files as they are now. Reads them all."""
    return {(file.input, file.name): sha256_file(file.path) for file in files}


def verify(directory: Path, manifest: dict[str, Any]) -> None:
    """UserError that names the first file that is not what the manifest says. Reads every byte."""
    for split in SPLITS:
        for suffix in ("bin", "idx"):
            path = directory / f"{split}.{suffix}"
            found, expected = sha256_file(path), manifest["splits"].get(split, {}).get(f"{suffix}_sha256")
            if found != expected:
                problem = "missing or unreadable" if not found else "damaged, its SHA-256 is not the manifest's"
                raise UserError(problem, where=str(path), fix=_AGAIN)
    if load_tokenizer(directory / "tokenizer").sha256 != manifest.get("tokenizer_sha256"):
        raise UserError("damaged, not the tokenizer of the manifest", where=str(directory / "tokenizer"), fix=_AGAIN)


def changes(old: dict[str, Any], old_sources: Sources, settings: dict[str, Any], sources: Sources) -> list[str]:
    """In words, what differs between a prepared directory and a new request; empty if nothing."""
    found = []
    if old.get("version") != VERSION:
        found.append(f"prepared by another version of this program ({old.get('version')}, now {VERSION})")
    before = old.get("settings", {})
    for name, value in settings.items():
        default = PrepareConfig.model_fields[name].get_default(call_default_factory=True)
        if name not in _NOT_COMPARED and before.get(name, default) != value:
            found.append(f"{name} {_brief(before.get(name, default))} -> {_brief(value)}")
    kinds = {
        "changed": [key for key in sources if key in old_sources and old_sources[key] != sources[key]],
        "added": [key for key in sources if key not in old_sources],
        "removed": [key for key in old_sources if key not in sources],
    }
    for kind, keys in kinds.items():
        if keys:
            found.append(f"{len(keys):,} file{'s' * (len(keys) > 1)} {kind} ({keys[0][1]}{', …' * (len(keys) > 1)})")
    return found


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"
