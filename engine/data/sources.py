"""Raw input: which files are read, and in which order.

The order is that of the inputs as given, then of the path below each input, whatever the file system lists first.
An input is a folder, a file, a Hugging Face dataset (``hf:NAME[:CONFIG][:SPLIT]`` from the hub, ``hf:FOLDER[:SPLIT]``
as `datasets` saved it) or a collector of the user's (``python:MODULE:CLASS``, see `engine.data.collectors`)."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NoReturn

from engine.config.prepare import PrepareConfig
from engine.data import staging
from engine.data.formats import saved
from engine.data.formats.opening import packing_of
from engine.errors import UserError

FileKind = Literal["prose", "code", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "collector"]

PROSE = frozenset([".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex"])
CODE = frozenset([
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".cu", ".cuh", ".js", ".mjs",
    ".cjs", ".jsx", ".ts", ".tsx", ".rs", ".go", ".java", ".kt", ".kts", ".scala", ".swift", ".m", ".mm", ".cs",
    ".fs", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj",
    ".lisp", ".el", ".scm", ".dart", ".zig", ".nim", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".sql", ".proto",
    ".cmake", ".mk", ".vue", ".svelte", ".v", ".sv", ".vhd", ".asm", ".s", ".f90", ".f95", ".f",
])  # fmt: skip
RECORDS: dict[str, FileKind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
NOT_READ = frozenset([".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".html", ".htm", ".doc", ".docx", ".epub"])
ALWAYS_EXCLUDED = ("__pycache__", "node_modules")
READABLE = (
    "Read are .txt .md .rst, source code (.py .c .js …), .json .jsonl .csv .tsv .parquet .arrow, and .gz .zst .bz2 .xz "
    "of these."
)


@dataclass(frozen=True)
class SourceFile:
    """``name`` is the path below input number ``input`` and decides the order; ``direct``: the user named this file."""

    path: Path
    input: int
    name: str
    kind: FileKind
    direct: bool


@dataclass
class Listing:
    """The files to read, in order, and what was passed over."""

    files: list[SourceFile] = field(default_factory=list)
    links_skipped: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def show(path: str | Path) -> str:
    """A path as printable text, also where its name is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def kind_of(path: Path) -> FileKind | None:
    """By suffix, that before .gz and the like; None for a file that a folder's reader passes over."""
    if packing_of(path):
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    if suffix in PROSE:
        return "prose"
    if suffix in CODE or path.name in ("Makefile", "Dockerfile", "CMakeLists.txt"):
        return "code"
    return RECORDS.get(suffix)


def list_files(config: PrepareConfig) -> Listing:
    """All files of all inputs. UserError for an input that is missing, empty, or holds nothing readable."""
    listing = Listing()
    seen: set[tuple[int, int]] = set()  # the same file through two inputs or two links is read once
    for number, root in enumerate(config.input):
        for file in _files_of(root, number, config, listing):
            if file.kind == "collector":
                listing.files.append(file)
                continue
            try:
                identity = file.path.stat()
            except OSError as error:  # gone since it was found, or a part of a dataset that was not copied
                problem = error.strerror or str(error)
                if file.direct:
                    fix = "Check --input, and fetch what is missing."
                    raise UserError(problem, where=show(file.path), fix=fix) from None
                listing.unreadable.append((show(file.path), problem))
                continue
            if (identity.st_dev, identity.st_ino) not in seen:
                seen.add((identity.st_dev, identity.st_ino))
                listing.files.append(file)
    return listing


def _files_of(root: Path, number: int, config: PrepareConfig, listing: Listing) -> list[SourceFile]:
    if str(root).startswith("python:"):
        from engine.data import collectors

        collectors.load(root)  # a name that is wrong is said before anything is read
        return [SourceFile(root, number, str(root).removeprefix("python:"), "collector", direct=True)]
    if str(root).startswith("hf:"):
        return _dataset_files(str(root).removeprefix("hf:"), root, number)
    if not root.exists():
        raise UserError("no such file or folder", where=show(root), fix="Check --input.")
    if not root.is_dir():
        return [SourceFile(root, number, show(root.name), _kind_of_direct(root), direct=True)]
    if saved.is_saved(root):
        return _dataset_files(str(root), root, number)
    names = sorted(_walk(root, config, listing), key=os.fsencode)
    strays = saved.strays(root, names)
    files = [
        SourceFile(root / name, number, show(name), kind, direct=False)
        for name in names
        if (kind := kind_of(root / name)) is not None and name not in strays
    ]
    if not files:
        _refuse_folder(root, names, listing)
    return files


def _dataset_files(name: str, root: Path, number: int) -> list[SourceFile]:
    paths = saved.dataset_files(name)
    if not paths:
        raise UserError("the dataset holds no rows", where=show(root), fix="Check --input.")
    return [SourceFile(path, number, show(path.name), "arrow", direct=True) for path in paths]


def _kind_of_direct(path: Path) -> FileKind:
    if not path.is_file():
        raise UserError("neither a folder nor a regular file", where=show(path), fix="Check --input.")
    inner = path.with_suffix("") if packing_of(path) else path
    if inner.suffix.lower() in NOT_READ:
        suffix = inner.suffix + (path.suffix if inner != path else "")
        raise UserError(f"{suffix} files are not read", where=show(path), fix=f"Convert it to JSONL. {READABLE}")
    return kind_of(path) or "prose"


def _refuse_folder(root: Path, names: list[str], listing: Listing) -> NoReturn:
    skipped = listing.links_skipped
    links = f" ({skipped} symbolic links were not followed: --follow_symlinks)" if skipped else ""
    if not names:
        raise UserError(f"the folder holds no files{links}", where=show(root), fix=READABLE)
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for name in names)
    most = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4))
    raise UserError(
        f"no readable text among {len(names)} files ({most}){links}", where=show(root),
        fix=f"{READABLE} Convert them, or name a file itself.",
    )  # fmt: skip


def _walk(root: Path, config: PrepareConfig, listing: Listing) -> Iterator[str]:
    """Paths below ``root`` of its regular files, in no particular order."""
    patterns = [*ALWAYS_EXCLUDED, *(pattern.rstrip("/") for pattern in config.exclude)]
    ours = staging.places_of(config.output)  # an output below an input must not become input of the next run
    entered: set[tuple[int, int]] = set()
    todo = [""]
    while todo:
        folder = todo.pop()
        try:
            identity = (root / folder).stat()
            if (identity.st_dev, identity.st_ino) in entered:
                continue
            entered.add((identity.st_dev, identity.st_ino))
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name), reverse=True)
        except OSError as error:
            listing.unreadable.append((show(root / folder), error.strerror or str(error)))
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") and not config.include_hidden:
                continue
            if any(fnmatchcase(entry.name, pattern) or fnmatchcase(name, pattern) for pattern in patterns):
                continue
            if entry.is_symlink() and not config.follow_symlinks:
                listing.links_skipped += 1
            elif entry.is_dir():
                if (root / name).resolve() not in ours:
                    todo.append(name)
            elif _is_regular(entry):
                yield name


def _is_regular(entry: os.DirEntry) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)  # a FIFO or device would block the run; a dangling link has no stat
    except OSError:
        return False
