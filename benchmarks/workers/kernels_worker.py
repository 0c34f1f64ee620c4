"""bench_kernels_gpu's process: checks and times one case a request.

A kernel that reads where it must not takes the CUDA context with it, so the parent starts another worker then; which
implementation was at work is in the file ``progress``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.workers.protocol import Handle, serve_requests


def start(config: dict) -> tuple[Handle, dict]:
    """``config``: device, threads, scale, samples, seconds (a slow implementation's share), progress.

    Facts: what the machine's copies and matrix products reach. Requests: {"file", "op", "size", "compile", "without"};
    answers: see ``measure``.
    """
    import torch

    from benchmarks import timing
    from benchmarks.cases import cases_of

    torch.set_num_threads(config["threads"])
    device = torch.device(config["device"])
    full = config["scale"] == "full"
    size = 8192 if full else 64
    facts = {"copy": timing.copy_rate(device, 2**30 if full else 2**16), "bf16": timing.matmul_rate(device, size),
             "fp8": timing.fp8_matmul_rate(device, size),
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    known: dict[str, list] = {}

    def handle(request: dict) -> dict:
        name = request["file"]
        if name not in known:
            known[name] = cases_of(name, config["scale"])
        case = next(case for case in known[name] if (case.op, case.size) == (request["op"], request["size"]))
        return measure(case, device, request, config)

    return handle, facts


def measure(case: Any, device: Any, request: dict, config: dict) -> dict:
    """{"error", "where", "problem" (ours, against fp64), "times": {implementation: {part: [seconds of a run]}},
    "failed": {implementation: why}, "methods": {implementation: "graph" or "calls"}, "lost": the device is gone}."""
    import gc

    import torch

    from benchmarks import correctness, timing
    from benchmarks.cases import Random

    answer: dict[str, Any] = {"error": None, "where": "", "problem": "", "times": {}, "failed": {}, "methods": {},
                              "lost": False}
    progress = Path(config["progress"])
    progress.write_text("ours")
    try:
        found = correctness.check(case, Random(device))
        answer |= {"error": found.error if found.error == found.error else None, "where": found.where,
                   "problem": found.problem}
        sets = timing.argument_sets(case, device)
        prepared: dict[str, timing.Prepared] = {}
        for name, run in implementations(case, request).items():
            progress.write_text(name)
            try:
                prepared[name] = timing.prepare(run, sets, backward=case.backward_bytes is not None, device=device)
            except Exception as error:
                answer["failed"][name] = described(error)
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises if the device is lost
                    torch.cuda.empty_cache()
        progress.write_text("")
        answer["times"] = timing.interleaved(prepared, device, config["samples"], config["seconds"])
        answer["methods"] = {name: one.method for name, one in prepared.items()}
        prepared.clear()
        sets.clear()
    except Exception as error:
        culprit = progress.read_text() or "ours"
        answer["failed"][culprit] = described(error)
        answer["problem"] = answer["problem"] or (described(error) if culprit == "ours" else "")
        answer["lost"] = is_lost(device)
    if device.type == "cuda" and not answer["lost"]:
        gc.collect()
        torch.cuda.empty_cache()
    return answer


def implementations(case: Any, request: dict) -> dict[str, Any]:
    """Ours first, the others by name, and eager compiled where it is asked for."""
    import torch

    runs = {"ours": case.runs["ours"]} | dict(case.runs)
    if request["compile"] and "eager" in runs:
        torch._dynamo.reset()  # cases share functions: after some recompilations dynamo would leave them as they are
        runs["compile"] = torch.compile(case.runs["eager"], dynamic=False)
    return {name: run for name, run in runs.items() if name not in request["without"]}


def is_lost(device: Any) -> bool:
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError:  # as CUDA's errors are: the caller starts another process
        return True
    return False


def described(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


if __name__ == "__main__":
    serve_requests(start)
