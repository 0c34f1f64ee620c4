"""From ``cfg.examples`` to loaders: each source tokenized once into an entry of the cache, whatever the layout."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config
from engine.config.stages import ExamplesConfig, Source
from engine.data.examples import cache, store
from engine.data.examples.encoding import Encoding
from engine.data.examples.loader import ExampleLoader
from engine.data.examples.pair_rows import PairLoader, UnsharedPairLoader
from engine.data.examples.store import Example, Pair, Store
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A source's examples on disk, and what their manifest says."""

    source: Source
    folder: Path
    manifest: dict[str, Any]

    def split(self, name: str) -> Store:
        return store.open_split(self.folder, self.manifest, name, self.source.path)

    def summary(self) -> str:
        """One line for people."""
        splits = self.manifest["splits"]
        held_out = splits[store.HELD_OUT]["examples"]
        text = (f"{self.source.path}: {splits[store.TRAIN]['examples']:,} examples, "
                f"{splits[store.TRAIN]['tokens']:,} tokens ({splits[store.TRAIN]['supervised_tokens']:,} supervised)")
        text += f", {held_out:,} more held out" if held_out else ""
        if self.refused:
            text += f"; {self.refused:,} rows refused ({self.reasons()}), see {self.folder / store.QUARANTINE}"
        return text

    @property
    def refused(self) -> int:
        """Rows, and whole files, that gave no example."""
        return self.manifest["refused"]["lines"] + self.manifest["refused"]["files"]

    def reasons(self) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in self.manifest["refused"]["reasons"].items())


def tokenizer_folder(cfg: Config, own: Path | None) -> Path:
    """``examples.tokenizer``, or the initial model's ``own``; ``UserError`` where there is neither, or they differ."""
    wanted = cfg.examples.tokenizer
    if wanted is None and own is None:
        raise UserError("random weights have no tokenizer of their own", where="examples.tokenizer",
                        fix="Name the folder of one")
    if wanted is None or own is None:
        found = wanted or own
        assert found is not None
        return found
    if load_tokenizer(wanted).sha256 != load_tokenizer(own).sha256:
        raise UserError(f"is not the tokenizer of the weights that the run starts from ({own})",
                        where=f"examples.tokenizer {wanted}", fix="Leave it out; a chat template is examples.template")
    return wanted


def build(cfg: Config, tokenizer_folder: Path, split: str, *, pairs: bool = False, dp_rank: int, dp_size: int
          ) -> ExampleLoader:
    """The loader of a split ("train" or "validation") of ``cfg.examples``: ``ExampleLoader``, or a ``PairLoader``.

    The first process that asks tokenizes, the others on that disk wait. A validation split that nothing was held out
    for is a loader of no tokens. Raises ``UserError`` for sources that cannot be read, more unusable rows than
    ``examples.max_bad_fraction``, or a training split without examples.
    """
    entries = build_entries(cfg, tokenizer_folder, split, pairs=pairs)
    name = store.HELD_OUT if split == "validation" and not cfg.examples.validation else store.TRAIN
    stores = [entry.split(name) for entry in entries]
    used = [(one, entry.source.weight) for one, entry in zip(stores, entries, strict=True) if len(one)]
    if split == "train":
        for one in stores:
            if not len(one):
                raise UserError("gives no example", where=one.source, fix="Leave it out of examples.train")
    kind = ExampleLoader if not pairs else PairLoader if cfg.examples.prefix_sharing else UnsharedPairLoader
    seed = cfg.seed if cfg.data.shuffle_seed is None else cfg.data.shuffle_seed
    loader = kind([one for one, _ in used], [weight for _, weight in used], seq_length=cfg.model.seq_length, seed=seed,
                  pad_id=entries[0].manifest["pad_id"] if entries else 0, packed=cfg.examples.packing,
                  dp_rank=dp_rank, dp_size=dp_size, num_workers=cfg.data.num_workers)
    loader.report = tuple(entry.summary() for entry in entries) if split == "train" or cfg.examples.validation else ()
    loader.fingerprint = hashlib.sha256(json.dumps(
        [entry.manifest["files"][f"{name}.{kind}"] for entry in entries for kind in ("tokens", "lengths")]
    ).encode()).hexdigest()
    return loader


def build_entries(cfg: Config, tokenizer_folder: Path, split: str, *, pairs: bool = False) -> list[Entry]:
    """The entries of a split's sources, tokenized now where they are not there. Raises ``UserError`` as ``build``."""
    examples = cfg.examples
    if not examples.train:
        raise UserError("no examples are named", where="examples.train", fix="Give a list of sources with their path")
    own = split == "validation" and bool(examples.validation)
    sources = examples.validation if own else examples.train
    held_out = 0.0 if examples.validation else examples.validation_fraction
    encoding = Encoding(cfg, tokenizer_folder, pairs=pairs)
    folder = examples.cache_dir or cfg.output_dir / "examples"
    found = [_entry(source, encoding, folder, held_out) for source in sources]
    for place, entry in enumerate(found):
        _check(entry, examples, f"examples.{'validation' if own else 'train'}[{place}]")
    return found


def _entry(source: Source, encoding: Encoding, folder: Path, held_out: float) -> Entry:
    key = encoding.identity | {"format": source.format, "data": _fingerprint(source), "held_out": held_out}

    def fill(writer: store.Writer) -> dict[str, Any]:
        for item in encoding.read(source, writer.quarantine):
            writer.add(store.HELD_OUT if _is_held_out(item, held_out) else store.TRAIN, item)
        return {"source": source.model_dump(mode="json"), "pad_id": encoding.tokenizer.eod_id}

    place, manifest = cache.entry(folder, key, 3 if encoding.pairs else 1, fill)
    return Entry(source, place, manifest)


def _fingerprint(source: Source) -> str:
    from engine.data.chat import rows

    try:
        return rows.fingerprint(source)
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(error.filename or source.path),
                        fix="Check its permissions") from error


def _is_held_out(item: Example | Pair, fraction: float) -> bool:
    """By content: equal examples, and pairs of equal prompts, are on one side, whatever the seed and their place."""
    if fraction == 0:
        return False
    content = item.tokens if isinstance(item, Example) else item.prompt
    digest = hashlib.blake2b(np.ascontiguousarray(content, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _check(entry: Entry, examples: ExamplesConfig, where: str) -> None:
    """Refuses a source with too many rows that are unusable, or too long for the context. Raises ``UserError``."""
    rows, where = entry.manifest["rows"], f"{where} {entry.source.path}"
    if rows == 0:
        raise UserError("holds no rows", where=where, fix="Name another file")
    long = entry.manifest["refused"]["reasons"].get("too_long", 0)
    quarantine = entry.folder / store.QUARANTINE
    if entry.refused - long > examples.max_bad_fraction * rows:
        first = next(one for one in entry.manifest["refused"]["samples"] if one["reason"] != "too_long")
        place = first["file"] if first["line"] is None else f"{first['file']}:{first['line']}"
        raise UserError(
            f"{entry.refused - long:,} of {rows:,} rows are unusable ({entry.reasons()}), allowed "
            f"{examples.max_bad_fraction:.2%}; the first is {place}: {first['detail']}", where=where,
            fix=f"All are listed in {quarantine}; mend them, or raise examples.max_bad_fraction")
    if long > examples.max_too_long_fraction * rows:
        raise UserError(
            f"{long:,} of {rows:,} rows are longer than model.seq_length, allowed {examples.max_too_long_fraction:.2%}",
            where=where, fix=f"All are listed in {quarantine}; raise model.seq_length or "
            "examples.max_too_long_fraction, or set examples.too_long to truncate")
