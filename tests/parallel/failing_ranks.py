"""Run by test_failing_rank.py: forks the ranks of each case from one interpreter, as a launcher without an agent would.

    failing_ranks.py WORLD CASE…      prints {case: {"codes", "output", "seconds"}}; one file takes all ranks' output
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from engine import UserError
from engine.parallel import hub, topology, watch
from engine.runtime import command


def wait_for_others() -> None:
    """What a healthy rank does: collectives, in which it is stuck when another does not come."""
    for _ in range(1000):
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.01)


def mistaken() -> None:
    raise UserError("its disk is gone", where="/local/cache", fix="Leave this machine out")


def buggy() -> None:
    raise ZeroDivisionError("a bug of ours")


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def stuck() -> None:
    time.sleep(600)


def idle_watch() -> None:
    """The watch's threads sleep: less than a thousandth of a second's processor time."""
    threads = [t for t in (watch._watch, watch._watch.hub if watch._watch else None) if t is not None]

    def used() -> float:
        return sum(time.clock_gettime(time.pthread_getcpuclockid(t.ident)) for t in threads)

    time.sleep(0.5)  # until all have come
    before = used()
    time.sleep(1)
    assert threads
    assert used() - before < 1e-3, f"the watch took {used() - before} s of processor time in a second"


# case: {rank: what it does}; the others wait for it. "early" is before ranks meet, where they do not wait yet.
INSIDE = {
    "user error": {1: mistaken},
    "user error of all": dict.fromkeys(range(4), mistaken),
    "bug": {2: buggy},
    "bug of rank 0": {0: buggy},
    "interrupted": {1: interrupted},
    "killed": {1: lambda: os.kill(os.getpid(), signal.SIGKILL)},
    "rank 0 killed": {0: lambda: os.kill(os.getpid(), signal.SIGKILL)},
    "stuck": {1: stuck},
    "stopped": {1: lambda: os.kill(os.getpid(), signal.SIGSTOP)},
    "rank 0 ends first": {0: lambda: None, 1: lambda: time.sleep(1), 2: lambda: time.sleep(0.5)},
    "rank 0 ends last": {0: lambda: time.sleep(1), 1: lambda: None, 2: lambda: None},
    "idle": dict.fromkeys(range(4), idle_watch),
}
EARLY = {
    "early user error": {1: mistaken},
    "early user error of rank 0": {0: mistaken},
    "early user error of all": dict.fromkeys(range(4), mistaken),
    "early bug": {1: buggy},
    "never came": {1: lambda: os._exit(0)},
}


def rank(case: str) -> int:
    def main(_: list[str]) -> int:
        hub.LINGER_SECONDS = 3 if case == "never came" else hub.LINGER_SECONDS
        number, minutes = int(os.environ["RANK"]), 0.05 if case in ("stuck", "stopped", "never came") else 10
        EARLY.get(case, {}).get(number, lambda: None)()
        cfg = tiny.config(Path("/none"), Path("/none"), parallel__timeout_minutes=minutes, train__global_batch_size=12)
        with topology.groups(cfg):
            INSIDE.get(case, {}).get(number, wait_for_others)()
        return 0

    return command(main, [])


def run(case: str, world: int) -> dict:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port()), "WORLD_SIZE": str(world)}
    ranks, codes = {}, {}
    with tempfile.NamedTemporaryFile() as output:
        start = time.monotonic()
        for number in range(world):
            pid = os.fork()
            if pid == 0:
                both = os.open(output.name, os.O_WRONLY | os.O_APPEND)
                os.dup2(both, 1)
                os.dup2(both, 2)
                os.environ |= {"RANK": str(number)}
                code: object = 1
                try:
                    code = rank(case)
                except SystemExit as stop:
                    code = stop.code
                finally:
                    os._exit(code if isinstance(code, int) else 1)
            ranks[pid] = number
        while ranks and time.monotonic() < start + 60:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif case == "stopped" and list(ranks.values()) == [1]:
                os.kill(next(iter(ranks)), signal.SIGKILL)
            time.sleep(0.01)
        seconds = time.monotonic() - start
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        text = Path(output.name).read_text()
    return {"codes": [codes.get(number) for number in range(world)], "output": text, "seconds": seconds}


if __name__ == "__main__":
    import megatron.core.parallel_state
    import megatron.core.tensor_parallel  # noqa: F401

    print(json.dumps({case: run(case, int(sys.argv[1])) for case in sys.argv[2:] or [*INSIDE, *EARLY]}))
