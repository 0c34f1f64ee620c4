"""`mainspring export-data`: a prepared directory as an Arrow dataset, for programs that do not read `.bin/.idx`.

`OUTPUT/SPLIT/data-00000-of-00003.arrow` … are Arrow streams with a column ``tokens`` (a list of uint16, of int32 from
65,500 ids on, the end token included) and, with ``--text``, a column ``text``. Beside them lies what
`datasets.load_from_disk(OUTPUT)` wants to find, and the tokenizer. Memory holds one batch; tokens go from the mapped
file to the new one without another copy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import __version__, disk
from engine.config.prepared_data import ExportDataConfig
from engine.data import manifest as manifests
from engine.data import staging
from engine.data.indexed import Pair
from engine.data.prepare import Console, as_user_error, silent
from engine.data.prepared import open_split
from engine.data.sources import show
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError

if TYPE_CHECKING:
    import pyarrow

# Of ours beside dataset_dict.json: what was exported, and how.
EXPORT = "export.json"
_BATCH_TOKENS, _BATCH_DOCUMENTS = 1 << 20, 10_000


def export_data(config: ExportDataConfig, *, log: Callable[[str], None] = silent) -> dict[str, Any]:
    """Makes ``config.output`` and returns what its export.json says: documents, tokens and files of each split.

    Raises UserError for data that is missing or damaged, an output that is something else, or a missing pyarrow, with
    nothing half-written.
    """
    arrow = _pyarrow()
    with as_user_error(config.output):
        manifest = manifests.load(config.data)
        _check_place(config)
        tokenizer = load_tokenizer(config.data / "tokenizer")
        with staging.staged(config.output) as folder:
            splits = {}
            for split in manifest["splits"]:
                splits[split] = _Split(config, arrow, tokenizer, folder / split).write(split)
                log(f"{split}: {splits[split]['documents']:,} documents in {splits[split]['files']:,} files")
            done = {
                "mainspring": __version__, "format": config.format, "text": config.text,
                "manifest_sha256": disk.sha256(config.data / manifests.MANIFEST),
                "tokenizer_sha256": manifest["tokenizer_sha256"], "eod_id": manifest["eod_id"], "splits": splits,
            }  # fmt: skip
            _write_json(folder / "dataset_dict.json", {"splits": list(splits)})
            _write_json(folder / EXPORT, done)
            shutil.copytree(config.data / "tokenizer", folder / "tokenizer")
            staging.publish(folder, config.output)
    return done


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError("an export to Arrow needs pyarrow", where="format", fix="pip install pyarrow") from None
    return pyarrow


def _check_place(config: ExportDataConfig) -> None:
    output = config.output
    if config.data.resolve() in [output.resolve(), *output.resolve().parents]:
        raise UserError("lies in the data itself", where=show(output), fix="Choose another --output.")
    if output.exists() and not output.is_dir():
        raise UserError("is a file", where=show(output), fix="Choose another --output.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / EXPORT).is_file():
        raise UserError("exists and is not an export", where=show(output), fix="Choose another --output, or empty it.")
    if not config.overwrite:
        raise UserError("exists", where=show(output), fix="Replace it with --overwrite, or choose another --output.")


class _Split:
    """Writes one split into ``folder``."""

    def __init__(self, config: ExportDataConfig, arrow: Any, tokenizer: Tokenizer, folder: Path):
        self.config, self.arrow, self.tokenizer, self.folder = config, arrow, tokenizer, folder
        self.files: list[Path] = []

    def write(self, split: str) -> dict[str, Any]:
        self.folder.mkdir()
        dataset = open_split(self.config.data, split).dataset
        columns = [("tokens", self.arrow.list_(self.arrow.from_numpy_dtype(dataset.dtype)))]
        columns += [("text", self.arrow.string())] if self.config.text else []
        schema = self.arrow.schema(columns)
        batches = (batch for pair in dataset.pairs for batch in self._batches(pair, schema))
        self._write_files(batches, schema)
        names = [f"data-{number:05}-of-{len(self.files):05}.arrow" for number in range(len(self.files))]
        for path, name in zip(self.files, names, strict=True):
            path.rename(self.folder / name)
        content = hashlib.sha256(f"{dataset.fingerprint} {schema}".encode()).hexdigest()
        self._describe(names, fingerprint=content[:16], split=split)
        return {"documents": len(dataset), "tokens": dataset.num_tokens, "files": len(names)}

    def _batches(self, pair: Pair, schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
        """The pair's documents, in order, about a million tokens at a time."""
        first = 0
        while first < len(pair.sizes):
            ends_n = np.cumsum(pair.sizes[first : first + _BATCH_DOCUMENTS], dtype=np.int64)
            count = max(1, int(np.searchsorted(ends_n, _BATCH_TOKENS, side="right")))
            ends_n = ends_n[:count]
            # Documents lie one behind another: opening the index has checked it.
            ids = np.empty(0, pair.dtype)
            if ends_n[-1]:
                ids = np.frombuffer(memoryview(pair.bin), pair.dtype, int(ends_n[-1]), int(pair.pointers[first]))
            offsets = np.concatenate([[0], ends_n]).astype(np.int32)
            lists = self.arrow.ListArray.from_arrays(self.arrow.array(offsets), self.arrow.array(ids))
            columns = [lists.cast(schema.field("tokens").type)]
            if self.config.text:
                documents = np.split(ids, ends_n[:-1])
                columns.append(self.arrow.array([self._text(one) for one in documents], self.arrow.string()))
            yield self.arrow.RecordBatch.from_arrays(columns, schema=schema)
            first += count

    def _text(self, ids: np.ndarray) -> str:
        end = len(ids) - 1 if len(ids) and ids[-1] == self.tokenizer.eod_id else len(ids)
        return self.tokenizer.decode(ids[:end].tolist())

    def _write_files(self, batches: Iterator[pyarrow.RecordBatch], schema: pyarrow.Schema) -> None:
        """One file after the other, each ended by the batch that fills it; a split without documents is one file."""
        batch = next(batches, None)
        while batch is not None or not self.files:
            path = self.folder / f"{len(self.files)}.part"
            self.files.append(path)
            with self.arrow.OSFile(str(path), "wb") as file, self.arrow.ipc.new_stream(file, schema) as writer:
                while batch is not None and file.tell() < self.config.file_mb * 1e6:
                    writer.write_batch(batch)
                    batch = next(batches, None)

    def _describe(self, names: list[str], *, fingerprint: str, split: str) -> None:
        """The two files that `datasets` wants beside the data. It takes the columns' types from the data itself."""
        state = {
            "_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint,
            "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
            "_split": split,
        }  # fmt: skip
        _write_json(self.folder / "state.json", state)
        info: dict[str, Any] = dict.fromkeys(("citation", "description", "homepage", "license"), "")
        _write_json(self.folder / "dataset_info.json", info)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config = parse(ExportDataConfig, argv, prog="mainspring export-data")
    done = export_data(config, log=Console().log)
    tokens = sum(split["tokens"] for split in done["splits"].values())
    print(f"{show(config.output)}: {tokens:,} tokens, for datasets.load_from_disk")
    return 0
