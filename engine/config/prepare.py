"""What `mainspring prepare` can be told. Every field is a flag: ``--vocab_size 8192``, ``--input a --input b``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from engine.config.base import Problem, Section, option
from engine.config.cleaning import CleaningConfig, DecontaminationConfig, PersonalDataConfig
from engine.config.cluster import ClusterConfig
from engine.config.near_dedup import NearDedupConfig

# The trained vocabulary before the first merge: all 256 bytes.
BYTES = 256


class PrepareConfig(Section):
    """Raw files in, one prepared directory out. Contradictions are refused at construction."""

    aliases: ClassVar[dict[str, str]] = {"decontaminate": "decontaminate.sets"}

    input: list[Path] = option(
        ..., "folder or file to read, hf:NAME[[:CONFIG]:SPLIT] or python:MODULE:CLASS; repeat the flag for several",
        "path", min_length=1,
    )
    output: Path = option(..., "directory to create", "path")
    overwrite: bool = option(False, "replace an existing prepared directory")
    seed: int = option(1234, "seed of the train/validation/test split", ge=0)

    workers: int = option(0, "processes; 0 takes the available cores, or one where the input is small", ge=0)
    executor: Literal["local", "datatrove", "slurm", "ray"] = option(
        "local", "what does the work: processes here, datatrove's local executor, jobs on Slurm, tasks on Ray"
    )
    cluster: ClusterConfig = option(ClusterConfig, "what the executors beyond local reserve")
    unit_mb: float = option(64, "input that is one piece of work; a killed run loses no more a worker", "MB", gt=0)
    shards: Literal["auto", "one", "many"] = option(
        "auto", "files a split is written as: one pair, one of each unit (nothing is copied), or of shard_gb each"
    )
    shard_gb: float = option(16, "size of a shard where shards is auto", "GB", gt=0)

    exclude: list[str] = option(list, "skip files and folders whose name, or path below the input, matches", "glob")
    include_hidden: bool = option(False, "also read files and folders whose name starts with a dot")
    follow_symlinks: bool = option(False, "also read through symbolic links inside a folder (loops are cut)")
    text_field: str = option(
        "text", "field or column of a record that holds the document; meta.body for one inside another", min_length=1
    )
    jsonl_kind: Literal["prose", "code"] = option(
        "prose", "which cleaning rules the documents of records (JSON, tables, collectors) get"
    )
    max_bad_fraction: float = option(0.01, "unusable records, above which the run fails", "fraction", ge=0, le=1)
    max_line_mb: float = option(
        256, "a longer line or element of JSON goes to quarantine without being held", "MB", gt=0
    )

    min_characters: int = option(16, "shorter documents are dropped", "characters", ge=0)
    max_characters: int = option(10_000_000, "longer documents are dropped", "characters", ge=1)
    skip_rule: list[str] = option(list, "quality rule to leave out (manifest.json lists them)", "rule")

    cleaning: CleaningConfig = option(CleaningConfig, "what is repaired, and which documents go beyond the rules")
    personal_data: PersonalDataConfig = option(PersonalDataConfig, "personal data to mask")
    decontaminate: DecontaminationConfig = option(DecontaminationConfig, "evaluation sets to keep out")
    near_dedup: NearDedupConfig | None = option(None, "drop what is nearly another; unset, only exact copies")

    validation_fraction: float = option(0.02, "documents held out, chosen by content hash", "fraction", ge=0, le=0.5)
    test_fraction: float = option(0, "documents held out a second time, never evaluated on in training", "fraction",
                                  ge=0, le=0.5)

    tokenizer: Path | None = option(
        None, "use this tokenizer.json, Hugging Face directory or SentencePiece .model, train none", "path"
    )
    tokenizer_kind: Literal["bpe", "unigram"] = option("bpe", "model to train; both give any text back exactly")
    tokenizer_form: Literal["huggingface", "sentencepiece"] = option(
        "huggingface", "file to train: tokenizer.json, byte-level and fast, or SentencePiece's .model, slower"
    )
    vocab_size: int | None = option(None, "vocabulary to train, specials included; 32768 if unset", "tokens", gt=0)
    special_tokens: int = option(
        16, "of a trained vocabulary: end of document, padding, chat turns, the rest reserved", "tokens", ge=4
    )
    eod_token: str | None = option(None, "end-of-document token; unset: the tokenizer's own, <|endoftext|> if trained")
    tokenizer_sample_mb: float = option(64, "text the tokenizer is trained on, at most", "MB", gt=0)

    def problems(self) -> Iterator[Problem]:
        if self.min_characters > self.max_characters:
            text = f"{self.min_characters} is above max_characters {self.max_characters}, nothing can pass"
            yield Problem("min_characters", text, "Lower it, or raise max_characters")
        if self.validation_fraction + self.test_fraction >= 1:
            text = f"{self.test_fraction} and validation_fraction {self.validation_fraction} leave nothing to train on"
            yield Problem("test_fraction", text, "Lower one of them")
        if self.tokenizer is not None and self.vocab_size is not None:
            text = "the vocabulary of an existing tokenizer is what it is"
            yield Problem("vocab_size", text, "Leave out either vocab_size or tokenizer")
        smallest = BYTES + self.special_tokens
        if self.tokenizer is None and self.trained_vocab_size < smallest:
            text = f"{self.trained_vocab_size} has no room for {BYTES} bytes and {self.special_tokens} special tokens"
            yield Problem("vocab_size", text, f"Set it to {smallest} at least, sensibly to 4096 or more")

    @property
    def trained_vocab_size(self) -> int:
        """Size of the vocabulary to train, in tokens."""
        return 32768 if self.vocab_size is None else self.vocab_size
