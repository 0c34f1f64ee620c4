"""`mainspring report --run …`: a finished run against unigram and bigram models, a sample, and a plot of its losses."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import UserError


def main(argv: list[str]) -> int:
    """Writes report.json, loss.png and sample.txt into the run's folder and prints them. Returns the exit code."""
    from engine.config import parse
    from engine.config.inference import ReportConfig

    options = parse(ReportConfig, argv, prog="mainspring report")

    if not (options.run / "metrics.jsonl").is_file():
        raise UserError("is not the folder of a run (no metrics.jsonl)", where=str(options.run),
                        fix="Give the output_dir that it was trained with")

    from engine import evaluate, generate
    from engine.checkpoint import restore
    from engine.data.prepared import open_split
    from engine.evaluation.ngram import ngram_cross_entropy
    from engine.evaluation.plot import plot_loss
    from engine.stages.origin import load_base
    from engine.train.run import data_folders

    plan = restore.plan(options.run, device=options.device)
    if plan.cfg.stage in ("sft", "dpo", "lora"):
        raise UserError(f"was trained on examples (stage {plan.cfg.stage}); the report is of runs on prepared tokens",
                        where=str(options.run), fix="See its metrics.jsonl, or use `mainspring evaluate` with --data")
    with restore.load(plan, load_base=load_base) as restored:
        cfg = restored.cfg
        held_out = evaluate.run(restored)
        baselines = {}
        folders = data_folders(cfg)
        if len(folders) == 1:  # the baselines are fitted on the tokens of one prepared directory
            splits = [open_split(folders[0], split).dataset for split in ("train", "validation")]
            baselines = ngram_cross_entropy(splits[0], splits[1], restored.tokenizer.vocab_size)
        added = generate.continuations(restored, options.prompt, max_new_tokens=options.max_new_tokens)[0]
    sample = options.prompt + added

    nats = {name: baselines[name] for name in ("unigram", "bigram") if name in baselines}
    plot_loss(options.run / "metrics.jsonl", options.run / "loss.png", baselines=nats,
              title=f"{cfg.output_dir.name}: training and held-out loss")
    (options.run / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    line = verdict(held_out["loss"], nats)
    report = {"checkpoint": str(restored.path), "step": restored.record["train"]["step"], "held_out": held_out,
              "baselines": baselines, "verdict": line}
    (options.run / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"--- sample (prompt {options.prompt!r})\n{sample}\n---")
    print(line)
    print(places(options.run, restored.path, folders))
    return 0


def verdict(model: float, baselines: dict[str, float]) -> str:
    """One line that names the model's held-out cross-entropy and the baselines', and whether it is below them."""
    if not baselines:
        return f"held-out cross-entropy, nats a token: model {model:.3f}"
    names = ", ".join(f"{name} {nats:.3f}" for name, nats in baselines.items())
    missed = [name for name, nats in baselines.items() if model >= nats]
    word = f"NOT below {' and '.join(missed)}" if missed else f"below {' and '.join(baselines)}"
    return f"held-out cross-entropy, nats a token: model {model:.3f}, {names}: the model is {word}"


def places(run: Path, checkpoint: Path, folders: list[Path]) -> str:
    """Where everything of the run is, one line each."""
    rows = [("checkpoint", checkpoint), ("loss plot", run / "loss.png"), ("sample", run / "sample.txt"),
            ("report", run / "report.json"), ("metrics", run / "metrics.jsonl"), ("TensorBoard", run / "tensorboard"),
            *(("data", folder) for folder in folders)]
    return "\n".join(f"{name:<12} {path}" for name, path in rows)
