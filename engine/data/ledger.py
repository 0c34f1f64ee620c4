"""The ledger of a run: what each source gave up to a position. Computed from the position, so that a resumed run's
is that of one that never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "data_ledger.json"  # in the run's folder
METRIC_SOURCES = 32  # of more sources the metrics would bury the others; the file has all


@dataclass(frozen=True)
class Given:
    """What a source gave. ``blocks``: whole sequences of model.seq_length. ``tokens``: positions of the stream, which
    of rows of examples are also their padding. ``epochs``: passes over the source. ``documents``: as many as these
    passes hold, so a share of a pass counts as that share of the documents."""

    source: str
    blocks: int
    tokens: int
    epochs: float
    documents: float


def as_json(given: Sequence[Given], *, step: int, tokens: int) -> dict[str, Any]:
    """The content of ``data_ledger.json``; shares are of what all sources gave."""
    total, documents = _totals(given)
    return {"step": step, "tokens": tokens, "sources": [
        {"source": one.source, "blocks": one.blocks, "tokens": one.tokens, "share": one.tokens / total,
         "epochs": one.epochs, "documents": one.documents, "share_of_documents": one.documents / documents}
        for one in given]}


def write(path: Path, given: Sequence[Given], *, step: int, tokens: int) -> None:
    """Replaces the file at once. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(as_json(given, step=step, tokens=tokens), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def line(given: Sequence[Given]) -> str:
    """The same for people, the largest first."""
    total, _ = _totals(given)
    ranked = sorted(zip(_names(given), given, strict=True), key=lambda pair: -pair[1].tokens)
    parts = [f"{name} {one.tokens:,} tokens ({one.tokens / total:.1%}, {one.epochs:.2f} epochs)"
             for name, one in ranked[:METRIC_SOURCES]]
    rest = len(ranked) - len(parts)
    return f"data: {'; '.join(parts)}{f'; and {rest} more sources' if rest else ''}"


def metrics(given: Sequence[Given]) -> dict[str, float]:
    """Of each source of a blend: data/NAME/tokens and data/NAME/epochs; of a single one: data/epochs."""
    if len(given) == 1:
        return {"data/epochs": given[0].epochs}
    return {f"data/{name}/{field}": getattr(one, field)
            for name, one in list(zip(_names(given), given, strict=True))[:METRIC_SOURCES]
            for field in ("tokens", "epochs")}


def _totals(given: Sequence[Given]) -> tuple[int, float]:
    return sum(one.tokens for one in given) or 1, sum(one.documents for one in given) or 1.0


def _names(given: Sequence[Given]) -> list[str]:
    """The last part of each path; where two would be the same, the whole of it."""
    short = [os.path.basename(os.path.normpath(one.source)) for one in given]
    return [name if short.count(name) == 1 and name else one.source for name, one in zip(short, given, strict=True)]
