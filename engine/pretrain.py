"""Pretraining: `python engine/pretrain.py --config …`, or `torchrun --nproc-per-node N engine/pretrain.py …`."""

from __future__ import annotations

import sys
from functools import partial
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

    run(parse(Config, argv, prog="engine/pretrain.py"))
    return 0


def run(cfg: Config) -> TrainState:
    """Trains a model from scratch, or resumes; on every rank. Returns how far it came. Raises ``UserError``."""
    # Before any of these imports could start CUDA.
    launch.set_gpu_environment(tensor=cfg.parallel.tensor, context=cfg.parallel.context, device=cfg.device)
    from engine.checkpoint.manager import Checkpointer
    from engine.config import vocabulary
    from engine.data import loader
    from engine.data.tokenizer import load_tokenizer
    from engine.evaluation.perplexity import evaluate
    from engine.model import build
    from engine.parallel import topology, wrap
    from engine.train import loop, optimizer
    from engine.train.run import check_tokenizer, logger_for, report_first_step, report_start, tokenizer_folder
    from engine.train.state import TrainState

    folder = tokenizer_folder(cfg)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(cfg, folder, tokenizer.sha256)
    vocab_size = vocabulary(cfg.model, tokenizer.vocab_size)
    with topology.groups(cfg) as groups:
        place = {"dp_rank": groups.data_parallel_rank, "dp_size": groups.data_parallel_size}
        with loader.build(cfg, "train", **place) as data, loader.build(cfg, "validation", **place) as held_out:
            chunks = wrap.apply(build.model(cfg, groups, vocab_size), cfg, groups)
            update = optimizer.build(chunks, cfg, groups)
            checkpoints = Checkpointer(cfg, groups, tokenizer=folder, tokenizer_sha256=tokenizer.sha256,
                                       vocab_size=vocab_size)
            state = TrainState()
            if (found := checkpoints.find_resume()) is not None:
                state = TrainState.from_dict(checkpoints.load(found, chunks, update))
            with logger_for(cfg, groups, state) as logger:
                report_start(logger, cfg, groups, chunks, resumed_from=found, held_out_tokens=held_out.num_tokens)
                limit = cfg.evaluation.eval_batches
                validate = partial(
                    evaluate, chunks, held_out, groups, micro_batch_size=cfg.train.micro_batch_size,
                    seq_length=cfg.model.seq_length,
                    max_sequences=None if limit is None else limit * cfg.train.global_batch_size)
                return loop.run(
                    cfg, chunks, update, data, groups, state=state, logger=logger, vocab_size=vocab_size,
                    save=lambda s: checkpoints.save(chunks, update, s.to_dict()),
                    evaluate=validate if held_out.num_tokens >= 2 else None,
                    on_first_step=lambda: report_first_step(logger),
                )


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
