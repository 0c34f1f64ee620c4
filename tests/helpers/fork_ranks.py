"""Run by ``tiny.launch``: imports torch, Megatron and the engine once, then forks WORLD_SIZE ranks of a script.

    fork_ranks.py OUTPUTS SCRIPT ARGUMENTS…      writes OUTPUTS/<rank>.out and OUTPUTS/<rank>.code
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path


def preload() -> None:
    """Everything that a training process imports. Nothing here starts a thread, which a fork would lose."""
    import tiny  # noqa: F401

    import engine.checkpoint.restore
    import engine.data.loader
    import engine.evaluation.perplexity
    import engine.model.build
    import engine.model.gpt
    import engine.model.spec
    import engine.parallel.wrap
    import engine.train.loop
    import engine.train.optimizer
    import engine.train.step  # noqa: F401


def rank(number: int, outputs: Path, script: str, arguments: list[str]) -> None:
    """A forked child: becomes rank ``number``, and never returns."""
    out = os.open(outputs / f"{number}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(outputs: Path, script: str, arguments: list[str]) -> None:
    preload()
    gc.collect()
    gc.freeze()  # the ranks' collections need not walk what was imported, nor copy its pages
    world = int(os.environ["WORLD_SIZE"])
    children = {}
    for number in range(world):
        (outputs / f"{number}.code").write_text("-9")  # for a rank that is killed with us
        pid = os.fork()
        if pid == 0:
            rank(number, outputs, script, arguments)
        children[pid] = number
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in children])
    while children:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        (outputs / f"{children.pop(pid)}.code").write_text(str(code))
        if code:
            signal.alarm(30)  # the others may wait for this one


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
