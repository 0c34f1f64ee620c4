"""``Config``: the whole configuration of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from engine.config import checks, layouts
from engine.config.base import Problem, Section, option
from engine.config.model import ModelConfig
from engine.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    TrainConfig,
)


class Config(Section):
    """The configuration of a training run.

    Frozen: change it with ``with_values``. Construction raises ``UserError`` for contradictions.
    """

    # The flags that every stage has, beside those of the top level: --output_dir, --resume_from_checkpoint, --seed.
    aliases: ClassVar[dict[str, str]] = {
        "max_steps": "train.max_steps",
        "save_steps": "checkpoint.save_steps",
        "eval_steps": "evaluation.eval_steps",
        "logging_steps": "logging.logging_steps",
        "fp8": "train.fp8",
        "enable-oom-recovery": "train.enable_oom_recovery",
    }

    stage: Literal["pretrain"] = option("pretrain", "what the run does")
    output_dir: Path = option(Path("runs/default"), "where checkpoints, metrics and this configuration go")
    resume_from_checkpoint: str = option(
        "auto", "auto (the newest in output_dir, if any), none, or a checkpoint's directory", min_length=1
    )
    seed: int = option(1234, "seed of initial weights, dropout and sample order", ge=0, lt=2**63)
    device: Literal["auto", "cuda", "mps", "cpu"] = option(
        "auto", "processor; auto is CUDA where there is a GPU, else the CPU (mps is not supported yet)")
    model: ModelConfig = option(ModelConfig, "the model's shape")
    data: DataConfig = option(DataConfig, "what the model reads")
    train: TrainConfig = option(TrainConfig, "steps, batches, optimiser, precision")
    parallel: ParallelConfig = option(ParallelConfig, "how model and batch are split over ranks")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "when to save, and what to keep")
    evaluation: EvaluationConfig = option(EvaluationConfig, "when to measure the held-out loss")
    logging: LoggingConfig = option(LoggingConfig, "where the numbers go")

    def problems(self) -> Iterator[Problem]:
        yield from checks.contradictions(self)

    def smallest_world(self) -> int:
        """Ranks that the layout takes: those that hold one copy of the model; data-parallel ones are its multiples."""
        return layouts.Sizes.of(self.parallel).smallest_world(self.model.moe is not None)

    def data_parallel_size(self, world_size: int, *, training: bool = True) -> int:
        """Data-parallel ranks among ``world_size`` ranks.

        Raises:
            UserError: the layout does not fit the world size, or (``training``) a batch of the run does not divide
                over the ranks.
        """
        return layouts.data_parallel_size(self, world_size, training=training)
