"""What is run and compared: configurations made fit for comparison, jobs for ranks, and cases of two jobs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from engine.config import Config
from engine.errors import UserError
from engine.verification.shrink import shrunk

STEPS = 3
LEAST_EPS = 1e-5
WITHOUT_TOKENIZER = 4096  # words of the model where the configuration leaves them to the data's tokenizer

ONE_RANK: dict[str, Any] = {
    "parallel.tensor": 1, "parallel.pipeline": 1, "parallel.virtual_pipeline": 1, "parallel.context": 1,
    "parallel.expert": 1, "parallel.expert_tensor": None, "parallel.sequence_parallel": False,
    "parallel.distributed_optimizer": False, "parallel.overlap_grad_reduce": None,
}


def fit(cfg: Config, *, precision: str = "fp32", shrink: bool = False, ranks: int | None = None) -> tuple[Config, int]:
    """The configuration as it is compared, and the number of ranks of its layout.

    What would differ between layouts for a reason (dropout), hides errors or makes noise of them is set: see ``NOTES``.
    Raises ``UserError`` for a layout that does not fit the ranks or the batch.
    """
    ranks = ranks or fewest_ranks(cfg)
    cfg = cfg.with_values({"train.fp8": False})  # which tiny models may be too narrow for
    if cfg.lora is not None:  # frozen weights have no gradients to compare
        cfg = cfg.with_values({"stage": "pretrain", "init_from": None, "lora": None})
    if shrink:
        cfg = shrunk(cfg, ranks)
    cfg = cfg.with_values({
        "device": "cpu", "data": {}, "output_dir": "verify-layout",
        "model.dropout": 0.0, "model.backend": "reference" if cfg.model.backend == "reference" else "engine",
        "train.precision": precision, "train.loss_scale": None,
        "train.schedule": "constant", "train.warmup_steps": 0, "train.decay_steps": None, "train.min_lr": 0.0,
        "train.max_steps": STEPS, "train.eps": max(cfg.train.eps, LEAST_EPS),
    })
    cfg.data_parallel_size(ranks)
    return cfg, ranks


def notes(cfg: Config, wanted: Config) -> list[str]:
    """What ``fit`` changed (``wanted`` -> ``cfg``) that a reader must know to repeat the figures, a line each."""
    lines = [f"synthetic tokens of seed {cfg.seed} with uneven loss masks; learning rate {cfg.train.lr:g} throughout"]
    if cfg.train.eps != wanted.train.eps:
        lines.append(f"train.eps {cfg.train.eps:g} for {wanted.train.eps:g} on both sides: Adam divides a gradient "
                     "that is nothing but rounding by its own size")
    if wanted.model.dropout:
        lines.append(f"model.dropout 0 for {wanted.model.dropout:g}: ranks draw other patterns than one rank does")
    if cfg.model.backend != wanted.model.backend:
        lines.append(f"model.backend {cfg.model.backend} for {wanted.model.backend}, which needs a GPU")
    if wanted.lora is not None:
        lines.append("lora left out: the whole model is trained, without adapters")
    if wanted.train.fp8:
        lines.append("train.fp8 off: numbers of 8 bits would hide what a layout does")
    if wanted.model.vocab_size is None and cfg.model.vocab_size is None:
        lines.append(f"{WITHOUT_TOKENIZER} words: model.vocab_size is null, and no tokenizer is read")
    return lines


def fewest_ranks(cfg: Config) -> int:
    """As few ranks as use all of the layout: with two data-parallel ones where it is nothing without them."""
    p = cfg.parallel
    model_ranks = p.tensor * p.pipeline * p.context
    expert_ranks = (p.expert_tensor or p.tensor) * p.expert * p.pipeline if cfg.model.moe else 1
    group = math.lcm(model_ranks, expert_ranks)
    alone = group == model_ranks  # a single data-parallel rank
    return 2 * group if group == 1 or (alone and p.distributed_optimizer) else group


@dataclass(frozen=True)
class Job:
    """``cfg`` trained for ``STEPS`` steps by ``ranks`` processes.

    ``plant``: "file.py:function" of a context manager that every rank enters around the job: how tests plant faults.
    ``packed``: rows hold several documents each, which attention does not cross.
    """

    cfg: Config
    ranks: int
    plant: str | None = None
    packed: bool = False

    def to_json(self) -> str:
        settings = self.cfg.model_dump(mode="json", exclude_unset=True)
        job = {"config": settings, "ranks": self.ranks, "plant": self.plant, "packed": self.packed}
        return json.dumps(job, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        saved = json.loads(text)
        return cls(Config(**saved.pop("config")), **saved)


@dataclass(frozen=True)
class Case:
    """A layout (``found``) and what it must equal (``expected``: one rank, unless said otherwise)."""

    name: str
    found: Job
    expected: Job
    tolerance: float
    loss_tolerance: float


def case(name: str, cfg: Config, ranks: int, *, tolerance: float, loss_tolerance: float | None = None,
         reference: dict[str, Any] | None = None, plant: str | None = None, packed: bool = False) -> Case:
    """A case from what ``fit`` returned. ``reference``: fields in which one rank differs besides the layout."""
    try:
        alone = cfg.with_values(ONE_RANK | (reference or {}))
    except UserError as error:
        raise UserError(f"one rank cannot run this configuration: {error}", where="verify-layout") from None
    return Case(name, Job(cfg, ranks, plant, packed), Job(alone, 1, packed=packed), tolerance,
                tolerance if loss_tolerance is None else loss_tolerance)


def vocabulary(cfg: Config) -> int:
    """Words of the model, without padding."""
    return cfg.model.vocab_size or WITHOUT_TOKENIZER
