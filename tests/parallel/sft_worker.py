"""Run by test_sft_layouts.py as several ranks: three steps of SFT under each layout, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sft_runs
import tiny
import torch


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, text in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        found = sft_runs.three_steps(tiny.from_json(text))
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
