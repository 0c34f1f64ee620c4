"""What `mainspring export-data` and `mainspring merge-data` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.config.base import Section, option


class ExportDataConfig(Section):
    """A prepared directory in, files for other programs out."""

    data: Path = option(..., "directory written by `mainspring prepare` or `mainspring merge-data`", "path")
    output: Path = option(..., "directory to create", "path")
    overwrite: bool = option(False, "replace an earlier export")
    format: Literal["arrow"] = option("arrow", "arrow: what `datasets.load_from_disk` reads, a folder for each split")
    text: bool = option(False, "a column with each document's text beside its tokens")
    file_mb: float = option(500, "size at which a file is ended and the next one begun", "MB", gt=0)


class MergeDataConfig(Section):
    """Prepared directories of one tokenizer in, one prepared directory out."""

    input: list[Path] = option(
        ..., "prepared directory; repeat the flag for several, documents keep this order", "path", min_length=1
    )
    output: Path = option(..., "directory to create", "path")
    overwrite: bool = option(False, "replace an earlier merge")
    shards: Literal["many", "one"] = option(
        "many", "many: the inputs' files under new names, no token is copied; one: a single pair of each split"
    )
    verify: bool = option(True, "hash the inputs' tokens first; false: check only their indexes and sizes")
    threads: int = option(0, "files that are hashed at once; 0: the available cores", "threads", ge=0)
