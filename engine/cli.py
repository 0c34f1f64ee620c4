"""`mainspring <command> …`: one entry for everything that is not started by torchrun."""

from __future__ import annotations

import importlib
import sys

import engine
from engine.errors import UserError
from engine.runtime import command

# name: (module with main(argv) -> exit code, one line for --help); imported only when called, for start-up time.
COMMANDS = {
    "prepare": ("engine.data.prepare", "raw files -> tokenizer, .bin/.idx, manifest"),
    "train-tokenizer": ("engine.data.train_tokenizer", "text -> BPE or unigram, tokenizer.json or SentencePiece's"),
    "merge-data": ("engine.data.merge_data", "prepared directories of one tokenizer -> one, without copying tokens"),
    "export-data": ("engine.data.export_data", "prepared data -> Arrow, for datasets.load_from_disk"),
    "code-tasks": ("engine.data.code_tasks", "Python source -> instruction examples and preference pairs (JSONL)"),
    "pretrain": ("engine.pretrain", "train a model, or resume (several processes: torchrun -m engine.pretrain)"),
    "midtrain": ("engine.midtrain", "go on from a checkpoint's weights with a fresh schedule and another blend"),
    "sft": ("engine.sft", "fine-tune on instructions and conversations, loss on the answers alone"),
    "dpo": ("engine.dpo", "learn from pairs of answers: DPO, cDPO, robust DPO, IPO"),
    "lora": ("engine.lora", "low-rank adapters beside frozen weights; QLoRA with lora.base nf4"),
    "import": ("engine.import_model", "a Hugging Face model as a checkpoint of the engine"),
    "export": ("engine.export_model", "a checkpoint for Transformers, PEFT or llama.cpp, compared with what it was"),
    "evaluate": ("engine.evaluate", "perplexity, token accuracy and speed of a checkpoint on held-out data"),
    "generate": ("engine.generate", "text from a checkpoint"),
    "answer": ("engine.answer", "a model's answers to prompts: refusal rate, and other shares that gates read"),
    "pipeline": ("engine.pipeline", "the whole chain, stage by stage, with promotion gates and a report"),
    "verify-layout": ("engine.verify_layout", "a parallel layout against one rank: losses, every gradient, weights"),
    "report": ("engine.report", "a run against unigram and bigram models, with a plot of its losses"),
}


def usage() -> str:
    """The text of `mainspring --help`."""
    lines = [f"  {name:<15} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: mainspring <command> [--config FILE] [--field value …] [--help] [--debug]", "",
                      *lines, "", "`mainspring <command> --help` lists every field with its default and unit."])


def run(argv: list[str]) -> int:
    """Runs one command. Raises ``UserError`` for a command that does not exist."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"mainspring {engine.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(argv[0], COMMANDS, n=1)
        raise UserError(f"there is no command {argv[0]!r}", where="mainspring",
                        fix=f"Did you mean {near[0]}?" if near else f"There are: {', '.join(COMMANDS)}")
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:])


def main() -> None:
    """The console script's entry point."""
    sys.exit(command(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
