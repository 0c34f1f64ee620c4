"""bench_profile's process: the engine's step under torch.profiler, its kernels' time by kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.workers.protocol import Step, serve

# The first pattern that is found in a kernel's (on a CPU: an op's) name decides.
KINDS = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|sendrecv|gloo|c10d"),
    ("attention", r"flash|fmha|sdpa|attn|attention|flex"),
    ("optimizer", r"adam|multi_tensor|foreach|muon|norm_?two|l2norm|clip|vector_norm"),
    ("loss", r"cross_entropy|nll|softmax"),
    ("fp8 quantisation", r"quanti[sz]e|amax|fp8_"),
    ("norm", r"rms_?norm|layer_?norm"),
    ("rotary", r"rotary|rope"),
    ("activation", r"swiglu|silu|geglu|gelu"),
    ("embedding", r"embedding|index_?select"),
    ("routing", r"moe|topk|permute_|router|sort|scatter|gather"),
    ("GEMM", r"gemm|cutlass|cublas|nvjet|matmul|addmm|\bmm\b|\bbmm\b|linear|scaled_mm|mkl|splitk"),
    ("copies", r"memcpy|memset|copy|fill|zero|cat|contiguous|clone"),
    ("elementwise", r"elementwise|add|mul|div|sub|sum|reduce|triton"),
)


def kind_of(name: str) -> str:
    """What a kernel does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), "other")


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarise(events: Sequence[tuple[str, float, float]], step_seconds: float, steps: int) -> dict[str, Any]:
    """``events``: (name, start, end) in seconds, of ``steps`` steps. -> seconds a step by kind and by kernel.

    ``idle`` is what a step takes (measured without the profiler) beyond the time in which anything ran.
    """
    kinds: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for name, start, end in events:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + (end - start) / steps
        entry = kernels.setdefault(name, [0.0, 0.0])
        entry[0] += (end - start) / steps
        entry[1] += 1 / steps
    busy = busy_seconds((start, end) for _, start, end in events) / steps
    kinds["idle"] = max(0.0, step_seconds - busy)
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:40]
    return {"step_seconds": step_seconds, "kinds": kinds,
            "kernels": [{"name": name[:160], "kind": kind_of(name), "seconds": seconds, "calls": calls}
                        for name, (seconds, calls) in top]}


def build(config: dict) -> tuple[Step, dict]:
    """``config``: bench_train.worker_config with precision, and ``steps`` to profile after three that warm up."""
    import torch

    from benchmarks.workers import engine_worker

    cuda, steps = config["device"] == "cuda", config["steps"]
    name_kernels_by_file()
    step, _ = engine_worker.start(config)
    _seconds(step, 0, 3)
    seconds = _seconds(step, 3, steps)
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        _seconds(step, 3 + steps, steps)
    events = _kernel_events(profiler) if cuda else _op_events(profiler)
    assert events, "the profiler saw nothing"
    return (lambda index: 0.0), summarise(events, seconds / steps, steps)


def name_kernels_by_file() -> None:
    """Calls our Triton kernels rms_norm_forward_kernel, not _forward_kernel as in every file. Before they are compiled:
    the parent gives this process a cache of its own."""
    import importlib
    from pathlib import Path

    import engine_kernels

    for path in sorted(Path(engine_kernels.__file__ or "").parent.glob("*.py")):
        module = importlib.import_module(f"engine_kernels.{path.stem}")
        for name, kernel in vars(module).items():
            if hasattr(kernel, "repr") and getattr(kernel, "__module__", "") == module.__name__:
                called = f"{path.stem}_{name.lstrip('_')}"
                kernel.repr = lambda _, called=called: called


def _seconds(step: Step, first: int, count: int) -> float:
    """Of ``count`` steps; their losses wait for a GPU."""
    import time

    started = time.perf_counter()
    for index in range(first, first + count):
        float(step(index))
    return time.perf_counter() - started


def _kernel_events(profiler: Any) -> list[tuple[str, float, float]]:
    """What ran on the GPU: kernels, copies and fills."""
    return [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in profiler.events()
            if str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)]


def _op_events(profiler: Any) -> list[tuple[str, float, float]]:
    """On a CPU: each op without those it calls, laid end to end (only their lengths mean something)."""
    found, at = [], 0.0
    for average in profiler.key_averages():
        for _ in range(average.count):
            length = average.self_cpu_time_total / average.count / 1e6
            found.append((average.key, at, at + length))
            at += length
    return found


if __name__ == "__main__":
    serve(build)
