"""A model from a checkpoint alone: for evaluation, generation and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import launch
from engine.checkpoint import adapters, layout, sharded
from engine.checkpoint.manager import agree, read_state
from engine.config import Config, ParallelConfig, layouts, load_config, vocabulary
from engine.config.inference import EvaluationLayout, ModelLayout
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError
from engine.model import build
from engine.model.config import resolve_precision
from engine.parallel import topology
from engine.parallel.topology import Groups


@dataclass(frozen=True)
class Plan:
    """A checkpoint, and the configuration that it will be loaded under."""

    path: Path
    cfg: Config


@dataclass(frozen=True)
class Restored:
    """``chunks``: this rank's part of the bare model, in evaluation mode. ``record``: its state.json.

    A context manager: leaving it ends torch.distributed, which the model's layers run on.
    """

    path: Path
    cfg: Config
    groups: Groups
    chunks: list[Any]
    tokenizer: Tokenizer
    record: dict

    def close(self) -> None:
        topology.shutdown()

    def __enter__(self) -> Restored:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or self.groups.world_size == 1:  # after an error other ranks may be gone
            self.close()


def plan(path: Path | str, *, device: str = "auto", precision: str = "auto", seq_length: int | None = None,
         parallel: ModelLayout | None = None) -> Plan:
    """Finds the checkpoint and fits the layout to its model and to the ranks there are, before anything starts.

    ``parallel``: how ranks share the model (None: each holds all of it), whatever the layout of its training.
    ``seq_length``: the tokens of a sequence, where the model will read fewer than its context. Raises ``UserError``.
    """
    launch.adopt()
    checkpoint = layout.find(path)
    cfg = load_config(checkpoint / "config.yaml")
    train = cfg.train.model_copy(update={"micro_batch_size": 1, "global_batch_size": launch.world_size(),
                                         "batch_size_schedule": None, "seq_length_schedule": [], "recompute": "none"})
    if cfg.model.backend != "te":
        train = train.model_copy(update={"fp8": False})  # weights are those of bf16
    if precision != "auto":
        train = train.model_copy(update={"precision": precision})
    elif cfg.train.precision == "fp16" and topology.resolve_device(device).type != "cuda":
        train = train.model_copy(update={"precision": "fp32"})
    sizes = (parallel or EvaluationLayout()).model_dump()
    cfg = cfg.model_copy(update={"device": device, "train": train, "parallel": ParallelConfig(
        **sizes, timeout_minutes=cfg.parallel.timeout_minutes)})
    check_layout(cfg, seq_length)
    return Plan(checkpoint, cfg)


def check_layout(cfg: Config, seq_length: int | None = None) -> None:
    """Refuses what a model cannot read (``seq_length``), is not divided by, or what other ranks are needed for.

    On every rank alike: it needs no groups. Raises ``UserError``.
    """
    if seq_length is not None and seq_length > cfg.model.seq_length:
        raise UserError(f"{seq_length} tokens is longer than the model's context ({cfg.model.seq_length})",
                        where="seq_length", fix=f"Use at most {cfg.model.seq_length}")
    read = cfg.model if seq_length is None else cfg.model.model_copy(update={"seq_length": seq_length})
    for problem in layouts.problems(cfg.model_copy(update={"model": read}), training=False):
        where = "seq_length" if problem.field == "model.seq_length" and seq_length else problem.field
        raise UserError(problem.text, where=where, fix=problem.fix)
    cfg.data_parallel_size(launch.world_size(), training=False)


LoadBase = Callable[[Path, str, list[Any], Config, Groups], None]  # engine.stages.origin.load_base


def load(plan: Plan, *, verify: bool = True, load_base: LoadBase | None = None) -> Restored:
    """Builds the model under the plan's layout and loads its weights, whatever layout they were saved under.

    ``load_base``: fills the frozen weights of a checkpoint of adapters, which holds no others.
    Collective over all ranks. Raises ``UserError`` on all of them when the checkpoint is damaged.
    """
    checkpoint, cfg = plan.path, plan.cfg
    groups = topology.start(cfg)
    if verify:  # one rank reads it all, the others only their parts
        agree(groups, lambda: groups.is_main and layout.verify(checkpoint), f"loading {checkpoint}")
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    chunks = build.model(cfg, groups, vocabulary(cfg.model, tokenizer.vocab_size))
    record = read_state(checkpoint)
    if cfg.lora is not None:
        base = adapters.base_of(checkpoint, record)
        if load_base is None:
            raise UserError("is a checkpoint of adapters, which this command cannot read", where=str(checkpoint),
                            fix="Merge them into their base first: mainspring export --merge")
        load_base(base.path, base.sha256, chunks, cfg, groups)
    sharded.load(checkpoint / "sharded", chunks, None, groups)
    for chunk in chunks:
        chunk.eval()
    assert next(chunks[0].parameters()).dtype == resolve_precision(cfg.train.precision, groups.device)
    return Restored(checkpoint, cfg, groups, chunks, tokenizer, record)


def model(path: Path | str, *, device: str = "auto", precision: str = "auto", parallel: ModelLayout | None = None,
          verify: bool = True, load_base: LoadBase | None = None) -> Restored:
    """``plan`` and ``load``: loads weights, whatever layout they were saved under, under ``parallel``.

    ``precision`` "auto" is the dtype the model was trained in, where this device has it. Raises ``UserError`` when
    ``path`` holds no checkpoint or a damaged one, or when the layout does not fit.
    """
    return load(plan(path, device=device, precision=precision, parallel=parallel), verify=verify, load_base=load_base)
