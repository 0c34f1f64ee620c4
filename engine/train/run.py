"""The parts of a driver that every stage repeats: the run's folder, its logger, its opening lines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import torch

from engine.config import Config, dump_yaml
from engine.errors import UserError
from engine.model.build import parameter_count
from engine.parallel.topology import Groups
from engine.train.metrics import MetricLogger
from engine.train.state import TrainState


def data_folders(cfg: Config) -> list[Path]:
    """The prepared directories that the run reads."""
    return [cfg.data.path] if cfg.data.path is not None else [entry.path for entry in cfg.data.blend]


def tokenizer_folder(cfg: Config) -> Path:
    """The tokenizer that the data was prepared with.

    Raises ``UserError`` when there is none, or when the sources of a blend were tokenized by different ones.
    """
    paths = data_folders(cfg)
    if not paths:
        raise UserError("no data is named", where="data.path", fix="Give a folder that `mainspring prepare` wrote")
    hashes = {}
    for path in paths:
        manifest = Path(path) / "manifest.json"
        if not manifest.exists():
            problem = "is not a prepared directory (no manifest.json)" if Path(path).is_dir() else "no such folder"
            raise UserError(problem, where=str(path), fix="Give a folder that `mainspring prepare` wrote")
        try:
            hashes[path] = json.loads(manifest.read_text(encoding="utf-8"))["tokenizer_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"is not the manifest of a prepared directory ({error})", where=str(manifest),
                            fix="Prepare the data again with `mainspring prepare`") from error
    if len(set(hashes.values())) > 1:
        other = next(p for p in paths if hashes[p] != hashes[paths[0]])
        raise UserError(f"was tokenized by another tokenizer than {paths[0]}", where=str(other),
                        fix="Prepare it again with --tokenizer of the first")
    return Path(paths[0]) / "tokenizer"


def check_tokenizer(cfg: Config, folder: Path, sha256: str) -> None:
    """Refuses data whose tokens another tokenizer made. Raises ``UserError``."""
    expected = json.loads((folder.parent / "manifest.json").read_text(encoding="utf-8"))["tokenizer_sha256"]
    if sha256 != expected:
        raise UserError("is not the tokenizer that made these tokens (its content hash differs from manifest.json)",
                        where=str(folder), fix="Restore it, or prepare the data again")


def logger_for(cfg: Config, groups: Groups, state: TrainState) -> MetricLogger:
    """The run's metric logger; the main rank also saves the resolved configuration beside it."""
    if groups.is_main:
        try:
            cfg.output_dir.mkdir(parents=True, exist_ok=True)
            (cfg.output_dir / "config.yaml").write_text(dump_yaml(cfg), encoding="utf-8")
        except OSError as error:
            raise UserError(error.strerror or str(error), where=str(cfg.output_dir),
                            fix="Choose another --output_dir, or mend its permissions") from error
    return MetricLogger(cfg.output_dir, logging=cfg.logging, total_steps=cfg.train.max_steps, start_step=state.step,
                        is_main=groups.is_main, run_config=cfg.model_dump(mode="json"))


def report_start(logger: MetricLogger, cfg: Config, groups: Groups, chunks, *, resumed_from: Path | None,
                 held_out_tokens: int, origin: Path | None = None) -> None:
    """What is about to run, in one line; and in another if there is nothing to validate on."""
    p, dtype = cfg.parallel, str(chunks[0].config.params_dtype).removeprefix("torch.")
    layout = f"TP{p.tensor} PP{p.pipeline} CP{p.context} EP{p.expert} DP{groups.data_parallel_size}"
    device = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else groups.device.type
    start = f"resuming {resumed_from}" if resumed_from else f"starting from {origin}" if origin else "starting"
    size = f"{parameter_count(chunks) / 1e6:.2f}M parameters on this rank"
    logger.message(f"{start}: {size}, {layout}, {dtype} on {device}, backend {cfg.model.backend}, "
                   f"{cfg.train.max_steps} steps -> {cfg.output_dir}")
    if held_out_tokens < 2:
        why = "the data holds out no document (a corpus of one has none to spare)"
        if cfg.stage in ("sft", "dpo", "lora"):
            why = "no examples are held out (examples.validation, examples.validation_fraction)"
        logger.message(f"{why}: no validation, and the best checkpoint is not known")


def report_first_step(logger: MetricLogger) -> None:
    """How long a user waited for the first update, since the process was started."""
    logger.message(f"first step done {time.time() - psutil.Process().create_time():.1f} s after the start")
