"""Our Triton kernels on the GPU: right, and how fast beside torch eager, torch.compile, Liger, QuACK and others.

    python benchmarks/run.py kernels_gpu [--seconds 240] [--ops swiglu ...] [--json FILE]
    python benchmarks/run.py kernels_gpu --scale tiny --device cpu        (Triton's interpreter: proves the suite)

For each case of ``benchmarks/cases``: values and gradients of ours against fp64 (``error``: norm of the difference over
the norm, the worst tensor; memory that nobody wrote is NaN), then forward (without gradients), backward, and both
(forward that keeps what backward needs, and backward) in turns with every other implementation, in one process, as
``benchmarks/timing.py`` says; ms are medians. ``GB/s`` counts the bytes that no implementation avoids, ``% copy`` is
their rate over that of a copy measured in the same process; where arithmetic takes longer, ``TFLOP/s`` and ``% matmul``
(of an 8192³ product in the same process) are what counts. ``floor ms``: by the GPU's data sheet. ``x NAME``: its time
over ours. ``spread %``: of our samples, from the first to the third quarter.

The largest case of each op comes first, then the second largest, and so on until ``--seconds`` are over: what is left
is said in a row. torch.compile joins in for the first case of each op (``--compile``). An alternative that fails is
noted in its row. A failure of ours makes the exit code 1, after everything ran.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bench_ahead, hardware
from benchmarks.cases import Case, cases_that_import
from benchmarks.harness import Row
from benchmarks.workers.protocol import Worker, WorkerError

PARTS = {"forward": ("forward",), "backward": ("backward",), "both": ("training forward", "backward")}


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--ops", nargs="+", default=(), help="only files of cases that begin so")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full", help="tiny: for the interpreter")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=240.0, help="when to stop")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="after which a case is given up")
    parser.add_argument("--samples", type=int, default=25)
    parser.add_argument("--compile", choices=["first", "all", "none"], default="first", help="of which cases of an op "
                        "torch.compile takes part")


@dataclass(frozen=True)
class Job:
    """A case and where it is from."""

    file: str
    case: Case
    first: bool  # of its op

    def request(self, compiled: str, without: list[str]) -> dict[str, Any]:
        return {"file": self.file, "op": self.case.op, "size": self.case.size, "without": without,
                "compile": compiled == "all" or (compiled == "first" and self.first)}


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for the machine's rates, then one for each case and part; each is printed in short as it comes."""
    started = time.monotonic()
    files, broken = cases_that_import(options.scale, options.ops)
    for file, error in broken.items():
        yield Row(file, {}, failed=error)
    waiting, bench = jobs(files), Bench(options)
    with tempfile.TemporaryDirectory(prefix="bench_kernels_") as folder:
        bench.progress = Path(folder) / "progress"
        try:
            yield machine_row(bench.start(), options.scale)
            while waiting and (left := options.seconds - (time.monotonic() - started)) > 0:
                for row in bench.rows(waiting.pop(0), min(left, options.case_seconds)):
                    print(_short(row), flush=True)
                    yield row
        except WorkerError as error:  # of a worker that did not get ready
            yield Row("machine", {}, failed=str(error))
        finally:
            bench.close()
    if waiting:
        names = ", ".join(f"{job.case.op} {job.case.size}" for job in waiting)
        yield Row("not measured", {"note": f"{len(waiting)} cases, {options.seconds:.0f} s were over: {names}"})


def _short(row: Row) -> str:
    shown = {key: value for key, value in row.values.items()
             if value is not None and (key in ("ms", "% copy", "% matmul", "error") or key.startswith("x "))}
    return f"{row.name}: " + ", ".join(f"{key} {value:.3g}" for key, value in shown.items()) + (
        f"  FAILED {row.failed}" if row.failed else "")


def jobs(files: dict[str, list[Case]]) -> list[Job]:
    """The largest case of each op, then the second largest of each, and so on."""
    by_op: dict[str, list[tuple[str, Case]]] = {}
    for file, members in files.items():
        for case in members:
            by_op.setdefault(case.op, []).append((file, case))
    ranked = []
    for number, members in enumerate(by_op.values()):
        members.sort(key=lambda member: -_size(member[1]))
        ranked += [(rank, number, Job(file, case, rank == 0)) for rank, (file, case) in enumerate(members)]
    return [job for _, _, job in sorted(ranked, key=lambda entry: entry[:2])]


def _size(case: Case) -> float:
    return hardware.H200.floor_seconds(case.forward_bytes, case.forward_flops)


class Bench:
    """The worker of the moment; another takes its place when a kernel kills it."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, _device(options.device)
        self.progress = Path()
        self.worker: Worker | None = None

    def rows(self, job: Job, seconds: float) -> Iterator[Row]:
        """Of one case: at most three tries, each without what broke the one before."""
        failed: dict[str, str] = {}
        answer: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        for _ in range(3):
            facts = self.start()
            assert self.worker is not None
            self.progress.write_text("")
            try:
                answer = self.worker.ask(job.request(self.options.compile, [*failed]), seconds)
            except WorkerError as error:
                answer = {"lost": True, "failed": {self.progress.read_text() or "ours": str(error)[-600:]}}
            failed |= answer["failed"]
            if not answer["lost"]:
                break
            self.close()
            if "ours" in failed:
                break
        yield from case_rows(job.case, answer | {"failed": failed}, facts)

    def start(self) -> dict[str, Any]:
        """What the worker found of the machine; a new one if there is none. Raises WorkerError if it cannot start."""
        if self.worker is None:
            o = self.options
            threads = o.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
            config = {"device": self.device, "threads": threads, "scale": o.scale, "samples": o.samples,
                      "seconds": 2.0, "progress": str(self.progress)}
            self.worker = Worker("kernels", "benchmarks.workers.kernels_worker", config, threads=threads, seconds=90.0)
        return self.worker.facts

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def machine_row(facts: dict[str, Any], scale: str) -> Row:
    """What shares refer to."""
    size = "8192" if scale == "full" else "64"
    fp8 = f"; fp8 product {facts['fp8'] / 1e12:.0f} TFLOP/s" if facts["fp8"] else ""
    return Row(f"a copy, a bf16 product of {size}³", {
        "GB/s": facts["copy"] / 1e9, "% copy": 100.0, "TFLOP/s": facts["bf16"] / 1e12, "% matmul": 100.0,
        "note": facts["device"] + fp8})


def case_rows(case: Case, answer: dict[str, Any], facts: dict[str, Any]) -> Iterator[Row]:
    """What came of a case: a row for each part; one that failed, if ours did not run at all."""
    name = f"{case.op} {case.size}"
    others = "; ".join(f"{other}: {why}" for other, why in answer["failed"].items() if other != "ours")
    problem = answer["failed"].get("ours") or answer.get("problem", "")
    times = answer.get("times", {})
    if "ours" not in times:
        yield Row(name, {"error": answer.get("error"), "note": others or None}, failed=problem or "was not measured")
        return
    first = True
    for part in PARTS:
        if any(piece not in times["ours"] for piece in PARTS[part]):
            continue
        row = _part_row(case, part, times, answer, facts)
        if first:
            row.values |= {"error": answer["error"], "note": others or None}
            row.failed = problem
        first = False
        yield row


def _part_row(case: Case, part: str, times: dict[str, dict[str, list[float]]], answer: dict[str, Any], facts: dict
              ) -> Row:
    samples = {name: [sum(pieces) for pieces in zip(*(of_part[piece] for piece in PARTS[part]), strict=True)]
               for name, of_part in times.items()}
    seconds = {name: statistics.median(found) for name, found in samples.items()}
    moved, flops = _work(case, part)
    mine, arithmetic = seconds["ours"], bench_ahead.arithmetic_of(case)
    peaks, product = hardware.peaks(facts["device"]), facts["fp8" if arithmetic == "fp8" else "bf16"]
    values: dict[str, Any] = {"ms": 1e3 * mine, "GB/s": moved / mine / 1e9,
                              "% copy": 100 * moved / mine / facts["copy"], "TFLOP/s": flops / mine / 1e12,
                              "% matmul": 100 * flops / mine / product if product else None,
                              "floor ms": 1e3 * peaks.floor_seconds(moved, flops, arithmetic) if peaks else None}
    values |= {f"x {name}": other / mine for name, other in seconds.items() if name != "ours"}
    quarters = statistics.quantiles(samples["ours"], n=4)
    called = [name for name, method in answer["methods"].items() if method == "calls"]
    values |= {"spread %": 100 * (quarters[2] - quarters[0]) / mine, "not a graph": ", ".join(called) or None}
    return Row(f"{case.op} {case.size} {part}", values, compare="ms", higher_is_better=False)


def _work(case: Case, part: str) -> tuple[float, float]:
    """Bytes and FLOPs of a part."""
    forward, backward = ((case.forward_bytes, case.forward_flops),
                         (case.backward_bytes or 0.0, case.backward_flops or 0.0))
    return {"forward": forward, "backward": backward,
            "both": (forward[0] + backward[0], forward[1] + backward[1])}[part]


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
