"""Pretraining: `python engine/pretrain.py --config …`, or `torchrun --nproc-per-node N engine/pretrain.py …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and __package__ is None:  # run by path: the checkout is importable without being installed
    here = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(here), str(here / "kernels")]

from engine import launch
from engine.runtime import command

if TYPE_CHECKING:
    from engine.config import Config
    from engine.train.state import TrainState


def main(argv: list[str]) -> int:
    """Trains as the command line says. Returns the exit code."""
    from engine.config import Config, parse

    run(parse(Config, argv, prog="engine/pretrain.py", fixed={"stage": "pretrain"}))
    return 0


def run(cfg: Config) -> TrainState:
    """Trains a model from scratch, or resumes; on every rank. Returns how far it came. Raises ``UserError``."""
    # Before any of these imports could start CUDA.
    launch.set_gpu_environment(tensor=cfg.parallel.tensor, context=cfg.parallel.context, device=cfg.device)
    from engine.stages import tokens

    return tokens.on_tokens(cfg)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
