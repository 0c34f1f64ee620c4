"""Run by test_fp8.py as two tensor ranks: loads one rank's checkpoint and goes on; then trains and saves its own.

    fp8_ranks.py FOLDER        FOLDER/config.json, and FOLDER/one with a checkpoint; writes FOLDER/two and FOLDER/two.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch

from engine.checkpoint import layout
from engine.model import fp8


def main(folder: Path) -> None:
    import torch.distributed as dist

    cfg = tiny.from_json((folder / "config.json").read_text()).with_values({"parallel.tensor": 2})
    run = tiny.start(cfg.with_values({"output_dir": folder / "unused"}))
    run.load(layout.find(folder / "one"))
    found = {"loaded": fp8.scaling_of(run.chunks).history.clone()}
    found["continued"] = [run.step().sums.loss for _ in range(2)]
    tiny.forget_layout()
    run = tiny.start(cfg.with_values({"output_dir": folder / "two"}))
    run.step()
    run.step()
    run.save()
    found["saved"] = fp8.scaling_of(run.chunks).history.clone()
    found["expected"] = [run.step().sums.loss for _ in range(2)]
    if dist.get_rank() == 0:
        torch.save(found, folder / "two.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
