"""Run by test_moe_dispatchers.py as one or several ranks: one step of a run by each implementation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import moe_runs
import tiny
import torch


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, text in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        found = {}
        for impl in ("torch", "triton"):
            tiny.forget_layout()
            found[impl] = moe_runs.one_step(tiny.from_json(text), impl)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
