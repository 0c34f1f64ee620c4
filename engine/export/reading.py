"""A Hugging Face directory into the engine's model, under any layout: each rank reads the slices that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.manager import agree
from engine.config import Config, ModelConfig
from engine.errors import UserError
from engine.export import families, names
from engine.export.families import Family
from engine.export.files import Files
from engine.export.names import EMBED_TOKENS, EMBEDDING, HEAD, LM_HEAD, Entry, Piece
from engine.model.whole import Split, global_names, quantised_names, split_of
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap

_ROWS = 4096  # compared at once


def model_section(directory: Path | str) -> dict:
    """The values of the ``model`` section from config.json.

    Raises ``UserError`` for an architecture or a setting that is not known, by name.
    """
    directory = Path(directory)
    family, config = families.read_config(directory)
    return families.section_of(family, config, directory / "config.json")


def load(directory: Path | str, chunks: list[Any], cfg: Config, groups: Groups) -> None:
    """Fills this rank's weights from safetensors, quantised ones as well. Collective; all ranks raise what one met.

    ``cfg.model`` is the directory's (``model_section``). The chunks must not carry adapters (``lora.detached``).
    Raises ``UserError``: a tensor that is missing, left over or of another shape, a file that is missing or cut off.
    """
    agree(groups, lambda: _load(Path(directory), chunks, cfg.model, groups), f"loading {directory}")


@torch.no_grad()
def _load(directory: Path, chunks: list[Any], m: ModelConfig, groups: Groups) -> None:
    family, _ = families.read_config(directory)
    vocab_size = chunks[0].config.vocab_size
    with Files(directory) as files:
        by_name = {entry.name: entry for entry in fitting(files, family, m, vocab_size)}
        if m.tie_embeddings:
            if groups.is_main and LM_HEAD in files.names():
                _check_tied(files, vocab_size, m.hidden_size)
            by_name[HEAD] = by_name[EMBEDDING]  # the last stage's copy
        for chunk in chunks:
            pg = unwrap(chunk).pg_collection
            for name, parameter in (global_names(chunk) | quantised_names(chunk)).items():
                if name not in by_name:
                    raise UserError(f"has no {name}, which this model has", where=str(directory),
                                    fix="Take the model section from its config.json")
                parameter.copy_(read_part(files, by_name[name], split_of(name, parameter, pg), tuple(parameter.shape)))


def fitting(files: Files, family: Family, m: ModelConfig, vocab_size: int) -> list[Entry]:
    """The map of these files: experts in the form that is there, every tensor checked. Raises ``UserError``."""
    form = None
    if m.moe is not None:
        layer = f"model.layers.{m.moe.num_dense_layers}."
        form = next((form for form in family.experts if layer + names.MARKERS[form] in files.names()),
                    family.experts[0] if family.experts else None)
        if form is None:
            raise UserError(f"is a {family.model_type}, but model.moe is set", where=str(files.directory),
                            fix="Take the model section from its config.json")
    found = names.entries(m, vocab_size, form)
    files.check(names.stored(found), spare={LM_HEAD} if m.tie_embeddings else ())
    return found


def _check_tied(files: Files, rows: int, columns: int) -> None:
    """A head that is stored although it is tied must be the embedding. Raises ``UserError``."""
    where, across = str(files.directory), range(columns)
    for first in range(0, rows, _ROWS):
        last = min(rows, first + _ROWS)
        one, other = (files.rows(Piece(name, rows), first, last, across) for name in (LM_HEAD, EMBED_TOKENS))
        if files.shape(LM_HEAD) != files.shape(EMBED_TOKENS) or not torch.equal(one, other):
            raise UserError(f"{LM_HEAD} differs from {EMBED_TOKENS}, but config.json ties them", where=where,
                            fix="Set tie_word_embeddings to false in config.json if the head is one of its own")


def _ranges(size: int, split: Split) -> list[range]:
    """Where this part lies along the split dimension of ``size`` elements: one range a block."""
    block = size // split.stride
    part = block // split.count
    return [range(b * block + split.index * part, b * block + (split.index + 1) * part) for b in range(split.stride)]


def read_part(files: Files, entry: Entry, split: Split, shape: tuple[int, ...]) -> torch.Tensor:
    """This rank's part, of ``shape``, of a tensor. Rows past the stored ones pad the vocabulary: zeros."""
    whole = split.whole_shape(shape)
    rows, across = [range(whole[0])], [None if len(shape) == 1 else range(whole[1])]
    if split.count > 1 and split.dim == 0:
        rows = _ranges(whole[0], split)
    elif split.count > 1:
        across = _ranges(whole[1], split)
    taken = [torch.cat([_rows(files, entry, wanted, columns) for wanted in rows]) for columns in across]
    part = taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)
    assert tuple(part.shape) == shape, (entry.name, part.shape, shape)
    return part


def _rows(files: Files, entry: Entry, wanted: range, columns: range | None) -> torch.Tensor:
    """Rows ``wanted`` of the unsplit tensor, from the pieces that they lie in."""
    found, offset = [], 0
    for piece in entry.pieces:
        first, last = max(wanted.start, offset), min(wanted.stop, offset + piece.rows)
        if first < last:
            found.append(files.rows(piece, first - offset, last - offset, columns))
        offset += piece.rows
    padding = wanted.stop - max(wanted.start, offset)
    if padding > 0:
        found.append(torch.zeros((padding,) if columns is None else (padding, len(columns)),
                                 dtype=found[0].dtype if found else torch.float32))
    return torch.cat(found)
