"""A model from a checkpoint alone: for evaluation, generation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import layout, sharded
from engine.checkpoint.manager import read_state
from engine.config import Config, ParallelConfig, load_config, vocabulary
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.model import build
from engine.model.config import resolve_precision
from engine.parallel import topology
from engine.parallel.topology import Groups


@dataclass(frozen=True)
class Restored:
    """``chunks``: the bare model in evaluation mode, in one piece on each rank. ``record``: its state.json.

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


def model(path: Path | str, *, device: str = "auto", precision: str = "auto", verify: bool = True) -> Restored:
    """Loads weights, whatever layout they were saved under; several processes each hold the whole model.

    ``precision`` "auto" is the dtype the model was trained in, where this device has it. Raises ``UserError`` when
    ``path`` holds no checkpoint or a damaged one.
    """
    checkpoint = layout.find(path)
    if verify:
        layout.verify(checkpoint)
    cfg = load_config(checkpoint / "config.yaml")
    train = cfg.train.model_copy(update={"micro_batch_size": 1, "global_batch_size": topology.world_size(),
                                         "batch_size_schedule": None, "recompute": "none"})
    if precision != "auto":
        train = train.model_copy(update={"precision": precision})
    elif cfg.train.precision == "fp16" and topology.resolve_device(device).type != "cuda":
        train = train.model_copy(update={"precision": "fp32"})
    cfg = cfg.model_copy(update={"device": device, "parallel": ParallelConfig(), "train": train})
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    groups = topology.build(cfg)
    chunks = build.model(cfg, groups, vocabulary(cfg.model, tokenizer.vocab_size))
    sharded.load(checkpoint / "sharded", chunks, None, groups)
    for chunk in chunks:
        chunk.eval()
    assert next(chunks[0].parameters()).dtype == resolve_precision(train.precision, groups.device)
    return Restored(checkpoint, cfg, groups, chunks, tokenizer, read_state(checkpoint))
