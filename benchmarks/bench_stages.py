"""The engine's stages beside its own pretraining: SFT and DPO on packed rows, LoRA, QLoRA, on one model and machine.

Random tokens, examples of log-normal lengths (a median of 400 tokens), packed into rows of the sequence length; in DPO
both answers are as long, and the prompt is a third of the first. ``x pretrain`` is tokens a second over pretraining's.
Rows hold as many tokens in each stage, so that for SFT it is also MFU over pretraining's, as far as one counts the
causal half of whole rows; of the shorter documents in them attention needs less, of prompts the head nothing. LoRA's
``x pretrain`` may pass 1: frozen weights have no gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import bench_train
from benchmarks.harness import Row, median_ratio
from benchmarks.workers.protocol import Worker, WorkerError, interleave

KINDS = ("pretrain", "sft", "dpo", "lora", "qlora")
WARMUP_STEPS = 2
MEDIAN_LENGTH, SPREAD = 400, 0.7


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--stages-model", choices=bench_train.MODELS, default="demo")
    parser.add_argument("--stages-precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--stages-device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {','.join(KINDS)}")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--stages-rounds", type=int, default=5)
    parser.add_argument("--stages-steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--one-by-one", action="store_true", help="a stage after the other: one model in memory")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each stage; pretraining first, which the others are compared with."""
    plan = _plan(options)
    kinds = [kind for kind in KINDS if kind in options.kinds.split(",")]
    with bench_train._prepared(plan), contextlib.ExitStack() as stack:
        answers: dict[str, list[dict]] = {}
        workers: list[Worker] = []
        for kind in kinds:
            try:
                worker = _start(kind, plan, stack)
                if options.one_by_one:
                    answers[kind] = [worker.run(options.stages_steps) for _ in range(options.stages_rounds)]
                    worker.close()
            except WorkerError as error:
                yield Row(f"{plan['model']} {kind}", {"note": str(error).splitlines()[-1][:300]}, failed=str(error))
                continue
            workers.append(worker)
        if workers and not options.one_by_one:
            answers, _ = interleave(workers, options.stages_rounds, options.stages_steps)
        for worker in workers:
            yield _row(worker, plan, answers)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """bench_train's plan for the model, and the lengths of the examples."""
    import numpy as np

    train = argparse.Namespace(
        model=options.stages_model, device=options.stages_device, weights="own", threads=options.threads,
        seq_length=None, global_batch_size=None, micro_batch_size=None, rounds=options.stages_rounds,
        steps_per_round=options.stages_steps)
    plan = bench_train.worker_config(train)
    rng, longest = np.random.default_rng(plan["seed"]), plan["seq_length"] * 2 // 3
    rows = plan["global_batch_size"] * plan["max_steps"]
    median = min(MEDIAN_LENGTH, plan["seq_length"] // 4)
    count = max(64, rows * plan["seq_length"] // median)
    lengths = np.clip(rng.lognormal(np.log(median), SPREAD, count).astype(int), 8, longest)
    return plan | {"precision": options.stages_precision, "lengths": lengths.tolist(), "rank": options.rank}


def _start(kind: str, plan: dict[str, Any], stack: contextlib.ExitStack) -> Worker:
    worker = Worker(kind, "benchmarks.workers.stages_worker", plan | {"kind": kind}, threads=plan["threads"])
    stack.callback(worker.close)
    worker.run(1 + WARMUP_STEPS)
    worker.reset_memory()
    return worker


def _row(worker: Worker, plan: dict[str, Any], answers: dict[str, list[dict]]) -> Row:
    mine = answers[worker.name]
    tokens = plan["global_batch_size"] * plan["seq_length"]
    seconds = [answer["seconds"] / len(answer["losses"]) for answer in mine]
    values: dict[str, Any] = {"tokens/s": tokens / statistics.median(seconds)}
    if "pretrain" in answers:
        theirs = [answer["seconds"] / len(answer["losses"]) for answer in answers["pretrain"]]
        values["x pretrain"] = median_ratio(theirs, seconds)
    values |= {"memory GB": max(answer["memory_gb"] for answer in mine), "fill %": 100 * worker.facts["fill"],
               "M trained": worker.facts["parameters"] / 1e6}
    return Row(f"{plan['model']} {plan['precision']} {worker.name}", values, compare="tokens/s")
