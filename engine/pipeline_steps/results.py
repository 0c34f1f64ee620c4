"""What a step left in its folder, named by its content: a checkpoint, a prepared directory, or plain files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import disk
from engine.checkpoint import layout
from engine.config import load_yaml
from engine.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Result:
    """``sha256`` is of the manifest where the folder has one (it holds every file's hash), else of all files.

    ``path`` is relative to the step's folder; ``step`` and ``of_files`` are set where they mean something.
    """

    kind: str  # "checkpoint", "prepared" or "files"
    path: str
    sha256: str
    step: int | None = None
    of_files: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def find(folder: Path, *, verify: bool = False, trains: bool = False) -> Result:
    """What lies in ``folder``. ``verify`` reads every byte of a checkpoint; plain files are read in any case.

    ``trains``: a checkpoint is expected. Raises ``UserError`` when there is nothing, or what is there is damaged.
    """
    if trains or layout.root(folder).is_dir():
        checkpoint = layout.find(folder)
        if verify:
            layout.verify(checkpoint)
        return Result("checkpoint", str(checkpoint.relative_to(folder)), disk.sha256(checkpoint / MANIFEST),
                      step=layout.step_of(checkpoint))
    if (folder / MANIFEST).is_file() and (folder / "train.idx").is_file():
        return Result("prepared", ".", disk.sha256(folder / MANIFEST))
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise UserError("the step ended without an error, but left nothing here", where=str(folder),
                        fix="Check that its configuration writes to this folder (${here})")
    listing = [(path.relative_to(folder).as_posix(), disk.sha256(path)) for path in files]
    return Result("files", ".", digest(listing), of_files=len(files))


def data_hashes(folder: Path) -> dict[str, str]:
    """What a training run read, by the paths in its resolved config.yaml: prepared directories and example files."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    config = load_yaml(path)
    data, examples = config.get("data") or {}, config.get("examples") or {}
    named = [data.get("path"), *(entry.get("path") for entry in data.get("blend") or [])]
    named += [source.get("path") for part in ("train", "validation") for source in examples.get(part) or []]
    hashes = {name: outside(Path(name)) for name in named if name}
    return {name: found for name, found in hashes.items() if found is not None}


def outside(path: Path) -> str | None:
    """The hash of a file, of a folder's manifest.json, or of a folder of a few files; None for anything else.

    What is only a word that happens to be no path has none; nor has a tree too large to read at every start.
    """
    try:
        if path.is_file():
            return disk.sha256(path)
        if (path / MANIFEST).is_file():
            return disk.sha256(path / MANIFEST)
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    except (OSError, ValueError):  # too long for a name, or not allowed to look
        return None
    if not files or len(files) > 64 or sum(p.stat().st_size for p in files) > 1 << 30:
        return None
    return digest([(p.name, disk.sha256(p)) for p in files])


def digest(value: Any) -> str:
    """SHA-256 of a plain value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
