"""`mainspring merge-data`: several prepared directories of one tokenizer as one.

Documents keep the order of the inputs. With ``--shards many`` no token is copied: each input's files get a further name
(a hard link; a copy within the kernel where the output is on another file system). Nothing is cleaned or deduplicated
again: a document that two inputs hold is there twice, in the same split if they were split with one seed and one
fraction (else the merge says so).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import __version__, disk
from engine.config.prepared_data import MergeDataConfig
from engine.data import manifest as manifests
from engine.data import quarantine, staging
from engine.data.concatenate import concatenate, copy
from engine.data.indexed import shard_name
from engine.data.prepare import Console, as_user_error, silent
from engine.data.prepared import open_split
from engine.data.preparing.local import available_cores
from engine.data.sources import show
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError

Log = Callable[[str], None]
MERGED = "merged_from"
_COUNTS = ("documents", "tokens", "bytes")
_OF_INPUTS = ("cleaning", "dedup", "near_dedup", "settings", MERGED)
_SPLIT_SETTINGS = ("seed", "validation_fraction", "test_fraction")


@dataclass
class _Input:
    """A prepared directory and its place in the result: what its inputs and units are counted from."""

    directory: Path
    manifest: dict[str, Any]
    sha256: str
    first_input: int = 0
    first_unit: int = 0
    new_names: dict[str, tuple[str, int]] = field(default_factory=dict)  # shard -> its new one, first document in it

    def shards(self, split: str) -> list[dict[str, Any]]:
        """What the manifest says of each, with its name."""
        described = self.manifest["splits"].get(split)
        if described is None:
            return []
        return described.get("shards") or [{"name": split} | described]

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Of one of the JSONL files; none where an older version wrote none."""
        path = self.directory / name
        if path.is_file():
            with open(path, encoding="utf-8") as lines:
                yield from map(json.loads, lines)


def merge_data(config: MergeDataConfig, *, log: Log = silent) -> dict[str, Any]:
    """Makes ``config.output`` and returns its manifest; a merge of the same inputs that is there and whole is reused.

    Raises UserError for an input that is no prepared directory, is damaged, or is of another tokenizer than the first.
    """
    with as_user_error(config.output):
        staging.recover(config.output)
        inputs = [_Input(path, manifests.load(path), disk.sha256(path / manifests.MANIFEST)) for path in config.input]
        _check_place(config)
        if (config.output / manifests.MANIFEST).is_file() and not config.overwrite:
            return _reuse(config, inputs, log)
        _check_tokenizers(inputs)
        _check_files(config, inputs)
        _check_splits(inputs, log)
        with staging.staged(config.output) as folder:
            _number(inputs)
            splits = {split: _split(config, inputs, split, folder) for split in _split_names(inputs)}
            shutil.copytree(inputs[0].directory / "tokenizer", folder / "tokenizer")
            manifest = _write(config, inputs, splits, folder)
            staging.publish(folder, config.output)
    return manifest


def _check_place(config: MergeDataConfig) -> None:
    output, fix = config.output, "Choose another --output."
    places = [path.resolve() for path in config.input]
    for path, place in zip(config.input, places, strict=True):
        if places.count(place) > 1:
            raise UserError("is named twice", where=show(path), fix="Name each --input once.")
        if output.resolve() in [place, *place.parents] or place in output.resolve().parents:
            raise UserError(f"is, holds or lies in the input {show(path)}", where=show(output), fix=fix)
    if output.exists() and not output.is_dir():
        raise UserError("is a file", where=show(output), fix=fix)
    if output.is_dir() and any(output.iterdir()) and MERGED not in _manifest_of(output):
        raise UserError("exists and is not merged data", where=show(output), fix=f"{fix[:-1]}, or empty it.")


def _manifest_of(directory: Path) -> dict[str, Any]:
    try:
        return manifests.load(directory)
    except UserError:
        return {}


def _reuse(config: MergeDataConfig, inputs: list[_Input], log: Log) -> dict[str, Any]:
    manifest = manifests.load(config.output)
    before = [item["manifest_sha256"] for item in manifest[MERGED]]
    if before != [each.sha256 for each in inputs] or manifest["settings"].get("shards") != config.shards:
        raise UserError("exists and was merged from something else", where=show(config.output),
                        fix="Replace it with --overwrite, or choose another --output.")  # fmt: skip
    manifests.verify(config.output, manifest)
    log(f"{show(config.output)}: merged before from the same directories, used as it is")
    return manifest


def _check_tokenizers(inputs: list[_Input]) -> None:
    """The manifests must agree, and the first tokenizer, which is kept, must be the one that they mean."""
    first = inputs[0]
    for each in inputs[1:]:
        for name in ("tokenizer_sha256", "vocab_size", "eod_id"):
            if each.manifest.get(name) != first.manifest.get(name):
                raise UserError(
                    f"is of another tokenizer than {show(first.directory)} ({name} {each.manifest.get(name)}, there "
                    f"{first.manifest.get(name)})", where=show(each.directory),
                    fix=f"Prepare it again with --tokenizer {show(first.directory / 'tokenizer')}",
                )  # fmt: skip
    found = load_tokenizer(first.directory / "tokenizer", eod_token=first.manifest.get("eod_token"))
    if found.sha256 != first.manifest.get("tokenizer_sha256"):
        raise UserError("damaged, not the tokenizer of the manifest", where=show(first.directory / "tokenizer"),
                        fix="Prepare the data again with --overwrite.")  # fmt: skip


def _check_files(config: MergeDataConfig, inputs: list[_Input]) -> None:
    """Every index, and with ``verify`` every byte."""
    for each in inputs:
        for split in each.manifest["splits"]:
            open_split(each.directory, split)
    if not config.verify:
        return
    files = [(each.directory / f"{shard['name']}.{end}", shard.get(f"{end}_sha256"))
             for each in inputs for split in each.manifest["splits"] for shard in each.shards(split)
             for end in ("bin", "idx")]  # fmt: skip
    with ThreadPoolExecutor(config.threads or available_cores()) as pool:
        for (path, expected), found in zip(files, pool.map(lambda item: manifests.sha256_file(item[0]), files),
                                           strict=True):  # fmt: skip
            if found != expected:
                raise UserError("damaged, its SHA-256 is not the manifest's", where=show(path),
                                fix="Prepare it again with --overwrite.")  # fmt: skip


def _check_splits(inputs: list[_Input], log: Log) -> None:
    first = inputs[0]
    for each in inputs[1:]:
        for name in _SPLIT_SETTINGS:
            values = [one.manifest["settings"].get(name) for one in (first, each)]
            if values[0] != values[1]:
                log(f"warning: {show(each.directory)} was split with {name} {values[1]}, {show(first.directory)} with "
                    f"{values[0]}: a document of both may be in train and in validation")  # fmt: skip


def _split_names(inputs: list[_Input]) -> list[str]:
    return list(dict.fromkeys(split for each in inputs for split in each.manifest["splits"]))


def _number(inputs: list[_Input]) -> None:
    first_input = first_unit = 0
    for each in inputs:
        each.first_input, each.first_unit = first_input, first_unit
        first_input += len(each.manifest.get("sources", []))
        units = (item.get("unit", 0) for name in (manifests.SOURCES, manifests.SHARDS) for item in each.lines(name))
        first_unit += 1 + max(units, default=-1)


def _split(config: MergeDataConfig, inputs: list[_Input], split: str, folder: Path) -> dict[str, Any]:
    """Puts a split's files into ``folder`` and returns the manifest's words on it."""
    found = [(each, shard) for each in inputs for shard in each.shards(split)]
    full = [(each, shard) for each, shard in found if shard["documents"]] or found[:1]
    total: dict[str, Any] = {name: sum(shard[name] for _, shard in full) for name in _COUNTS}
    if config.shards == "one" or len(full) == 1:
        first = 0
        for each, shard in full:
            each.new_names[shard["name"]] = (split, first)
            first += shard["documents"]
        if len(full) == 1:
            _place(full[0][0].directory / full[0][1]["name"], folder / split)
        else:
            concatenate([each.directory / shard["name"] for each, shard in full], folder / split)
        return total | {f"{end}_sha256": disk.sha256(folder / f"{split}.{end}") for end in ("bin", "idx")}
    total["shards"] = []
    for number, (each, shard) in enumerate(full):
        name = shard_name(split, number, len(full))
        each.new_names[shard["name"]] = (name, 0)
        _place(each.directory / shard["name"], folder / name)
        total["shards"].append(shard | {"name": name})
    return total


def _place(source: Path, target: Path) -> None:
    """A pair under another name, of the same blocks on the disk if that can be."""
    for end in ("bin", "idx"):
        old, new = Path(f"{source}.{end}").resolve(), Path(f"{target}.{end}")
        try:
            os.link(old, new)
        except OSError:  # another file system, or one without links
            with open(old, "rb") as reading, open(new, "wb", buffering=0) as writing:
                copy(reading, writing, old.stat().st_size)


def _write(config: MergeDataConfig, inputs: list[_Input], splits: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The files beside the shards. Returns the manifest."""
    with open(folder / manifests.SOURCES, "w", encoding="utf-8") as out:
        for each in inputs:
            for item in each.lines(manifests.SOURCES):
                moved = {"input": item["input"] + each.first_input}
                moved |= {"unit": item["unit"] + each.first_unit} if "unit" in item else {}
                out.write(json.dumps(item | moved) + "\n")
    hashes = {shard["name"]: shard["bin_sha256"] for name, split in splits.items()
              for shard in split.get("shards", [{"name": name} | split])}  # fmt: skip
    with open(folder / manifests.SHARDS, "w", encoding="utf-8") as out:
        for item in _shard_lines(inputs):
            out.write(json.dumps(item | {"shard_sha256": hashes[item["shard"]]}) + "\n")
    with open(folder / manifests.QUARANTINE, "wb") as out:
        for each in inputs:
            if (each.directory / manifests.QUARANTINE).is_file():
                with open(each.directory / manifests.QUARANTINE, "rb") as lines:
                    shutil.copyfileobj(lines, out)
    manifest = _manifest(config, inputs, splits) | {
        "sources_sha256": disk.sha256(folder / manifests.SOURCES),
        "shards_sha256": disk.sha256(folder / manifests.SHARDS),
    }
    (folder / manifests.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _shard_lines(inputs: list[_Input]) -> Iterator[dict[str, Any]]:
    """Split by split, as `prepare` writes them."""
    for split in _split_names(inputs):
        for each in inputs:
            names = {shard["name"] for shard in each.shards(split)}
            for item in each.lines(manifests.SHARDS):
                if item["shard"] in names and item["shard"] in each.new_names:
                    name, first = each.new_names[item["shard"]]
                    yield item | {"shard": name, "unit": item["unit"] + each.first_unit,
                                  "first_document": item["first_document"] + first}  # fmt: skip


def _manifest(config: MergeDataConfig, inputs: list[_Input], splits: dict[str, Any]) -> dict[str, Any]:
    all_of = [each.manifest for each in inputs]
    first = all_of[0]
    kept = ("vocab_size", "eod_id", "eod_token", "tokenizer_sha256", "tokenizer")
    names = list(dict.fromkeys(name for one in all_of for name in one.get("documents", {})))
    return {
        "version": manifests.VERSION,
        "written_by": {"mainspring": __version__},
        **{name: first[name] for name in kept if name in first},
        "splits": splits,
        "documents": {name: sum(one.get("documents", {}).get(name, 0) for one in all_of) for name in names},
        "quarantine": quarantine.merged([one["quarantine"] for one in all_of if "quarantine" in one]),
        "sources": [source for one in all_of for source in one.get("sources", [])],
        MERGED: [
            {"path": show(each.directory.name), "manifest_sha256": each.sha256}
            | {name: each.manifest[name] for name in _OF_INPUTS if name in each.manifest}
            for each in inputs
        ],
        "settings": {"shards": config.shards} | {
            name: first["settings"][name] for name in _SPLIT_SETTINGS
            if name in first["settings"] and all(one["settings"].get(name) == first["settings"][name] for one in all_of)
        },
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config = parse(MergeDataConfig, argv, prog="mainspring merge-data")
    manifest = merge_data(config, log=Console().log)
    for split, numbers in manifest["splits"].items():
        shards = len(numbers.get("shards", [0]))
        print(f"{split}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens in {shards:,} "
              f"shard{'s' * (shards > 1)}")  # fmt: skip
    return 0
