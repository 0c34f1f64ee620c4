"""Pretraining and mid-training: what they read is prepared tokens."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config
from engine.data import loader
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.parallel.topology import Groups
from engine.stages.origin import Origin
from engine.stages.run import Data, run
from engine.train.run import check_tokenizer, tokenizer_folder
from engine.train.state import TrainState


def on_tokens(cfg: Config, origin: Origin | None = None) -> TrainState:
    """Pretraining and mid-training: a stage on prepared directories. On every rank. Raises ``UserError``."""
    folder = tokenizer_folder(cfg)
    check_tokenizer(cfg, folder, load_tokenizer(folder).sha256)
    if origin is not None:
        same_tokenizer(folder, origin)

    def data(cfg: Config, groups: Groups) -> Data:
        place = {"dp_rank": groups.data_parallel_rank, "dp_size": groups.data_parallel_size}
        train = loader.build(cfg, "train", **place)
        return Data(train, loader.build(cfg, "validation", **place))

    return run(cfg, tokenizer=folder, data=data, origin=origin)


def same_tokenizer(folder: Path, origin: Origin) -> None:
    """Refuses data whose tokens another tokenizer made than the initial model's. Raises ``UserError``."""
    if load_tokenizer(folder).sha256 != load_tokenizer(origin.tokenizer).sha256:
        raise UserError(f"holds another tokenizer than that of {origin.path}, whose weights the run starts from",
                        where=str(folder.parent), fix=f"Prepare the data with --tokenizer {origin.tokenizer}")
