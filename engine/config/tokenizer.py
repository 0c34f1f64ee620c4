"""What `mainspring train-tokenizer` can be told. Every field is a flag: ``--vocab_size 50000``, ``--kind unigram``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from engine.config.base import Problem, Section, option
from engine.config.prepare import BYTES


class TrainTokenizerConfig(Section):
    """Text in, one tokenizer out. Contradictions are refused at construction."""

    input: list[Path] = option(
        ..., "folder or file to read, all that `prepare` reads; repeat the flag for several", "path", min_length=1
    )
    output: Path = option(..., "directory to create: what `prepare --tokenizer` takes", "path")
    overwrite: bool = option(False, "replace a tokenizer that an earlier run wrote there")
    seed: int = option(1234, "seed of the choice of documents, where there are more than sample_mb", ge=0)

    exclude: list[str] = option(list, "skip files and folders whose name, or path below the input, matches", "glob")
    include_hidden: bool = option(False, "also read files and folders whose name starts with a dot")
    follow_symlinks: bool = option(False, "also read through symbolic links inside a folder (loops are cut)")
    text_field: str = option("text", "field or column of a record that holds the document", min_length=1)
    max_bad_fraction: float = option(0.01, "unusable records, above which the run fails", "fraction", ge=0, le=1)
    max_line_mb: float = option(256, "a longer record is left out", "MB", gt=0)

    kind: Literal["bpe", "unigram"] = option("bpe", "model to train; both lose nothing, whatever the text")
    form: Literal["huggingface", "sentencepiece"] = option(
        "huggingface", "tokenizer.json (byte-level; `prepare` is twenty times as fast with its BPE), or a .model with "
        "byte fallback"
    )
    vocab_size: int = option(32768, "vocabulary to train, specials and bytes included", "tokens", gt=0)
    special_tokens: int = option(
        32, "end of document 0, padding 1, chat turns 2 and 3, mask 16, ignore 17, roles 18 to 21, the rest reserved",
        "tokens", ge=1,
    )
    eod_token: str = option("<|endoftext|>", "the token that ends a document", min_length=1)
    sample_mb: float = option(64, "text to train on, at most; documents chosen by content hash", "MB", gt=0)

    def problems(self) -> Iterator[Problem]:
        taken = BYTES + self.special_tokens + (self.form == "sentencepiece")
        if self.vocab_size < taken:
            text = f"{self.vocab_size} has no room for {BYTES} bytes and {self.special_tokens} special tokens"
            yield Problem("vocab_size", text, f"Set it to {taken} at least, sensibly to 8000 or more")
