"""Run by test_layouts.py as two ranks: three steps of a run under each layout, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch


def three_steps(cfg, masked: bool) -> dict:
    """Losses, gradient norms, and the whole model's weights before and after."""
    run = tiny.start(cfg, masked=masked)
    found = {"initial": tiny.whole_weights(run)}
    results = [run.step() for _ in range(3)]
    return found | {"losses": [r.sums.loss for r in results], "tokens": [r.sums.tokens for r in results],
                    "correct": [r.sums.correct for r in results], "norms": [r.grad_norm for r in results],
                    "weights": tiny.whole_weights(run)}


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, text in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        found = three_steps(tiny.from_json(text), masked=True)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
