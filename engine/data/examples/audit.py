"""The mask audit (engine/data/chat/audit.py) on what a run will really read: the stored examples of its loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.config import Config
from engine.data.examples.encoding import Encoding
from engine.data.examples.loader import ExampleLoader
from engine.data.examples.pair_rows import PairLoader


def audit(cfg: Config, tokenizer_folder: Path, loader: ExampleLoader, *, colour: bool) -> list[str]:
    """Looks at every example of a training loader. -> the samples to show, under a line of counts each source.

    Raises ``UserError``: rows without supervised tokens, an all-ones mask, an end token that is not supervised, …
    """
    from engine.data.chat import audit, encode

    pairs = isinstance(loader, PairLoader)
    encoding = Encoding(cfg, tokenizer_folder, pairs=pairs)
    check = audit.check_pairs if pairs else audit.check
    lines = []
    for store in loader.corpus.stores:
        def items(store=store) -> Iterator:
            for number in range(len(store)):
                item = encode.Pair(*store.pair(number)) if pairs else encode.Example(*store.example(number))
                yield f"{store.source}, example {number + 1:,} of those kept", item

        found = check(items(), encoding.tokenizer, end_ids=encoding.encoder.end_ids, bos_id=encoding.encoder.bos_id,
                      samples=cfg.examples.audit_samples, colour=colour)
        counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found.counts.items())
        lines.append(f"mask audit of {store.source}: {counts}")
        lines += [f"--- sample {number} ---\n{sample}" for number, sample in enumerate(found.samples, 1)]
    return lines
