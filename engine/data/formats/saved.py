"""Hugging Face datasets: the Arrow files of one that was saved to a folder, or that the hub has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import UserError

_SPLIT = re.compile(r"\w+(\.\w+)*")


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder: a dataset, or several splits."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def dataset_files(name: str) -> list[Path]:
    """The Arrow files, in order, of ``NAME[[:CONFIG]:SPLIT]`` from the hub (fetched into its cache if they are not
    there) or of ``FOLDER[:SPLIT]``. The split is train, or the only one.

    Raises:
        UserError: no such dataset or split, or the `datasets` package is needed and missing.
    """
    folder, _, last = name.rpartition(":")
    if Path(name).is_dir():
        folder, last = name, ""
    if folder and Path(folder).is_dir():
        return _saved_files(Path(folder), last or None)
    path, *rest = name.split(":")
    split = rest.pop() if rest else None
    config = rest.pop() if rest else None
    if rest or (split is not None and not _SPLIT.fullmatch(split)):
        problem, fix = "no name of a dataset on the hub, nor a folder", "Give hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."
        raise UserError(problem, where=f"hf:{name}", fix=fix)
    found = load(path, config, split)
    return [Path(one["filename"]) for one in found.cache_files]


def _saved_files(folder: Path, split: str | None) -> list[Path]:
    where = str(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits") or []
        split = split or (splits[0] if len(splits) == 1 else None)
        if split not in splits:
            problem = f"no split {split!r}" if split else "several splits"
            raise UserError(f"{problem} (there are {', '.join(splits)})", where=where,
                            fix=f"Give one: hf:{where}:{splits[0] if splits else 'train'}.")  # fmt: skip
        folder = folder / str(split)
    elif split:
        raise UserError(f"one dataset without splits, so none is {split!r}", where=where, fix=f"Give hf:{where}.")
    return [folder / one["filename"] for one in _json(folder / "state.json").get("_data_files") or []]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), fix="Save the dataset again.") from None
    return found if isinstance(found, dict) else {}


def strays(root: Path, names: Iterable[str]) -> set[str]:
    """Of the paths below ``root``, the Arrow files beside a saved dataset that are none of its own: caches of its
    `map` and the like, which hold its rows a second time."""
    own: dict[Path, set[str]] = {}
    found = set()
    for name in names:
        path = root / name
        if path.suffix.lower() != ".arrow" or not (path.parent / "state.json").is_file():
            continue
        if path.parent not in own:
            own[path.parent] = {one["filename"] for one in _json(path.parent / "state.json").get("_data_files") or []}
        if path.name not in own[path.parent]:
            found.add(name)
    return found


def load(path: str, config: str | None, split: str | None) -> Any:
    """The split (None: train) of a dataset from a folder that it was saved to, or from the hub; no code of its runs.

    Raises:
        UserError: it cannot be had, it has no such split, or the `datasets` package is missing.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError("Hugging Face datasets need the datasets package", where=path,
                        fix="pip install datasets") from None  # fmt: skip
    split = split or "train"
    try:
        if Path(path).is_dir():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError, LookupError, DatasetsError) as error:
        problem = " ".join(str(error).split())[:200]
        fix = "Check its name and the network, or download it and give the folder."
        raise UserError(f"cannot load the dataset ({problem})", where=path, fix=fix) from None
    if not isinstance(found, dict):
        return found
    if split not in found:
        problem = f"no split {split!r} (there are {', '.join(map(str, found))})"
        raise UserError(problem, where=path, fix="Set the source's split.")
    return found[split]
