"""Adapters: `python engine/lora.py --config …`, or with torchrun.

Low-rank adapters beside the frozen weights of ``init_from``, trained on instructions and conversations as in the stage
sft; `lora.base nf4` keeps those weights in four bits (QLoRA). Domain and general data are sources of
``examples.train``, mixed by their weights. Checkpoints hold the adapters and name their base by its hash.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and __package__ is None:  # run by path: the checkout is importable without being installed
    here = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(here), str(here / "kernels")]

from engine.runtime import command

if TYPE_CHECKING:
    from engine.config import Config
    from engine.train.state import TrainState


def main(argv: list[str]) -> int:
    """Trains as the command line says. Returns the exit code."""
    from engine.config import Config, parse

    run(parse(Config, argv, prog="engine/lora.py", fixed={"stage": "lora"}))
    return 0


def run(cfg: Config) -> TrainState:
    """Trains adapters beside ``init_from``'s weights, or resumes; on every rank. Returns how far it came.

    Raises ``UserError``, among others for a target that the model does not have, and for an adapter of another base.
    """
    from engine import sft

    return sft.run(cfg)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
