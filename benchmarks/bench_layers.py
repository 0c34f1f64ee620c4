"""What Megatron and the CPU adaptor cost: the engine's training step over the same layers called directly.

    python benchmarks/run.py layers [--json FILE] [--threads 1] [--layers-rounds 15]

``engine`` is the step as the demo runs it: Megatron's GPT on the engine's layers, its schedule, gradient buffers and
optimizer, on a CPU through the adaptor. ``direct`` is one function that calls the same kernels on the same weights, in
a plain loop with the same sums of gradients, clipping and fused AdamW (benchmarks/workers/direct_worker.py). A check in
a process of its own first finds the same losses, gradients, and weights after three steps on both.

Both keep freed memory, as every command of the engine does: page faults would drown the difference. The two are
processes that take turns; a ratio is the median of the rounds' own ratios. ``CPU`` is processor time of all threads,
which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bench_train
from benchmarks.harness import Row, median_ratio
from benchmarks.workers.protocol import Worker, interleave

PRECISIONS = ("fp32", "bf16")
SIDES = {"engine": "benchmarks.workers.engine_worker", "direct": "benchmarks.workers.direct_worker"}


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--layers-model", choices=bench_train.MODELS, default="demo")
    parser.add_argument("--layers-precision", choices=[*PRECISIONS, "all"], default="all")
    parser.add_argument("--layers-rounds", type=int, default=15)
    parser.add_argument("--layers-steps", type=int, default=3, help="steps in a round")


def run(options: argparse.Namespace) -> list[Row]:
    """Compares both sides, then times them. -> a row for each precision. A side that differs is a WorkerError."""
    plan = _plan(options)
    wanted = PRECISIONS if options.layers_precision == "all" else (options.layers_precision,)
    with tempfile.TemporaryDirectory(prefix="bench_layers_") as folder:
        plan["tokens"] = str(bench_train._write_tokens(Path(folder) / "tokens.npy", plan))
        return [_row(plan | {"precision": precision}, options, Path(folder)) for precision in wanted]


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """What every worker gets."""
    plan = bench_train.worker_config(argparse.Namespace(
        model=options.layers_model, rounds=options.layers_rounds, steps_per_round=options.layers_steps,
        threads=options.threads, device="cpu", seq_length=None, global_batch_size=None, micro_batch_size=None))
    return plan | {"keep_memory": True}


def _row(plan: dict[str, Any], options: argparse.Namespace, folder: Path) -> Row:
    """One precision: check, warm-up, rounds."""
    weights, threads = str(folder / f"{plan['precision']}.safetensors"), plan["threads"]
    check = Worker("comparison", "benchmarks.workers.layers_check_worker", plan | {"save_weights": weights},
                   threads=threads)
    check.close()
    with contextlib.ExitStack() as stack:
        workers, first = [], {}
        for side, module in SIDES.items():
            worker = Worker(side, module, plan | {"load_weights": weights if side == "direct" else None},
                            threads=threads)
            stack.callback(worker.close)
            workers.append(worker)
            first[side] = worker.run(1 + bench_train.WARMUP_STEPS)["losses"]
        answers, idle = interleave(workers, options.layers_rounds, options.layers_steps)
    steps = options.layers_steps
    cpu, clock = ({side: [answer[key] / steps for answer in answers[side]] for side in SIDES}
                  for key in ("cpu_seconds", "seconds"))
    values: dict[str, Any] = {"engine / direct CPU": median_ratio(cpu["engine"], cpu["direct"]),
              "engine / direct time": median_ratio(clock["engine"], clock["direct"])}
    for side in SIDES:
        values |= {f"{side} CPU s/step": statistics.median(cpu[side]), f"{side} s/step": statistics.median(clock[side]),
                   f"{side} first loss": first[side][0], f"{side} idle CPU %": 100 * idle[side]}
    values |= {name: check.facts[name] for name in ("loss error", "gradient error", "weight error")}
    return Row(f"{plan['model']} {plan['precision']}", values, compare="engine / direct CPU", higher_is_better=False)
