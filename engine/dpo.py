"""Learning from preferences (DPO, cDPO, robust DPO, IPO): `python engine/dpo.py --config …`, or with torchrun.

The reference model's log-probabilities are computed before the first step with the very model that is trained then,
and kept in a file: see engine/train/reference.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and __package__ is None:  # run by path: the checkout is importable without being installed
    here = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(here), str(here / "kernels")]

from engine import launch
from engine.errors import UserError
from engine.runtime import command

if TYPE_CHECKING:
    from engine.config import Config
    from engine.parallel.topology import Groups
    from engine.stages.origin import Origin
    from engine.stages.run import Data, Start
    from engine.train.state import TrainState

# What of the section model decides what weights mean, beside the shapes of these, which loading them checks.
_MEANING = ("norm_eps", "rotary_base", "rotary_percent", "yarn", "llama3_rope", "activation", "qk_norm",
            "attention_sinks", "window_size", "full_attention_every")


def main(argv: list[str]) -> int:
    """Trains as the command line says. Returns the exit code."""
    from engine.config import Config, parse

    run(parse(Config, argv, prog="engine/dpo.py", fixed={"stage": "dpo"}))
    return 0


def run(cfg: Config) -> TrainState:
    """Trains from ``init_from``'s weights, or resumes; on every rank. Returns how far it came. Raises ``UserError``."""
    # Before any of these imports could start CUDA.
    launch.set_gpu_environment(tensor=cfg.parallel.tensor, context=cfg.parallel.context, device=cfg.device)
    from engine.data.examples import build
    from engine.model.preference import Preference
    from engine.stages import origin as origins
    from engine.stages.run import run as run_stage

    cfg, origin = origins.settle(cfg)
    tokenizer = build.tokenizer_folder(cfg, None if origin is None else origin.tokenizer)
    teacher = origin if cfg.dpo.reference is None else origins.find(cfg.dpo.reference)
    if teacher is not None and teacher != origin:
        _check_reference(cfg, origin, teacher, tokenizer)
    return run_stage(cfg, tokenizer=tokenizer, data=lambda cfg, groups: pairs(cfg, groups, tokenizer), origin=origin,
                      objective=Preference(cfg.dpo), before=lambda start: _score(start, origin, teacher))


def pairs(cfg: Config, groups: Groups, tokenizer: Path) -> Data:
    """Loaders of preference pairs, for training and validation."""
    from engine.data.examples import build
    from engine.data.examples.audit import audit
    from engine.sft import described
    from engine.stages.run import Data, with_epochs

    place: dict[str, Any] = {"pairs": True, "dp_rank": groups.data_parallel_rank, "dp_size": groups.data_parallel_size}
    train = build.build(cfg, tokenizer, "train", **place)
    held_out = build.build(cfg, tokenizer, "validation", **place)
    rows = train.rows_per_epoch
    if cfg.examples.audit and groups.is_main:
        for line in audit(cfg, tokenizer, train, colour=sys.stderr.isatty()):
            print(line, file=sys.stderr, flush=True)
    return Data(train, held_out, rows=rows,
                report=(*train.report, *held_out.report, *described(with_epochs(cfg, rows), train)))


def _check_reference(cfg: Config, origin: Origin | None, teacher: Origin, tokenizer: Path) -> None:
    """Refuses a reference that reads other tokens, or would be taken for another model than it is."""
    from engine.data.tokenizer import load_tokenizer

    where, fix = f"dpo.reference {teacher.path}", "Name a model of the same kind, or leave it out"
    if origin is None:
        raise UserError("is loaded in place of the initial weights, but these are random and could not be loaded again",
                        where=where, fix="Name the weights to start from with --init_from")
    if load_tokenizer(teacher.tokenizer).sha256 != load_tokenizer(tokenizer).sha256:
        raise UserError(f"has another tokenizer than {tokenizer}", where=where, fix=fix)
    own, theirs = cfg.model.model_dump(mode="json"), teacher.model_section()
    for name in _MEANING:
        if name in theirs and theirs[name] != own[name]:
            raise UserError(f"has model.{name} {theirs[name]}, the model to train {own[name]}", where=where, fix=fix)


def _score(start: Start, origin: Origin | None, teacher: Origin | None) -> None:
    """Gives the loaders their reference log-probabilities. The model's weights are then any."""
    from engine.checkpoint.manager import agree
    from engine.train import reference

    cfg, groups = start.cfg, start.groups
    weights = agree(groups, lambda: _fingerprint(cfg, teacher) if groups.is_main else None, "reading the reference")
    precision = str(start.chunks[0].config.params_dtype) + ("+fp8" if cfg.train.fp8 else "")
    if cfg.lora is not None and cfg.lora.base != "none":
        precision += f"+{cfg.lora.base}{'+double_quant' * cfg.lora.double_quant}"
    model = cfg.model.model_dump(mode="json", include={*_MEANING, "moe"})

    def load() -> None:
        if teacher == origin:
            start.load()
        elif teacher is not None:
            teacher.load(start.chunks, cfg, groups)

    start.data.report += tuple(reference.provide(
        [start.data.train, start.data.held_out], start.chunks, groups,
        key=lambda loader: {"weights": next(w for w in weights if w is not None), "model": model,
                            "precision": precision, "tokens": loader.fingerprint},
        folder=cfg.dpo.cache_dir or cfg.output_dir / "reference", load=load,
        micro_batch_size=cfg.train.micro_batch_size, seq_length=cfg.model.seq_length))


def _fingerprint(cfg: Config, teacher: Origin | None) -> str:
    """Of the reference's weights. Random ones follow from the configuration, whatever the layout."""
    if teacher is not None:
        return teacher.fingerprint()
    return hashlib.sha256(json.dumps([cfg.seed, cfg.model.model_dump(mode="json")]).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
