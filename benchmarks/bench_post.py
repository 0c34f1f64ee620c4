"""SFT and DPO beside TRL's trainers: the same model, weights, examples, chat template and precision, in one run.

A step of each side is what its users run: TRL's trainer with its own data loader (padding to a batch's longest
example), the engine's step on packed rows. What is compared is examples a second, since rows and batches hold different
numbers of them; ``examples`` are those of one step, chosen alike. Each side is a process that is idle unless it is its
turn. Sides: ``engine``; ``engine unpacked``; ``trl``; for SFT also ``trl packing``, whose packed examples see each
other on attention kernels other than flash-attn, which TRL warns of: another loss, so a lead and no comparison.

TRL logs a step's loss after it is over, so its first loss is not known here and its last is that of the step before.

DPO: TRL computes the reference's log-probabilities in each step (``precompute_ref_log_probs=False``, its default); the
engine once for the whole dataset. ``x with reference`` counts those seconds as if the run were one epoch.

Data: functions of Python's standard library by their docstrings, and corrupted ones (``mainspring code-tasks``).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, median_ratio
from benchmarks.workers.protocol import Worker, interleave

WARMUP_STEPS = 2
SOURCE = Path(sysconfig.get_path("stdlib"))
MODELS = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "demo": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 4096},
}
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
          " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--task", choices=["sft", "dpo", "both"], default="both")
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--precision", default="fp32,bf16", help="some of fp32,bf16 (TRL: fp32 weights under autocast)")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a step of TRL's")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="of them, how many at once")
    parser.add_argument("--sides", help="some of engine,engine unpacked,trl,trl packing (all that apply)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-round", type=int, default=2)
    parser.add_argument("--max-examples", type=int, default=2000)


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Trains all sides of each task and precision, and yields a row for each side."""
    tasks = ["sft", "dpo"] if options.task == "both" else [options.task]
    with tempfile.TemporaryDirectory(prefix="bench_post_") as name:
        folder = Path(name)
        prepare(folder, options)
        for task in tasks:
            for precision in options.precision.split(","):
                yield from _task(task, precision, folder, options)


# --- what is run -----------------------------------------------------------------------------------------------------

def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Examples as JSONL in the fields that both sides read, and a Hugging Face directory with random weights."""
    from engine.config.code_tasks import CodeTasksConfig
    from engine.data.code_tasks import code_tasks

    code_tasks(CodeTasksConfig(input=[SOURCE], output=folder / "tasks",
                               exclude=["site-packages", "dist-packages", "test", "tests", "idlelib"]))
    texts, rows_of = [], {}
    for task, fields in (("sft", ("instruction", "response")), ("dpo", ("prompt", "chosen", "rejected"))):
        lines = (folder / f"tasks/{task}/train.jsonl").read_text(encoding="utf-8").splitlines()
        found = [{name: json.loads(line)[name] for name in fields} for line in lines]
        texts += [text for row in found for text in row.values()]
        rows_of[task] = [_messages(row) for row in found]
    _write_model(folder / "model", texts, options)
    length = _lengths(folder / "model")
    for task, rows in rows_of.items():  # what fits on both sides whole: TRL would cut the rest, the engine leave it out
        fitting = itertools.islice((row for row in rows if length(row) < options.seq_length), options.max_examples)
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fitting), encoding="utf-8")


def _messages(row: dict[str, str]) -> dict[str, Any]:
    """Conversations: ``messages`` for the engine, ``prompt`` and ``completion`` for TRL's SFT, a pair for both."""
    question = [{"role": "user", "content": row.get("instruction", row.get("prompt"))}]
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("response", "chosen", "rejected")
               if name in row}
    if "response" in answers:
        return {"messages": question + answers["response"], "prompt": question, "completion": answers["response"]}
    return {"prompt": question, **answers}


def _write_model(folder: Path, texts: list[str], options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from engine.data.tokenizer import train_tokenizer

    shape: dict[str, Any] = MODELS[options.model]
    train_tokenizer(texts, shape["vocab_size"], eod_token="<|im_end|>").save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1234)
    settings: dict[str, Any] = shape | {"vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=options.seq_length,
                                 tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                                 pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)


def worker_config(task: str, precision: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What every worker gets. A side changes some of it."""
    steps = 1 + WARMUP_STEPS + options.rounds * options.steps_per_round
    return {"task": task, "precision": "autocast" if precision == "bf16" else "fp32", "device": "cpu",
            "model_dir": str(folder / "model"), "data": str(folder / f"{task}.jsonl"),
            "fields": ["prompt", "completion"] if task == "sft" else ["prompt", "chosen", "rejected"],
            "format": "messages" if task == "sft" else "preference", "seq_length": options.seq_length,
            "batch_size": options.batch_size, "micro_batch_size": options.micro_batch_size, "packing": False,
            "rows": 1, "max_steps": steps + 10, "lr": 1e-4 if task == "sft" else 5e-6, "weight_decay": 0.0,
            "clip_grad": 1.0, "beta": 0.1, "seed": 1234, "threads": options.threads or 2}


def _sides(task: str, plan: dict[str, Any], folder: Path, wanted: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, worker, what it changes). The engine's rows a step hold about as many examples as TRL's batch."""
    rows = max(1, round(plan["batch_size"] / _examples_a_row(plan)))
    sides = [("engine", "post_worker", {"packing": True, "rows": rows}), ("engine unpacked", "post_worker", {}),
             ("trl", "trl_worker", {})]
    if task == "sft":
        sides.append(("trl packing", "trl_worker", {"packing": True, "batch_size": rows, "micro_batch_size": 1}))
    return [(name, f"benchmarks.workers.{module}", changes | {"scratch": str(folder / "scratch" / name)})
            for name, module, changes in sides if wanted is None or name in wanted.split(",")]


def _lengths(model: Path) -> Callable[[dict], int]:
    """A function of an example: its tokens by the chat template, of a pair those of prompt and both answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(messages: list[dict]) -> int:
        return len(tokenizer.apply_chat_template(messages)["input_ids"])

    return lambda row: count(row["messages"]) if "messages" in row else (
        count(row["prompt"] + row["chosen"]) + count(row["rejected"]))


def _examples_a_row(plan: dict[str, Any]) -> float:
    """Of the packed data, by the tokenizer's own count."""
    length = _lengths(plan["model_dir"])
    rows = [json.loads(line) for line in Path(plan["data"]).read_text(encoding="utf-8").splitlines()]
    return plan["seq_length"] / statistics.mean(map(length, rows))


def _task(task: str, precision: str, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    plan = worker_config(task, precision, folder, options)
    with contextlib.ExitStack() as stack:
        workers, first = [], {}
        for name, module, changes in _sides(task, plan, folder / f"{task}_{precision}", options.sides):
            worker = Worker(name, module, plan | changes, threads=plan["threads"])
            stack.callback(worker.close)
            first[name] = worker.run(1)["losses"][0]
            worker.run(WARMUP_STEPS)
            worker.reset_memory()
            workers.append(worker)
        answers, idle = interleave(workers, options.rounds, options.steps_per_round)
        for worker in workers:
            yield _row(f"{task} {precision}", worker, workers, answers, first[worker.name], idle[worker.name])


# --- what came of it -------------------------------------------------------------------------------------------------

def _per_example(worker: Worker, rounds: list[dict], *, reference: bool = False) -> list[float]:
    """Seconds an example, of each round; with the seconds that scoring it with the reference took."""
    scoring = worker.facts.get("reference_seconds_per_example", 0.0) if reference else 0.0
    examples = worker.facts["examples_per_step"]
    return [answer["seconds"] / (len(answer["losses"]) * examples) + scoring for answer in rounds]


def _row(task: str, worker: Worker, workers: list[Worker], answers: dict[str, list[dict]], first_loss: float,
         idle: float) -> Row:
    """One line of the table. A ratio is the median of the rounds' ratios of seconds an example."""
    mine = answers[worker.name]
    seconds = _per_example(worker, mine)
    values: dict[str, Any] = {"examples/s": 1 / statistics.median(seconds)}
    for other in workers:
        if other.name.startswith("trl"):
            theirs = _per_example(other, answers[other.name])
            values[f"x {other.name}"] = median_ratio(theirs, seconds)
            if "reference_seconds_per_example" in worker.facts:
                values["x trl with reference"] = median_ratio(theirs, _per_example(worker, mine, reference=True))
    values |= {"tokens/s": worker.facts["tokens_per_step"] / (statistics.median(seconds)
                                                              * worker.facts["examples_per_step"]),
               "examples a step": worker.facts["examples_per_step"],
               "fill %": 100 * worker.facts.get("fill", 0) or None,
               "memory GB": max(answer["memory_gb"] for answer in mine),
               "first loss": first_loss if math.isfinite(first_loss) else None,
               "last loss": mine[-1]["losses"][-1], "start-up s": worker.startup_seconds, "idle CPU %": 100 * idle,
               "M parameters": worker.facts["parameters"] / 1e6}
    return Row(f"{task} {worker.name}", values, compare="examples/s")
