"""`mainspring evaluate --checkpoint …`: held-out perplexity, token accuracy and speed, from a checkpoint alone.

On several processors: `torchrun --nproc-per-node 4 -m engine.evaluate …` shares the data over them, with
`--parallel.tensor 2` and the like also the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.checkpoint.restore import Restored


def main(argv: list[str]) -> int:
    """Prints the result as one JSON object. Several processes (torchrun) share the model as ``--parallel`` says, and
    the split. Returns the exit code."""
    from engine.config import parse
    from engine.config.inference import EvaluateConfig

    options = parse(EvaluateConfig, argv, prog="mainspring evaluate")

    from engine.checkpoint import restore
    from engine.stages.origin import load_base

    plan = restore.plan(options.checkpoint, device=options.device, precision=options.precision,
                        seq_length=options.seq_length, parallel=options.parallel)
    with restore.load(plan, load_base=load_base) as restored:
        found = run(restored, data=options.data, split=options.split, batch_size=options.batch_size,
                    max_sequences=options.max_sequences, seq_length=options.seq_length)
        if restored.groups.is_main:
            record = {"checkpoint": str(restored.path), "step": restored.record["train"]["step"]}
            text = json.dumps(record | found, indent=1)
            print(text)
            if options.output is not None:
                _write(options.output, text)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path), fix="Choose another --output") from error


def run(restored: Restored, *, data: Path | None = None, split: Literal["validation", "train"] = "validation",
        batch_size: int = 8, max_sequences: int | None = None, seq_length: int | None = None) -> dict[str, float]:
    """Evaluates a restored model on ``data``, or on the data of its training; on every rank.

    ``batch_size`` sequences at once, ``max_sequences`` at most (None: all), of ``seq_length`` tokens (None: the
    model's context). See ``engine.evaluation.perplexity.evaluate`` for the result. Raises ``UserError``.
    """
    from engine.checkpoint.restore import check_layout
    from engine.data import loader
    from engine.data.tokenizer import load_tokenizer
    from engine.evaluation.perplexity import evaluate
    from engine.train.run import tokenizer_folder

    cfg, groups = restored.cfg, restored.groups
    check_layout(cfg, seq_length)
    if data is None and cfg.stage in ("sft", "dpo", "lora"):
        raise UserError(f"was trained on examples (stage {cfg.stage}), and evaluate reads prepared tokens",
                        where=str(restored.path), fix="Name a folder that `mainspring prepare` wrote with --data; the "
                        "run's metrics.jsonl has what was measured on examples")
    if data is not None:
        cfg = cfg.model_copy(update={"data": cfg.data.only(data)})
    folder = tokenizer_folder(cfg)
    if load_tokenizer(folder).sha256 != restored.tokenizer.sha256:
        raise UserError("was tokenized by another tokenizer than the model's", where=str(folder.parent),
                        fix=f"Prepare it with --tokenizer {restored.path / 'tokenizer'}")
    with loader.build(cfg, split, dp_rank=groups.data_parallel_rank, dp_size=groups.data_parallel_size) as held_out:
        return evaluate(restored.chunks, held_out, groups, micro_batch_size=batch_size,
                        seq_length=seq_length or cfg.model.seq_length, max_sequences=max_sequences)


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
