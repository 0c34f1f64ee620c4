"""What Megatron and the CPU adaptor cost: the engine's training step over the same layers called directly.

    python benchmarks/run.py layers [--json FILE] [--threads 1] [--layers-rounds 30]

``engine`` is the step as the demo runs it: Megatron's GPT on the engine's layers, its schedule, gradient buffers and
optimizer, on a CPU through the adaptor. ``direct`` is one function that calls the same kernels on the same weights, in
a plain loop with the same sums of gradients, clipping and fused AdamW (benchmarks/workers/direct.py). Both keep freed
memory, as every command of the engine does.

A process holds both sides. It first finds the same losses, gradients, and weights after three steps on both, then runs
their steps in turns, so that what else the machine does hits both; a ratio is the median of the turns' own ratios.
Where tensors come to lie differs between processes and is worth 1%, so there are several. ``CPU`` is processor time of
all threads, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bench_train
from benchmarks.harness import Row, median_ratio
from benchmarks.workers.protocol import Worker

PRECISIONS = ("fp32", "bf16")
SIDES = ("engine", "direct")


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--layers-model", choices=bench_train.MODELS, default="demo")
    parser.add_argument("--layers-precision", choices=[*PRECISIONS, "all"], default="all")
    parser.add_argument("--layers-processes", type=int, default=3, help="one after the other")
    parser.add_argument("--layers-rounds", type=int, default=30, help="steps of each side in a process")


def run(options: argparse.Namespace) -> list[Row]:
    """Compares both sides and times them. -> a row for each precision. Sides that differ are a WorkerError."""
    plan = worker_config(options)
    wanted = PRECISIONS if options.layers_precision == "all" else (options.layers_precision,)
    with tempfile.TemporaryDirectory(prefix="bench_layers_") as folder:
        plan["tokens"] = str(bench_train._write_tokens(Path(folder) / "tokens.npy", plan))
        return [_row(plan | {"precision": precision}, options.layers_processes) for precision in wanted]


def worker_config(options: argparse.Namespace) -> dict[str, Any]:
    """What a worker gets: bench_train's plan for this model, and the rounds."""
    plan = bench_train.worker_config(argparse.Namespace(
        model=options.layers_model, rounds=options.layers_rounds, steps_per_round=1, threads=options.threads,
        device="cpu", weights="shared", seq_length=None, global_batch_size=None, micro_batch_size=None))
    return plan | {"rounds": options.layers_rounds}


def _row(plan: dict[str, Any], processes: int) -> Row:
    """One precision."""
    facts = []
    for number in range(processes):
        worker = Worker(f"layers {number}", "benchmarks.workers.layers_worker", plan, threads=plan["threads"])
        worker.close()
        facts.append(worker.facts)
    cpu, clock = ({side: [seconds for fact in facts for seconds in fact[side][key]] for side in SIDES}
                  for key in ("cpu_seconds", "seconds"))
    values: dict[str, Any] = {"engine / direct CPU": median_ratio(cpu["engine"], cpu["direct"]),
                              "engine / direct time": median_ratio(clock["engine"], clock["direct"])}
    for side in SIDES:
        values |= {f"{side} CPU s/step": statistics.median(cpu[side]), f"{side} s/step": statistics.median(clock[side])}
    values |= {f"{what} error": max(fact[f"{what} error"] for fact in facts) for what in ("loss", "gradient", "weight")}
    return Row(f"{plan['model']} {plan['precision']}", values, compare="engine / direct CPU", higher_is_better=False)
