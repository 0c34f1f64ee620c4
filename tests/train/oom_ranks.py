"""Run by test_oom.py as two data-parallel ranks, of which only the second runs out of memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent))
from test_oom import starve


def main(corpus: Path, folder: Path) -> None:
    cfg = tiny.config(corpus, folder / "run", train__global_batch_size=8, train__micro_batch_size=4,
                      train__enable_oom_recovery=True)
    free = tiny.start(cfg)
    free_losses = [free.step().sums.loss for _ in range(2)]
    starved = tiny.start(cfg)
    with pytest.MonkeyPatch.context() as patch:
        if starved.groups.rank == 1:
            starve(patch, micro_batch_above=2)
        steps = [starved.step() for _ in range(2)]
    found = {"free_losses": free_losses, "losses": [step.sums.loss for step in steps],
             "micro_batch_sizes": [step.micro_batch_size for step in steps]}
    (folder / f"rank{starved.groups.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
