"""One side of a side-by-side measurement is a process that is driven over pipes, and idle unless it is told to run.

The parent writes JSON lines to the worker's stdin: its configuration first, then requests, and an end of file to stop.
The worker answers each with a JSON line. A worker that trains knows {"run": n} for n steps and {"reset": true} to
forget the memory peak so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# step(i) trains on global batch i and returns the batch's loss before the update, a float or a tensor.
Step = Callable[[int], Any]
Handle = Callable[[dict], dict]

ROOT = Path(__file__).resolve().parents[2]
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


# --- in the worker ---------------------------------------------------------------------------------------------------

def serve(build: Callable[[dict], tuple[Step, dict]]) -> None:
    """The main loop of a worker that trains. ``build(config) -> (step, facts)``; the facts go to the parent."""

    def start(config: dict) -> tuple[Handle, dict]:
        step, facts = build(config)
        done = 0

        def handle(request: dict) -> dict:
            nonlocal done
            if "run" not in request:
                _reset_peak_memory()
                return {"reset": True}
            started, cpu = time.perf_counter(), time.process_time()
            losses = [step(done + i) for i in range(request["run"])]
            losses = [float(loss) for loss in losses]  # waits for a GPU, within the time measured
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
            done += request["run"]
            return {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses,
                    "memory_gb": _peak_memory() / 1e9}

        return handle, facts

    serve_requests(start)


def serve_requests(start: Callable[[dict], tuple[Handle, dict]]) -> None:
    """A worker's main loop. ``start(config) -> (handle, facts)``; ``handle(request)`` is the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print to stdout must not end up among the answers

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    handle, facts = start(json.loads(sys.stdin.readline()))
    answer({"ready": True} | facts)
    for line in sys.stdin:
        answer(handle(json.loads(line)))


def _cuda():
    """torch.cuda where it is in use; None otherwise."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _peak_memory() -> float:
    """Bytes: the most that was allocated on the GPU, else the process's resident high-water mark."""
    if cuda := _cuda():
        return cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_memory() -> None:
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from now: compiling is over


# --- in the parent ---------------------------------------------------------------------------------------------------

class WorkerError(RuntimeError):
    """A worker died, or was ended for it took too long; the message ends with what it last wrote to stderr."""


class Worker:
    """A worker process as the parent sees it. Constructed when it is ready, which takes it ``startup_seconds``."""

    def __init__(self, name: str, module: str, config: dict, *, threads: int, seconds: float | None = None,
                 environment: Mapping[str, str] | None = None):
        """``seconds``: how long it may take to be ready. ``environment``: beside this process's."""
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() closes it
        path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]  # wheels brought along
        variables = os.environ | (environment or {}) | {
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(path)}
        if config.get("device") == "cpu":
            # Megatron-core asks torch whether there is a GPU; Triton, when kernels are imported, whether to interpret
            variables |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        else:
            variables.pop("TRITON_INTERPRET", None)
        started = time.perf_counter()
        self._process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=variables, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.facts = self.ask(config, seconds)
        self.startup_seconds = time.perf_counter() - started

    def run(self, steps: int, seconds: float | None = None) -> dict:
        """Trains ``steps`` more global batches. -> {"seconds", "cpu_seconds", "losses", "memory_gb"}."""
        return self.ask({"run": steps}, seconds)

    def reset_memory(self) -> None:
        self.ask({"reset": True})

    def cpu_seconds(self) -> float:
        """Processor time used so far, all threads; 0 where there is no /proc."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
        return 0.0

    def ask(self, request: dict, seconds: float | None = None) -> dict:
        """The worker's answer. Raises WorkerError if it dies, or has not answered after ``seconds`` (None: waits)."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            # At most one answer is under way, so none can lie in the buffer that select does not see.
            ready = seconds is None or select.select([self._answers], [], [], max(seconds, 0.0))[0]
            line = self._answers.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        if line is None:
            self._process.kill()
            what = f"was ended: no answer within {seconds:.0f} s"
        else:
            what = f"ended with exit code {self._process.wait(timeout=60)}"
        self._stderr.seek(0)
        raise WorkerError(f"{self.name} {what}:\n{self._stderr.read()[-3000:].strip()}")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._stderr.close()


def interleave(workers: Sequence[Worker], rounds: int, steps: int) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """``rounds`` times ``steps`` steps of each worker in turn, starting with another one each round.

    -> (each worker's answers, each worker's share of a core while the others ran: about 0, or the result is worthless).
    """
    answers: dict[str, list[dict]] = {worker.name: [] for worker in workers}
    idle_cpu = dict.fromkeys(answers, 0.0)
    idle_time = dict.fromkeys(answers, 0.0)
    for index in range(rounds):
        shift = index % len(workers)
        for worker in [*workers[shift:], *workers[:shift]]:
            others = [other for other in workers if other is not worker]
            time.sleep(0.02)  # OpenMP's threads spin for some milliseconds before they sleep
            before, started = [other.cpu_seconds() for other in others], time.perf_counter()
            answers[worker.name].append(worker.run(steps))
            elapsed = time.perf_counter() - started
            for other, cpu in zip(others, before, strict=True):
                idle_cpu[other.name] += other.cpu_seconds() - cpu
                idle_time[other.name] += elapsed
    return answers, {name: idle_cpu[name] / idle_time[name] if idle_time[name] else 0.0 for name in answers}
