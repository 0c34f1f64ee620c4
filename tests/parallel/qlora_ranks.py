"""Run by test_qlora_layouts.py as several ranks: loads a checkpoint into codes and trains, under each layout.

    qlora_ranks.py FOLDER        FOLDER/cases.json, the checkpoints that it names; writes FOLDER/<case>.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lora_runs
import qlora_runs
import tiny
import torch

from engine.errors import UserError


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, case in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        cfg = qlora_runs.qlora(tiny.from_json(case["config"]), **case["lora"])
        tiny.forget_layout()
        try:
            found = {"loaded": qlora_runs.dequantised(qlora_runs.loaded(cfg, Path(case["checkpoint"])))}
        except UserError as error:
            found = {"error": str(error)}
            (folder / f"{name}.{dist.get_rank()}.txt").write_text(str(error))
        if case["trains"]:
            tiny.forget_layout()
            found |= lora_runs.three_steps(cfg)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
