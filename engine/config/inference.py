"""What `mainspring evaluate`, `generate` and `report` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.config.base import Section, option

Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class EvaluateConfig(Section):
    """Loss, perplexity and token accuracy of a checkpoint on a prepared split."""

    checkpoint: Path = option(..., "checkpoint (iter_NNNNNNN), or a run's output_dir: its newest")
    data: Path | None = option(None, "prepared directory (null: the one the model was trained on)")
    split: Literal["validation", "train"] = option("validation", "which part of it")
    batch_size: int = option(8, "sequences at once", "sequences", ge=1)
    max_sequences: int | None = option(None, "read only the first so many (null: all)", "sequences", ge=1)
    seq_length: int | None = option(None, "context length (null: the model's)", "tokens", ge=2)
    device: Device = option("auto", "processor")
    precision: Precision = option("auto", "arithmetic (auto: as the model was trained)")
    output: Path | None = option(None, "also write the result as JSON here")


class GenerateConfig(Section):
    """Text from a checkpoint."""

    checkpoint: Path = option(..., "checkpoint (iter_NNNNNNN), or a run's output_dir: its newest")
    prompt: str | None = option(None, "text to continue (null: read from standard input)")
    max_new_tokens: int = option(128, "tokens to add at most", "tokens", ge=1)
    temperature: float = option(0.8, "0 is greedy; higher is wilder", "1", ge=0, le=100)
    top_k: int = option(0, "choose among the k likeliest (0: all)", "tokens", ge=0)
    top_p: float = option(
        0.95, "choose among the likeliest that together reach this probability (1: all)", "0 to 1", gt=0, le=1
    )
    num_samples: int = option(1, "continuations of the prompt", "samples", ge=1, le=1024)
    seed: int = option(1234, "fixes the draw", ge=0, lt=2**63)
    device: Device = option("auto", "processor")
    precision: Precision = option("auto", "arithmetic (auto: as the model was trained)")


class ReportConfig(Section):
    """A run against n-gram models, with a plot of its losses."""

    run: Path = option(..., "output_dir of a finished run")
    prompt: str = option("def main(", "what the sample continues")
    max_new_tokens: int = option(160, "length of the sample", "tokens", ge=1)
    device: Device = option("auto", "processor")
