"""``Config``: the whole configuration of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from engine.config import checks
from engine.config.base import Problem, Section, option
from engine.config.model import ModelConfig, divisors, nearest
from engine.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    TrainConfig,
    near_multiple,
)
from engine.errors import UserError


class Config(Section):
    """The configuration of a training run.

    Frozen: change it with ``with_values``. Construction raises ``UserError`` for contradictions and for what the
    engine cannot run yet; ``Config.model_validate(data, context={"allow_not_built": True})`` lets the latter pass.
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
        yield from checks.not_built(self)

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks among ``world_size`` ranks.

        Raises:
            UserError: the layout does not fit the world size, or a batch of the run does not divide over the ranks.
        """
        p = self.parallel
        model_ranks = p.tensor * p.pipeline * p.context
        expert_ranks = (p.expert_tensor or p.tensor) * p.expert * p.pipeline if self.model.moe else 1
        group = math.lcm(model_ranks, expert_ranks)
        if world_size < 1 or world_size % group:
            names = ["tensor", "pipeline", "context", *(["expert", "expert_tensor"] if self.model.moe else [])]
            sizes = " x ".join(f"{name} {getattr(p, name)}" for name in names if (getattr(p, name) or 1) > 1)
            started = "rank does" if world_size == 1 else "ranks do"
            fits = near_multiple(max(world_size, 0), group) if world_size > group else str(group)
            raise UserError(
                f"{world_size} {started} not fit {sizes or 'any layout'}, which takes a multiple of {group}",
                where="parallel",
                fix=f"Start {fits} ranks, or change those sizes",
            )
        ranks = world_size // model_ranks
        for field, size in self.train.unit_batches():
            self._check_batch(field, size, ranks)
        return ranks

    def _check_batch(self, field: str, size: int, ranks: int) -> None:
        micro, p = self.train.micro_batch_size, self.parallel
        if size % (micro * ranks):
            micros = divisors(size // ranks) if size % ranks == 0 else []
            other = f", or train.micro_batch_size {nearest(micro, micros)}" if micros else ""
            raise UserError(
                f"{size} sequences do not divide over {ranks} data-parallel ranks x train.micro_batch_size {micro}",
                where=field,
                fix=f"Use {near_multiple(size, micro * ranks)}{other}",
            )
        steps = size // (micro * ranks)
        if p.virtual_pipeline > 1 and steps % p.pipeline:
            raise UserError(
                f"{size} sequences are {steps} micro-batches on each of {ranks} data-parallel ranks, not a multiple of "
                f"parallel.pipeline ({p.pipeline}) as parallel.virtual_pipeline needs",
                where=field,
                fix=f"Use {near_multiple(size, micro * ranks * p.pipeline)}, or parallel.virtual_pipeline 1",
            )
