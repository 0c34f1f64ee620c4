"""Starts and watches the ranks: one interpreter imports everything, forks them, and compares what they leave.

    python -m engine.verification.ranks FOLDER

reads FOLDER/plan.json and leaves FOLDER/outcome.json. An interpreter of its own, since a process that has run a
backward pass cannot be forked; imports are 4 s of processor time, paid once for all ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.verification.jobs import Case, Job

_GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
_PR_SET_PDEATHSIG = 1

# rank; error: its traceback; refused: whether that is a ``UserError``'s line; seconds: until all ranks had ended
Failure = dict[str, Any]
Outcome = dict[str, Any]  # case: its name; comparison: see ``compare.compare``, or failure


def compare_all(cases: list[Case]) -> list[Outcome]:
    """Runs the jobs of all cases, each once, and compares. One outcome a case, in order.

    No process outlives the call, whatever ends it.
    """
    jobs, names = {}, {}
    for job in (job for each in cases for job in (each.expected, each.found)):
        key = job.to_json()
        names.setdefault(key, f"{len(names):03d}")
        jobs[names[key]] = key
    plan = {"jobs": jobs, "cases": [
        {"case": each.name, "found": names[each.found.to_json()], "expected": names[each.expected.to_json()]}
        for each in cases]}
    with tempfile.TemporaryDirectory(prefix="verify-layout-") as folder:
        (Path(folder) / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        most = max(each.found.ranks for each in cases)
        _interpreter(Path(folder), most)
        return json.loads((Path(folder) / "outcome.json").read_text(encoding="utf-8"))


def _interpreter(folder: Path, most_ranks: int) -> None:
    """Runs this file as a program, in a session of its own that ends with the call."""
    threads = str(max(1, (os.cpu_count() or 1) // most_ranks))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {
        "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        environment.pop(name, None)
    with (folder / "interpreter.err").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", "engine.verification.ranks", str(folder)], env=environment,
                                   start_new_session=True, stdout=errors, stderr=errors)
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        text = (folder / "interpreter.err").read_text(errors="replace")
        raise RuntimeError(f"the interpreter that starts the ranks ended with code {code}:\n{text[-4000:]}")


# --- in the interpreter of its own ---


def main(folder: Path) -> None:
    """Every job of the plan, then every comparison."""
    _end_with_parent()
    import engine.model.gpt
    import engine.model.init
    import engine.model.spec
    import engine.verification.worker  # noqa: F401  (what the ranks need)
    from engine.verification import compare

    gc.freeze()  # collections between jobs then look at a job's objects only, and forks share these pages
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    jobs = {name: Job.from_json(text) for name, text in plan["jobs"].items()}
    failures: dict[str, Failure] = {}
    for ranks in sorted({job.ranks for job in jobs.values()}):
        waiting = {name: job for name, job in jobs.items() if job.ranks == ranks}
        while waiting:  # a failure ends all ranks: the jobs after it get new ones
            failed = _run_together(waiting, folder)
            if failed is None:
                break
            name, failures[name] = failed
            waiting = {other: job for other, job in waiting.items() if other > name}
    outcomes = [_outcome(case, jobs, failures, folder, compare.compare) for case in plan["cases"]]
    (folder / "outcome.json").write_text(json.dumps(outcomes), encoding="utf-8")


def _outcome(case: dict[str, str], jobs: dict[str, Job], failures: dict[str, Failure], folder: Path,
             compare: Callable) -> Outcome:
    for side in ("expected", "found"):
        if case[side] in failures:
            return {"case": case["case"], "failure": failures[case[side]]}
    ranks = [[folder / case[side] / f"{r}.pt" for r in range(jobs[case[side]].ranks)] for side in ("expected", "found")]
    return {"case": case["case"], "comparison": compare(*ranks, tied=jobs[case["found"]].cfg.model.tie_embeddings)}


def _run_together(jobs: dict[str, Job], folder: Path) -> tuple[str, Failure] | None:
    """Forks the ranks of these jobs, which all have as many. -> None, or (the job that failed, how)."""
    world = next(iter(jobs.values())).ranks
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(_free_port())}
    children: dict[int, int] = {}
    for number in range(world):
        (folder / f"{number}.failure").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            _rank(number, jobs, folder)
        children[pid] = number
    codes, seconds = _watch(children)
    if not any(codes.values()):
        return None
    failure = _first_failure(codes, folder) | {"seconds": seconds}
    return (folder / f"{failure['rank']}.current").read_text(), failure


def _watch(children: dict[int, int]) -> tuple[dict[int, int], float]:
    """Waits for all ranks -> (exit codes, seconds from the first failure to the end of all).

    A rank that fails ends the others soon; those that are ended for it count as 0.
    """
    children, codes = dict(children), {}
    failed = float("inf")
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            if code:
                failed = min(failed, time.monotonic())
        elif time.monotonic() < failed + _GRACE_SECONDS:
            time.sleep(0.02)
        else:
            for pid, number in children.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[number] = 0
            break
    return codes, max(0.0, time.monotonic() - failed)


def _first_failure(codes: dict[int, int], folder: Path) -> Failure:
    """The failure that the others follow from: a death by signal, else the earliest error."""
    for number, code in codes.items():
        if code < 0:
            return {"rank": number, "error": f"was ended by {signal.Signals(-code).name}", "refused": False}
    failed = [number for number, code in codes.items() if code]
    said = {number: json.loads((folder / f"{number}.failure").read_text()) for number in failed}
    first = min(failed, key=lambda number: said[number]["time"])
    return {"rank": first, "error": said[first]["error"], "refused": said[first]["refused"]}


def _rank(number: int, jobs: dict[str, Job], folder: Path) -> None:
    """A forked child: becomes rank ``number``, and never returns."""
    code = 1
    try:
        _end_with_parent()
        out = os.open(folder / f"{number}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
        from engine.verification import worker

        worker.run(jobs.items(), folder)
        code = 0
    except BaseException as error:
        now = time.monotonic()  # of the machine, so that ranks can be put in order
        refused = isinstance(error, UserError)
        text = str(error) if refused else traceback.format_exc()
        (folder / f"{number}.failure").write_text(json.dumps({"time": now, "error": text, "refused": refused}))
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    """Has Linux end this process with the one that started it, even if that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
