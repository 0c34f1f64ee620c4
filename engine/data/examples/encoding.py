"""From a source's rows to tokens: the one place where this room meets engine/data/chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.config.stages import Source
from engine.data.examples.store import Example, Pair
from engine.data.reading import Quarantine

# Raised when the same rows and settings would give other tokens.
VERSION = 1


class Encoding:
    """How rows become examples (or pairs) under a configuration. ``identity``: all of that, for the key of a store."""

    def __init__(self, cfg: Config, tokenizer_folder: Path, *, pairs: bool):
        from engine.data.chat import encode, templates
        from engine.data.tokenizer import load_tokenizer

        examples = cfg.examples
        self.pairs = pairs
        self.made_of = (cfg, tokenizer_folder)  # for another process to make the same
        self.workers = examples.workers
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.template = templates.load(examples.template, tokenizer_folder, self.tokenizer)
        self.encoder = encode.Encoder(
            self.tokenizer, self.template, cfg.model.seq_length, examples.supervise, examples.too_long,
            system=examples.system, prefix_sharing=examples.prefix_sharing)
        self.identity: dict[str, Any] = {
            "version": VERSION, "kind": "pairs" if pairs else "examples", "tokenizer": self.tokenizer.sha256,
            "template": self.template.sha256, "seq_length": cfg.model.seq_length, "too_long": examples.too_long,
            "system": examples.system}
        self.identity |= {"shared": examples.prefix_sharing} if pairs else {"supervise": examples.supervise}

    def read(self, source: Source, quarantine: Quarantine) -> Iterator[Example | Pair]:
        """Of every row of a source; a row that gives none is noted in the quarantine. Raises ``UserError``.

        The order, and what is noted, are the same for any number of ``examples.workers``.
        """
        from engine.data.examples import parallel

        yield from parallel.encoded(self, source, quarantine)

    def encode(self, row: Any, format: str) -> Example | Pair:
        """Of one row. Raises ``BadRow`` where it gives none."""
        from engine.data.chat import formats

        return self._encoded(formats.parse(row, format))

    def _encoded(self, parsed: Any) -> Example | Pair:
        from engine.data.chat.conversation import BadRow, Preference

        if isinstance(parsed, Preference) != self.pairs:
            wanted, found = ("a preference", "no chosen and rejected answers")
            if not self.pairs:
                wanted, found = "an example", "a preference (chosen and rejected)"
            raise BadRow("other_kind", f"it holds {found}, where {wanted} is needed")
        if self.pairs:
            pair = self.encoder.pair(parsed)
            return Pair(pair.prompt, pair.chosen, pair.rejected)
        example = self.encoder.example(parsed)
        return Example(example.tokens, example.mask)
