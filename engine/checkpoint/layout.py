"""Where checkpoints lie, and the protocol that makes them all-or-nothing.

    <output_dir>/checkpoints/
        latest_checkpointed_iteration.txt       the pointer, replaced last
        iter_0000100/                           immutable once it has this name
            sharded/                            Megatron's distributed checkpoint: weights and optimizer
            rng/rank_00000.safetensors          random state of each rank
            state.json                          step, data position, best loss, layout
            config.yaml  tokenizer/             what evaluate and generate need besides weights
            manifest.json                       SHA-256 of every file above

A save writes ``iter_N.tmp/``, flushes and hashes it, writes the new pointer beside the old one, renames the folder, and
only then the pointer. A kill at any moment leaves the previous checkpoint and pointer as they were, and at most a
``.tmp`` folder that the next save removes; between the two renames, the waiting pointer names the finished checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from engine import disk
from engine.errors import UserError

POINTER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"  # written by a run with checkpoint.load_best_at_end
_WAITING = POINTER + ".tmp"
_NAME = re.compile(r"iter_(\d{7,})$")


def root(output_dir: Path | str) -> Path:
    """The checkpoints folder of a run."""
    return Path(output_dir) / "checkpoints"


def folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"iter_{step:07d}"


def step_of(path: Path) -> int:
    match = _NAME.search(path.name)
    assert match, path
    return int(match.group(1))


def existing(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, oldest first. A folder without a manifest was not finished by us and does not count."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if p.is_dir() and _NAME.match(p.name) and (p / "manifest.json").exists()]
    return sorted(found, key=step_of)


def _named(pointer: Path) -> Path | None:
    """The folder that a pointer file names, None when it is missing or names none."""
    if not pointer.is_file():
        return None
    text = pointer.read_text(encoding="utf-8", errors="replace").strip()
    is_step = text.isascii() and text.isdigit() and len(text) < 20
    return folder(pointer.parent, int(text)) if is_step else None


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint that the pointer names; None when there is none at all.

    Raises ``UserError`` when the pointer is missing, damaged or names a checkpoint that is not there although there
    are others: starting again from step 0 in silence would be worse.
    """
    pointer, found = checkpoints / POINTER, existing(checkpoints)
    if found and found[-1] == _named(checkpoints / _WAITING):
        return found[-1]  # the save was killed between its two renames
    fix = (f"Continue from the newest with --resume_from_checkpoint {found[-1]}" if found
           else "Start afresh with --resume_from_checkpoint none, or in another --output_dir")
    if not pointer.exists():
        if not any(checkpoints.glob("iter_*[0-9]")):
            return None
        raise UserError("the pointer file is missing, but there are checkpoints", where=str(pointer), fix=fix)
    named = _named(pointer)
    if named not in found:
        text = pointer.read_text(encoding="utf-8", errors="replace").strip()
        raise UserError(f"holds {text[:40]!r}, which names no finished checkpoint", where=str(pointer), fix=fix)
    return named


def mark_best(checkpoints: Path, step: int) -> None:
    """Has ``find`` mean this step's checkpoint from here on."""
    waiting = checkpoints / (BEST + ".tmp")
    write_text(waiting, f"{step}\n")
    waiting.replace(checkpoints / BEST)
    disk.sync(checkpoints)


def forget_best(checkpoints: Path) -> None:
    """The run goes on: until it ends, ``find`` means the newest again."""
    (checkpoints / BEST).unlink(missing_ok=True)


def find(path: Path | str, *, newest: bool = False) -> Path:
    """The checkpoint that a user's path means: a checkpoint itself, a checkpoints folder, or a run's folder.

    Of a run's it is the one that the run ended with: the newest, or with ``checkpoint.load_best_at_end`` the best;
    ``newest``: that in any case. Raises ``UserError`` when there is none.
    """
    path = Path(path)
    if (path / "manifest.json").exists() and _NAME.search(path.resolve().name):
        return path
    for checkpoints in (path, root(path)):
        if (checkpoints / POINTER).exists() or existing(checkpoints):
            found = latest(checkpoints)
            best = None if newest else _named(checkpoints / BEST)
            if found is not None:
                return best if best is not None and best in existing(checkpoints) else found
    problem = "no checkpoint in this folder" if path.is_dir() else "no such folder"
    raise UserError(problem, where=str(path),
                    fix="Give a folder iter_NNNNNNN, or the output_dir of a run that saved one")


def write_text(path: Path, text: str) -> None:
    """Writes a small file to the disk."""
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def publish(temporary: Path, final: Path, hashes: dict[str, str]) -> None:
    """Turns a fully written temporary folder into a checkpoint, then moves the pointer to it."""
    write_text(temporary / "manifest.json", _manifest(hashes))
    waiting = final.parent / _WAITING
    write_text(waiting, f"{step_of(final)}\n")  # a full disk is met here, before anything has its name
    for directory in {temporary, *(p for p in temporary.rglob("*") if p.is_dir())}:
        disk.sync(directory)
    temporary.rename(final)
    disk.sync(final.parent)
    waiting.replace(final.parent / POINTER)
    disk.sync(final.parent)


def _manifest(hashes: dict[str, str]) -> str:
    return json.dumps({"version": 1, "files": hashes}, indent=1, sort_keys=True)


def verify(checkpoint: Path) -> None:
    """Checks every file against the manifest. Raises ``UserError`` naming the first damaged, missing or added one."""
    try:
        text = (checkpoint / "manifest.json").read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if _manifest(files) != text:
            raise ValueError("not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(checkpoint / "manifest.json"),
                        fix="Use another checkpoint") from error
    there = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {"manifest.json"}
    for name in sorted(there ^ set(files)):
        raise UserError("is missing" if name in files else "is not part of the checkpoint",
                        where=str(checkpoint / name), fix="Use another checkpoint: this one was changed after saving")
    for name, expected in files.items():
        if disk.sha256(checkpoint / name) != expected:
            raise UserError("does not match its SHA-256 in the manifest", where=str(checkpoint / name),
                            fix="Use another checkpoint: this file is damaged")


def clean_temporary(checkpoints: Path) -> None:
    """Removes what saves that did not finish left behind."""
    for path in checkpoints.glob("iter_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def prune(checkpoints: Path, *, keep_last: int, keep: set[int]) -> list[Path]:
    """Deletes all but the newest ``keep_last`` checkpoints and those of the steps in ``keep``. -> what was deleted."""
    deleted = []
    for path in existing(checkpoints)[:-keep_last]:
        if step_of(path) not in keep:
            doomed = path.with_name(path.name + ".tmp")  # a kill within the deletion leaves no half checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)
            deleted.append(path)
    return deleted
