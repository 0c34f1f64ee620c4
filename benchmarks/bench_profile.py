"""Where the time of one engine step goes: kernels by kind, largest first, and what the GPU waits for.

    python benchmarks/run.py profile [--profile-model 1b] [--profile-precision bf16,fp8]

The step is bench_train's. On a GPU: time of the kernels on the GPU (torch.profiler, CUPTI), and ``idle``, what a step
takes without the profiler beyond the time in which any kernel ran. On a CPU: time of the ops, without those they call.
A kind is told by the kernel's name (benchmarks/workers/profile_worker.py); ``what`` names the largest of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import bench_train
from benchmarks.harness import Row
from benchmarks.workers.protocol import Worker, WorkerError


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--profile-model", choices=bench_train.MODELS, default="1b")
    parser.add_argument("--profile-precision", default="bf16", help="one or more of fp32,bf16,fp8")
    parser.add_argument("--profile-steps", type=int, default=3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Rows for each precision: the step, each kind of kernel, and the kernels that take longest."""
    plan = bench_train.worker_config(argparse.Namespace(
        model=options.profile_model, rounds=2 + 2 * options.profile_steps, steps_per_round=1, threads=options.threads,
        device=options.device, weights="own", seq_length=None, global_batch_size=None, micro_batch_size=None))
    with tempfile.TemporaryDirectory(prefix="bench_profile_") as folder:
        plan |= {"tokens": str(bench_train._write_tokens(Path(folder) / "tokens.npy", plan)),
                 "steps": options.profile_steps}
        # A cache of its own: kernels get other names there, which a cached one would not have.
        cache = {"TRITON_CACHE_DIR": str(Path(folder) / "triton")}
        for precision in options.profile_precision.split(","):
            yield from _rows(plan | {"precision": precision}, cache)


def _rows(plan: dict[str, Any], environment: dict[str, str]) -> Iterator[Row]:
    name = f"{plan['model']} {plan['precision']}"
    try:
        worker = Worker(f"profile {name}", "benchmarks.workers.profile_worker", plan, threads=plan["threads"],
                        seconds=300.0, environment=environment)
    except WorkerError as error:
        yield Row(name, {}, failed=str(error)[-3000:])
        return
    worker.close()
    facts = worker.facts
    step = facts["step_seconds"]
    yield Row(f"{name} step", {"ms": 1e3 * step, "%": 100.0}, compare="ms", higher_is_better=False)
    for kind, seconds in sorted(facts["kinds"].items(), key=lambda item: -item[1]):
        largest = [kernel["name"][:60] for kernel in facts["kernels"] if kernel["kind"] == kind][:1]
        yield Row(f"{name} {kind}", {"ms": 1e3 * seconds, "%": 100 * seconds / step, "what": (largest or [None])[0]})
    for number, kernel in enumerate(facts["kernels"][:15], 1):
        yield Row(f"{name} kernel {number}", {"ms": 1e3 * kernel["seconds"], "%": 100 * kernel["seconds"] / step,
                                              "calls": kernel["calls"], "what": kernel["name"][:100]})
