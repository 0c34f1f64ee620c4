"""What `mainspring evaluate`, `generate` and `report` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.config.base import Section, option

Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class ModelLayout(Section):
    """How ranks share a model that is not trained; every size 1: each rank holds all of it."""

    tensor: int = option(1, "ranks that share each matrix", "ranks", ge=1, le=4096)
    pipeline: int = option(1, "ranks that share the layers, in stages", "ranks", ge=1, le=4096)
    expert: int = option(1, "ranks that share the experts", "ranks", ge=1, le=4096)
    expert_tensor: int | None = option(
        None, "ranks that share each expert's matrices (null: tensor)", "ranks", ge=1, le=4096
    )


class EvaluationLayout(ModelLayout):
    """How ranks share model and sequences; ranks that are left over share the data."""

    context: int = option(1, "ranks that share each sequence", "ranks", ge=1, le=4096)
    sequence_parallel: bool = option(False, "tensor ranks also share the sequence between matrices")


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
    parallel: EvaluationLayout = option(EvaluationLayout, "how ranks share model and sequences, whatever the layout "
                                        "of training was; what is left of them shares the data")
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
    parallel: ModelLayout = option(ModelLayout, "how ranks share the model, whatever the layout of training was")


class ReportConfig(Section):
    """A run against n-gram models, with a plot of its losses."""

    run: Path = option(..., "output_dir of a finished run")
    prompt: str = option("def main(", "what the sample continues")
    max_new_tokens: int = option(160, "length of the sample", "tokens", ge=1)
    device: Device = option("auto", "processor")
