"""What `mainspring code-tasks` can be told. Every field is a flag: ``--package json``, ``--max_characters 900``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from engine.config.base import Problem, Section, option

# Each breaks a function in one place and leaves it valid Python: engine/data/code_mutations.py.
Mutation = Literal[
    "comparison", "arithmetic", "boolean", "condition", "constant", "variable", "arguments", "call", "returned",
    "missing", "order", "truncated",
]  # fmt: skip


class CodeTasksConfig(Section):
    """Python source in, examples and preference pairs out. Contradictions are refused at construction."""

    input: list[Path] = option(..., "Python file, or folder of them; repeat the flag for several", "path", min_length=1)
    output: Path = option(..., "directory to create", "path")
    overwrite: bool = option(False, "replace what an earlier run wrote there")
    seed: int = option(1234, "seed of the split and of the corruptions; that of `prepare` splits files alike", ge=0)

    exclude: list[str] = option(
        lambda: ["site-packages", "dist-packages", "test", "tests"],
        "skip files and folders whose name, or path below the input, matches", "glob",
    )  # fmt: skip
    include_hidden: bool = option(False, "also read files and folders whose name starts with a dot")
    follow_symlinks: bool = option(False, "also read through symbolic links inside a folder (loops are cut)")
    max_bad_fraction: float = option(0.05, "files that are no Python, above it the run fails", "fraction", ge=0, le=1)

    package: list[str] = option(
        list, "package or module below an input that is held apart, in lora/: json, email.mime, shelve", "dotted name"
    )
    validation_fraction: float = option(0.02, "files held out, chosen by content hash", "fraction", ge=0, le=0.5)

    min_characters: int = option(60, "shorter functions (without docstring) are dropped", "characters", ge=1)
    max_characters: int = option(1500, "longer instruction and function together are dropped", "characters", ge=1)
    min_docstring_characters: int = option(16, "functions that say less are dropped", "characters", ge=1)
    max_docstring_characters: int = option(
        400, "of a longer docstring the first paragraphs that fit are kept", "characters", ge=1
    )
    mutation: list[Mutation] = option(list, "kinds of corruption; none named: all of them")
    rejected_per_function: int = option(1, "preference pairs made of a function, each corrupted elsewhere", ge=1, le=16)

    def problems(self) -> Iterator[Problem]:
        if self.min_characters > self.max_characters:
            text = f"{self.min_characters} is above max_characters {self.max_characters}, nothing can pass"
            yield Problem("min_characters", text, "Lower it, or raise max_characters")
        if self.min_docstring_characters > self.max_docstring_characters:
            text = f"{self.min_docstring_characters} is above max_docstring_characters {self.max_docstring_characters}"
            yield Problem("min_docstring_characters", text, "Lower it, or raise max_docstring_characters")
        for name in self.package:
            if not all(part.isidentifier() for part in name.split(".")):
                yield Problem("package", f"{name!r} is not a dotted Python name", "Write it as in `import email.mime`")
