"""How long implementations of a case take, in turns in one process.

On a GPU each part (forward without gradients, forward with them, backward) is captured as a CUDA graph of several runs
on tensors of their own, which together move about a gigabyte: the level-2 cache (60 MB on an H200) holds nothing that
the next run reads, and the gap before a kernel is paid once. A sample is one replay between two events, queued behind a
kernel that idles, so that the GPU never waits for the host. What cannot be captured is called run by run instead.
On a CPU runs are called and the clock is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Random, Run
from benchmarks.correctness import tensors

Part = Callable[[], None]
PARTS = ("forward", "training forward", "backward")
TRAFFIC = 2**30  # bytes that the runs of one sample move together
MOST_SETS = 16
IDLE_CYCLES = 400_000  # about 0.2 ms: the host needs less to queue a graph and two events


@dataclass
class Prepared:
    """One implementation, ready: each part enqueues ``sets`` runs. ``kept`` holds what graphs read and write."""

    parts: dict[str, Part]
    sets: int
    method: str  # "graph" or "calls"
    kept: Any = None


def sets_of(case: Case, device: torch.device) -> int:
    """Runs in a sample. One is enough for a case whose arithmetic takes far longer than its bytes."""
    if device.type != "cuda":
        return 1
    bound_by_arithmetic = case.forward_flops / 800e12 > 4 * case.forward_bytes / 4.3e12
    wanted = 3e-4 / (case.forward_flops / 800e12) if bound_by_arithmetic else TRAFFIC / case.forward_bytes
    return max(1, min(MOST_SETS, round(wanted)))


def argument_sets(case: Case, device: torch.device) -> list[Sequence[Any]]:
    """Independent arguments, shared by all implementations."""
    return [case.make(Random(device)) for _ in range(sets_of(case, device))]


# --- one implementation ----------------------------------------------------------------------------------------------

class _Runs:
    """Forward and backward of one implementation over all argument sets."""

    def __init__(self, run: Run, sets: Sequence[Sequence[Any]]):
        self.run, self.sets = run, sets
        self.outputs: list[list[Tensor]] = []
        self.kept: list[Any] = []
        self.cotangents: list[list[Tensor]] = []
        self.leaves = [[leaf for leaf in tensors(list(arguments)) if leaf.requires_grad] for arguments in sets]

    def forward(self) -> None:
        with torch.no_grad():
            self.kept = [self.run(*arguments) for arguments in self.sets]

    def training_forward(self) -> None:
        self.outputs = [[out for out in tensors(self.run(*arguments)) if out.requires_grad] for arguments in self.sets]

    def backward(self) -> None:
        self.kept = [torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True) for outputs, leaves, cotangents
                     in zip(self.outputs, self.leaves, self.cotangents, strict=True)]

    def make_cotangents(self) -> None:
        self.cotangents = [[torch.randn_like(out, dtype=torch.float32).to(out.dtype) for out in outputs]
                           for outputs in self.outputs]


def prepare(run: Run, sets: Sequence[Sequence[Any]], *, backward: bool, device: torch.device) -> Prepared:
    """Compiles and tunes whatever the implementation compiles and tunes, and captures it on a GPU."""
    runs = _Runs(run, sets)

    def everything() -> None:
        runs.forward()
        if backward:
            runs.training_forward()
            if not runs.cotangents:
                runs.make_cotangents()
            runs.backward()

    if device.type != "cuda":
        everything()
        return _called(runs, backward)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is captured must have been warmed up on the same stream
        for _ in range(2):
            everything()
        capturable = not _synchronises(everything)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if capturable:
        try:
            return _captured(runs, backward, stream)
        except RuntimeError:  # what cannot be captured is called run by run, and its row's method says so
            torch.cuda.synchronize()  # raises if the device is lost
            everything()
    return _called(runs, backward)


def _synchronises(call: Callable[[], None]) -> bool:
    """Whether it makes the host wait for the GPU, which cannot be captured: a capture that fails leaks its memory."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _called(runs: _Runs, backward: bool) -> Prepared:
    parts: dict[str, Part] = {"forward": runs.forward}
    if backward:
        parts |= {"training forward": runs.training_forward, "backward": runs.backward}
    return Prepared(parts, len(runs.sets), "calls", runs)


def _captured(runs: _Runs, backward: bool, stream: torch.cuda.Stream) -> Prepared:
    """A graph a part. Backward reads what the training forward's graph saved, so both stay alive, in one pool."""
    graphs, kept = {}, []
    runs.outputs, runs.kept = [], []  # autograd's nodes of the warm-up must not become part of what is captured
    steps = [("forward", runs.forward)]
    if backward:
        steps += [("training forward", runs.training_forward), ("backward", runs.backward)]
    pool = torch.cuda.graph_pool_handle()
    for name, step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
        graphs[name] = graph
        kept.append((runs.kept, runs.outputs))
    return Prepared({name: graph.replay for name, graph in graphs.items()}, len(runs.sets), "graph", (kept, graphs))


# --- in turns --------------------------------------------------------------------------------------------------------

def interleaved(prepared: Mapping[str, Prepared], device: torch.device, samples: int, seconds: float
                ) -> dict[str, dict[str, list[float]]]:
    """Seconds a run, by implementation and part: ``samples`` of each, in turns, beginning with another each round.

    An implementation so slow that its samples would take longer than ``seconds`` gets fewer, at least 5.
    """
    found: dict[str, dict[str, list[float]]] = {name: {part: [] for part in prepared[name].parts} for name in prepared}
    sample = _gpu_sample if device.type == "cuda" else _cpu_sample
    wanted = {}
    for name, one in prepared.items():  # the first round is not kept
        took = sum(sample(one)[part] * one.sets for part in one.parts)
        wanted[name] = max(5, min(samples, int(seconds / max(took, 1e-9))))
    names = list(prepared)
    for index in range(samples):
        shift = index % len(names)
        for name in [*names[shift:], *names[:shift]]:
            if index < wanted[name]:
                for part, duration in sample(prepared[name]).items():
                    found[name][part].append(duration)
    return found


def _gpu_sample(one: Prepared) -> dict[str, float]:
    events = []
    for part in one.parts.values():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(IDLE_CYCLES)
        begin.record()
        part()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return {part: begin.elapsed_time(end) / 1e3 / one.sets
            for part, (begin, end) in zip(one.parts, events, strict=True)}


def _cpu_sample(one: Prepared) -> dict[str, float]:
    found = {}
    for name, part in one.parts.items():
        started = time.perf_counter()
        part()
        found[name] = (time.perf_counter() - started) / one.sets
    return found


# --- what the machine can do -----------------------------------------------------------------------------------------

def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes/s read and written by a copy of random numbers, the median of 20."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _median(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a bf16 product of random square matrices, the median of 20."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(lambda: torch.mm(a, b, out=out), device)


def fp8_matmul_rate(device: torch.device, size: int) -> float | None:
    """The same through torch._scaled_mm with one scale a matrix; None, which the table shows as a dash, where this
    processor has none (below compute capability 8.9)."""
    one = torch.ones((), device=device)
    a, b = ((torch.randn(size, size, device=device)).to(torch.float8_e4m3fn) for _ in range(2))
    scaled_mm: Any = torch.ops.aten._scaled_mm
    try:
        return 2 * size**3 / _median(lambda: scaled_mm(a, b.t(), one, one, None, None, torch.bfloat16, True), device)
    except (RuntimeError, NotImplementedError):
        return None


def _median(call: Callable[[], Any], device: torch.device) -> float:
    call()
    prepared = Prepared({"forward": call}, 1, "calls")
    return statistics.median(interleaved({"": prepared}, device, 20, 10.0)[""]["forward"])
