"""Supervised fine-tuning on instructions and conversations: `python engine/sft.py --config …`, or with torchrun.

The loss counts the answers' tokens alone; examples are packed into rows and do not see each other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and __package__ is None:  # run by path: the checkout is importable without being installed
    here = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(here), str(here / "kernels")]

from engine import launch
from engine.runtime import command

if TYPE_CHECKING:
    from engine.config import Config
    from engine.data.examples.loader import ExampleLoader
    from engine.parallel.topology import Groups
    from engine.stages.run import Data
    from engine.train.state import TrainState


def main(argv: list[str]) -> int:
    """Trains as the command line says. Returns the exit code."""
    from engine.config import Config, parse

    run(parse(Config, argv, prog="engine/sft.py", fixed={"stage": "sft"}))
    return 0


def run(cfg: Config) -> TrainState:
    """Trains from ``init_from``'s weights, or resumes; on every rank. Returns how far it came. Raises ``UserError``.

    With ``lora`` set, adapters beside those weights.
    """
    # Before any of these imports could start CUDA.
    launch.set_gpu_environment(tensor=cfg.parallel.tensor, context=cfg.parallel.context, device=cfg.device)
    from engine.data.examples import build
    from engine.model.answers import ANSWERS
    from engine.stages import origin
    from engine.stages.run import run as run_stage

    cfg, start = origin.settle(cfg)
    tokenizer = build.tokenizer_folder(cfg, None if start is None else start.tokenizer)
    return run_stage(cfg, tokenizer=tokenizer, data=lambda cfg, groups: examples(cfg, groups, tokenizer),
                      origin=start, objective=ANSWERS)


def examples(cfg: Config, groups: Groups, tokenizer: Path) -> Data:
    """Loaders of supervised examples for training and validation, their masks audited."""
    from engine.data.examples import build
    from engine.data.examples.audit import audit
    from engine.stages.run import Data, with_epochs

    place: dict[str, Any] = {"dp_rank": groups.data_parallel_rank, "dp_size": groups.data_parallel_size}
    train = build.build(cfg, tokenizer, "train", **place)
    held_out = build.build(cfg, tokenizer, "validation", **place)
    rows = train.rows_per_epoch
    if cfg.examples.audit and groups.is_main:
        for line in audit(cfg, tokenizer, train, colour=sys.stderr.isatty()):
            print(line, file=sys.stderr, flush=True)  # where the console's lines go
    return Data(train, held_out, rows=rows, report=(*train.report, *held_out.report,
                                                    *described(with_epochs(cfg, rows), train)))


def described(cfg: Config, train: ExampleLoader) -> list[str]:
    """What the run will read, in lines for people."""
    total = cfg.train.sequences_before(cfg.train.max_steps)
    lines = [f"{train.num_examples:,} examples in {train.rows_per_epoch:,} rows of {train.seq_length:,} tokens, "
             f"{train.fill:.1%} full; the run reads {total:,} rows"]
    for share in train.ledger(total):
        lines.append(f"  {share.source}: {share.rows:,} rows, {share.epochs:.2f} epochs")
    return lines


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
