"""A worker for test_protocol.py: prints to stdout, and dies, spins or allocates when asked."""

from __future__ import annotations

import threading
import time

from benchmarks.workers.protocol import serve


def build(config: dict):
    print("noise on stdout while building")
    if config.get("fail"):
        raise ValueError("no such thing")
    if config.get("spin"):
        threading.Thread(target=_spin, daemon=True).start()

    def step(index: int) -> float:
        print("noise on stdout in a step")
        if index == config.get("die_at"):
            raise RuntimeError("died in step 3")
        if index == config.get("allocate_at"):
            bytearray(300_000_000).count(1)
        time.sleep(config.get("seconds", 0.0))
        return 10.0 - index

    return step, {"seed": config.get("seed")}


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    serve(build)
