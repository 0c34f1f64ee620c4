"""`mainspring evaluate --checkpoint …`: held-out perplexity, token accuracy and speed, from a checkpoint alone."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import UserError


def main(argv: list[str]) -> int:
    """Prints the result as one JSON object. Several processes (torchrun) share the split. Returns the exit code."""
    from engine.config import parse
    from engine.config.inference import EvaluateConfig

    options = parse(EvaluateConfig, argv, prog="mainspring evaluate")

    from engine.checkpoint import restore
    from engine.parallel import topology

    restored = restore.model(options.checkpoint, device=options.device, precision=options.precision)
    result = {"checkpoint": str(restored.path), "step": restored.record["train"]["step"]} | run(restored, options)
    if restored.groups.is_main:
        text = json.dumps(result, indent=1)
        print(text)
        if options.output is not None:
            options.output.write_text(text + "\n", encoding="utf-8")
    topology.shutdown()
    return 0


def run(restored, options) -> dict:
    """Evaluates an already restored model on ``options.data``, or on the data of its training."""
    from engine.data import loader
    from engine.data.tokenizer import load_tokenizer
    from engine.evaluation.perplexity import evaluate
    from engine.train.run import data_folders

    cfg, groups = restored.cfg, restored.groups
    length = options.seq_length or cfg.model.seq_length
    if length > cfg.model.seq_length:
        raise UserError(f"{length} tokens is longer than the model's context ({cfg.model.seq_length})", where="seq_length",
                        fix=f"Use at most {cfg.model.seq_length}")
    if options.data is not None:
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": options.data, "blend": []})})
    for path in data_folders(cfg):
        if not Path(path).is_dir():
            raise UserError("no such directory", where=str(path), fix="Name a prepared directory with --data")
        if load_tokenizer(Path(path) / "tokenizer").sha256 != restored.tokenizer.sha256:
            raise UserError("was tokenized by another tokenizer than the model's", where=str(path),
                            fix=f"Prepare it with --tokenizer {restored.path / 'tokenizer'}")
    with loader.build(cfg, options.split, dp_rank=groups.data_parallel_rank, dp_size=groups.data_parallel_size) as data:
        return evaluate(restored.chunks, data, groups, micro_batch_size=options.batch_size, seq_length=length,
                        max_sequences=options.max_sequences)
