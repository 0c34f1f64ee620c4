"""The sections of training, layout, checkpoints, evaluation and logging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from engine.config.adamw import AdamWConfig
from engine.config.base import Problem, Section, option
from engine.config.data import STEPS
from engine.config.fp8 import Fp8Config


class BatchSizeSchedule(Section):
    """A global batch that grows to train.global_batch_size."""

    kind: Literal["doubling", "ramp"] = option("doubling", "double the batch, or add increment, every every_steps")
    start: int = option(..., "global batch at step 0", "sequences", ge=1, le=10**8)
    every_steps: int = option(..., "steps between two sizes", "steps", ge=1, le=STEPS)
    increment: int | None = option(None, "what a ramp adds each time", "sequences", ge=1, le=10**8)

    def problems(self) -> Iterator[Problem]:
        if self.kind == "ramp" and self.increment is None:
            yield Problem("increment", "a ramp needs an increment", "Set it, or use kind doubling")
        if self.kind == "doubling" and self.increment is not None:
            yield Problem("increment", "doubling has no increment", "Remove it, or use kind ramp")


class SeqLengthStage(Section):
    """One stage of a sequence-length curriculum."""

    step: int = option(..., "step from which this length holds", "steps", ge=0, le=STEPS)
    seq_length: int = option(..., "sequence length", "tokens", ge=2, le=2**31)


class MuonConfig(Section):
    """Muon's own settings. Its updates are as large as AdamW's, so that train.lr and weight_decay serve both."""

    momentum: float = option(0.95, "decay of the mean gradient", "0 to 1", ge=0, lt=1)
    nesterov: bool = option(True, "look one step ahead of the mean gradient")
    ns_steps: int = option(5, "Newton-Schulz steps towards an orthogonal update", "steps", ge=1, le=99)
    ns_coefficients: list[float] = option(
        lambda: [3.4445, -4.7750, 2.0315],
        "a, b, c of a Newton-Schulz step, (a + b XX' + c (XX')^2) X",
        "1",
    )
    ns_precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "what Newton-Schulz computes in; auto is fp32 where parameters are fp32, else bf16"
    )

    def problems(self) -> Iterator[Problem]:
        if len(self.ns_coefficients) != 3:
            yield Problem("ns_coefficients", f"has {len(self.ns_coefficients)} numbers, a Newton-Schulz step takes 3",
                          "Use [3.4445, -4.775, 2.0315]")


class TrainConfig(Section):
    """Steps, batches, optimiser, precision."""

    max_steps: int = option(1000, "optimiser steps in the whole run", "steps", ge=1, le=STEPS)
    global_batch_size: int = option(32, "sequences in an optimiser step, over all ranks", "sequences", ge=1, le=10**8)
    micro_batch_size: int = option(
        1, "sequences that a rank takes through the model at once", "sequences", ge=1, le=10**8
    )
    batch_size_schedule: BatchSizeSchedule | None = option(
        None, "a batch that grows (null: global_batch_size from step 0)"
    )
    seq_length_schedule: list[SeqLengthStage] = option(
        list, "sequence lengths by step (empty: model.seq_length throughout)"
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "optimiser; muon orthogonalises the updates of hidden matrices and leaves the rest to AdamW"
    )
    adamw: AdamWConfig = option(AdamWConfig, "what AdamW keeps of each parameter")
    muon: MuonConfig = option(MuonConfig, "what only Muon has; its learning rate and weight decay are AdamW's")
    lr: float = option(3e-4, "peak learning rate", "1/step", gt=0, le=1000)
    min_lr: float = option(0.0, "learning rate at the end of the decay", "1/step", ge=0)
    schedule: Literal["linear", "cosine", "wsd", "constant"] = option(
        "cosine", "learning rate after warmup; wsd is stable, then decays"
    )
    warmup_steps: int = option(0, "steps of linear warmup from 0 to lr", "steps", ge=0, le=STEPS)
    decay_steps: int | None = option(
        None,
        "length of the decay (null: linear and cosine all after warmup, wsd the last tenth of the run)",
        "steps",
        ge=1,
        le=STEPS,
    )
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", "1/step, times lr", ge=0, le=1000)
    beta1: float = option(0.9, "AdamW's decay of the mean gradient", "0 to 1", ge=0, lt=1)
    beta2: float = option(0.95, "AdamW's decay of the mean square", "0 to 1", ge=0, lt=1)
    eps: float = option(1e-8, "AdamW's denominator floor", "1", gt=0, le=1)
    clip_grad: float = option(1.0, "largest gradient norm (0: no clipping)", "L2 norm", ge=0)
    label_smoothing: float = option(0.0, "share of a target spread over all tokens, in training", "0 to 1", ge=0, lt=1)
    z_loss: float = option(0.0, "weight of the squared logsumexp in the training loss (PaLM: 1e-4)", "1", ge=0, le=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "parameters and activations; auto is bf16 where the processor multiplies faster in it, else fp32"
    )
    loss_scale: float | None = option(None, "constant loss scale of fp16 (null: dynamic)", "1", gt=0)
    fp8: bool = option(
        False, "8-bit matrix products in the layers (GPUs of capability 8.9 and above; emulated elsewhere)"
    )
    fp8_recipe: Fp8Config = option(Fp8Config, "how the engine's FP8 scales, and where it stays away")
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activations recomputed in the backward pass: none, attention's, or whole layers"
    )
    enable_oom_recovery: bool = option(
        False, "out of memory: go on with a smaller micro-batch and the same global batch"
    )

    def batch_size_at(self, step: int) -> int:
        """The global batch of the 0-based ``step``, in sequences."""
        plan = self.batch_size_schedule
        if plan is None:
            return self.global_batch_size
        stage = step // plan.every_steps
        if plan.kind == "ramp":
            return min(self.global_batch_size, plan.start + stage * (plan.increment or 0))
        return min(self.global_batch_size, plan.start << min(stage, 64))

    def seq_length_at(self, step: int, full: int) -> int:
        """The sequence length of the 0-based ``step``; ``full`` is model.seq_length. In tokens."""
        lengths = [stage.seq_length for stage in self.seq_length_schedule if stage.step <= step]
        return lengths[-1] if lengths else full

    def sequences_before(self, step: int) -> int:
        """Sequences that the steps before ``step`` read."""
        plan, full = self.batch_size_schedule, self.global_batch_size
        if plan is None or plan.start >= full:
            return step * full
        stage, rest = divmod(step, plan.every_steps)
        if plan.kind == "ramp":
            increment = plan.increment or full
            growing = min(stage, -(-(full - plan.start) // increment))  # stages before the full batch
            grown = growing * plan.start + increment * (growing * (growing - 1) // 2)
        else:
            growing = min(stage, (-(-full // plan.start) - 1).bit_length())
            grown = plan.start * ((1 << growing) - 1)
        return plan.every_steps * (grown + (stage - growing) * full) + rest * self.batch_size_at(step)

    def tokens_before(self, step: int, full: int) -> int:
        """Tokens that the steps before ``step`` read; ``full`` is model.seq_length."""
        begins = [0, *(stage.step for stage in self.seq_length_schedule if 0 < stage.step < step)]
        ends = [*begins[1:], step]
        return sum((self.sequences_before(end) - self.sequences_before(begin)) * self.seq_length_at(begin, full)
                   for begin, end in zip(begins, ends, strict=True))

    def decay_length(self) -> int:
        """Steps of the learning rate's decay, with the default for ``decay_steps`` null; 0 for a constant rate."""
        if self.schedule == "constant":
            return 0
        if self.decay_steps is not None:
            return self.decay_steps
        after_warmup = self.max_steps - self.warmup_steps
        return min(after_warmup, math.ceil(self.max_steps / 10)) if self.schedule == "wsd" else after_warmup

    def unit_batches(self) -> list[tuple[str, int]]:
        """(field, sequences) whose multiples make up every batch of the run: a divisor of all divides each size."""
        plan = self.batch_size_schedule
        sizes = [("train.global_batch_size", self.global_batch_size)]
        if plan is not None:
            sizes.append(("train.batch_size_schedule.start", plan.start))
            if plan.increment is not None and plan.start != self.global_batch_size:
                sizes.append(("train.batch_size_schedule.increment", plan.increment))
        return sizes

    def problems(self) -> Iterator[Problem]:
        yield from self._rate_problems()
        yield from self._batch_problems()
        yield from self._length_problems()
        if self.optimizer != "muon" and self.muon != MuonConfig():
            yield Problem("muon", f"is set, but train.optimizer is {self.optimizer}", "Set train.optimizer to muon")
        for problem in self.adamw.precision_problems(self.precision):
            yield Problem(f"adamw.{problem.field}", problem.text, problem.fix)
        if self.loss_scale is not None and self.precision != "fp16":
            yield Problem(
                "loss_scale",
                f"is for fp16, but train.precision is {self.precision}",
                "Set it to null, or train.precision to fp16",
            )
        if self.fp8 and self.precision in ("fp32", "fp16"):
            yield Problem("fp8", f"goes with bf16, but train.precision is {self.precision}", "Use train.precision bf16")

    def _rate_problems(self) -> Iterator[Problem]:
        if self.min_lr > self.lr:
            yield Problem("min_lr", f"{self.min_lr} is above train.lr ({self.lr})", "Lower min_lr, or raise lr")
        if self.warmup_steps > self.max_steps:
            yield Problem(
                "warmup_steps",
                f"{self.warmup_steps} warmup steps in a run of {self.max_steps} (train.max_steps)",
                f"Use at most {self.max_steps}, for example {self.max_steps // 10}",
            )
            return
        if self.schedule == "constant" and self.decay_steps is not None:
            yield Problem("decay_steps", "a constant schedule does not decay", "Remove it, or use train.schedule wsd")
        elif self.decay_steps is not None and self.warmup_steps + self.decay_steps > self.max_steps:
            room = self.max_steps - self.warmup_steps
            fix = f"Use at most {room}" if room else "Lower train.warmup_steps"
            yield Problem(
                "decay_steps",
                f"{self.warmup_steps} warmup and {self.decay_steps} decay steps are more than the "
                f"{self.max_steps} of train.max_steps",
                fix,
            )

    def _batch_problems(self) -> Iterator[Problem]:
        plan, full, micro = self.batch_size_schedule, self.global_batch_size, self.micro_batch_size
        if full % micro:
            yield Problem(
                "global_batch_size",
                f"{full} is not a multiple of train.micro_batch_size ({micro})",
                f"Use {near_multiple(full, micro)}, or a micro_batch_size that divides {full}",
            )
        if plan is None:
            return
        for name, size in (("start", plan.start), ("increment", plan.increment or 0)):
            if size % micro:
                yield Problem(
                    f"batch_size_schedule.{name}",
                    f"{size} is not a multiple of train.micro_batch_size ({micro})",
                    f"Use {near_multiple(size, micro)}",
                )
        if plan.start > full:
            yield Problem(
                "batch_size_schedule.start",
                f"{plan.start} is above train.global_batch_size ({full})",
                f"Use at most {full}",
            )
        elif plan.kind == "doubling" and not _doubles(plan.start, full):
            ways = [full >> k for k in range(1, 4) if full % (1 << k) == 0]
            yield Problem(
                "batch_size_schedule.start",
                f"{plan.start} does not double to train.global_batch_size ({full})",
                f"Use {', '.join(map(str, ways))}" if ways else "Use an even train.global_batch_size",
            )
        elif plan.kind == "ramp" and plan.increment and (full - plan.start) % plan.increment:
            yield Problem(
                "batch_size_schedule.increment",
                f"steps of {plan.increment} from {plan.start} miss train.global_batch_size ({full})",
                f"Use a divisor of {full - plan.start}",
            )

    def _length_problems(self) -> Iterator[Problem]:
        stages = self.seq_length_schedule
        if stages and stages[0].step != 0:
            yield Problem(
                "seq_length_schedule.0.step", f"the first stage begins at step {stages[0].step}", "Begin with step 0"
            )
        for i in range(1, len(stages)):
            if stages[i].step <= stages[i - 1].step:
                yield Problem(
                    f"seq_length_schedule.{i}.step",
                    f"step {stages[i].step} does not come after step {stages[i - 1].step}",
                    "List the stages in ascending order of steps",
                )


class ParallelConfig(Section):
    """How the model and the batch are split over ranks; what is left of the world size is data parallel."""

    tensor: int = option(1, "ranks that share each matrix", "ranks", ge=1, le=4096)
    pipeline: int = option(1, "ranks that share the layers, in stages", "ranks", ge=1, le=4096)
    virtual_pipeline: int = option(
        1, "chunks of layers that each pipeline rank holds (above 1: interleaved)", "chunks", ge=1, le=4096
    )
    context: int = option(1, "ranks that share each sequence (context parallelism)", "ranks", ge=1, le=4096)
    expert: int = option(1, "ranks that share the experts", "ranks", ge=1, le=4096)
    expert_tensor: int | None = option(
        None, "ranks that share each expert's matrices (null: tensor)", "ranks", ge=1, le=4096
    )
    sequence_parallel: bool = option(False, "tensor ranks also share the sequence between matrices")
    distributed_optimizer: bool = option(
        False, "data-parallel ranks share the optimiser's state (with train.optimizer muon they always do)"
    )
    overlap_grad_reduce: bool | None = option(None, "reduce gradients during the backward pass (null: on GPUs)")
    timeout_minutes: float = option(
        10, "how long a rank waits for the others before the run ends", "minutes", gt=0, le=10**5
    )


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    save_steps: int = option(
        500, "steps between checkpoints; one at the end always (0: only that)", "steps", ge=0, le=STEPS
    )
    keep_last: int = option(2, "newest checkpoints to keep", "checkpoints", ge=1, le=10**6)
    keep_best: bool = option(True, "also keep the one with the lowest validation loss (of steps also evaluated)")
    load_best_at_end: bool = option(
        False, "the run ends with the weights of that one, which is also what later stages and commands then find"
    )

    def problems(self) -> Iterator[Problem]:
        if self.load_best_at_end and not self.keep_best:
            yield Problem("load_best_at_end", "needs the best checkpoint, but keep_best is false", "Set keep_best true")


class EvaluationConfig(Section):
    """When to measure the loss on held-out data, and on how much."""

    eval_steps: int = option(
        500, "steps between evaluations; one at the end always (0: only that)", "steps", ge=0, le=STEPS
    )
    eval_batches: int | None = option(
        None, "global batches an evaluation reads (null: the whole split)", "batches", ge=1, le=STEPS
    )


class LoggingConfig(Section):
    """Where the numbers go. JSONL and CSV are always written."""

    logging_steps: int = option(10, "steps between logged lines", "steps", ge=1, le=STEPS)
    tensorboard: bool = option(True, "write TensorBoard events")
    wandb: Literal["off", "online", "offline"] = option("off", "Weights & Biases")
    wandb_project: str = option("mainspring", "Weights & Biases project", min_length=1)
    progress: Literal["auto", "on", "off"] = option("auto", "progress bar; auto shows it on a terminal")


def _doubles(start: int, full: int) -> bool:
    ratio, rest = divmod(full, start)
    return rest == 0 and ratio & (ratio - 1) == 0


def near_multiple(size: int, step: int) -> str:
    """The multiples of ``step`` on both sides of ``size``, in words."""
    below, above = size // step * step, -(-size // step) * step
    return f"{below} or {above}" if 0 < below < above else str(above)
