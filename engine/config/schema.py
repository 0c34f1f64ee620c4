"""``Config``: the whole configuration of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from engine.config import checks, layouts
from engine.config.base import Problem, Section, option
from engine.config.data import DataConfig
from engine.config.model import ModelConfig
from engine.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    TrainConfig,
)
from engine.config.stages import DpoConfig, ExamplesConfig, LoraConfig

Stage = Literal["pretrain", "midtrain", "sft", "dpo", "lora"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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

    stage: Stage = option("pretrain", "what the run does")
    init_from: str | None = option(
        None, "whose weights a run after pretraining starts from: a checkpoint, a run's folder, a Hugging Face "
        "directory, auto (null: the newest checkpoint of an earlier stage beside output_dir), or none (random ones); "
        "model fields that are not set are its own", min_length=1)
    output_dir: Path = option(Path("runs/default"), "where checkpoints, metrics and this configuration go")
    resume_from_checkpoint: str = option(
        "auto", "auto (the newest in output_dir, if any), none, or a checkpoint's directory", min_length=1
    )
    seed: int = option(1234, "seed of initial weights, dropout and sample order", ge=0, lt=2**63)
    device: Literal["auto", "cuda", "mps", "cpu"] = option(
        "auto", "processor; auto is CUDA where there is a GPU, else the CPU (mps is not supported yet)")
    model: ModelConfig = option(ModelConfig, "the model's shape")
    data: DataConfig = option(DataConfig, "what the model reads")
    examples: ExamplesConfig = option(ExamplesConfig, "what it reads in the stages sft, dpo and lora")
    dpo: DpoConfig = option(DpoConfig, "learning from preferences, in the stage dpo")
    lora: LoraConfig | None = option(None, "adapters beside frozen weights (null: all weights are trained)")
    train: TrainConfig = option(TrainConfig, "steps, batches, optimiser, precision")
    parallel: ParallelConfig = option(ParallelConfig, "how model and batch are split over ranks")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "when to save, and what to keep")
    evaluation: EvaluationConfig = option(EvaluationConfig, "when to measure the held-out loss")
    logging: LoggingConfig = option(LoggingConfig, "where the numbers go")

    def _resolve(self) -> Iterable[tuple[str, Any]]:
        if self.stage == "lora" and self.lora is None:
            yield "lora", LoraConfig()

    def problems(self) -> Iterator[Problem]:
        yield from checks.contradictions(self)

    def awaits_model(self) -> bool:
        """Whether the model's shape will come from where its weights do: see ``init_from``."""
        known = self.model.model_fields_set & {"preset", "num_layers"}
        return self.stage != "pretrain" and not known

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
