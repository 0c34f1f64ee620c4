"""Run by test_kernel_layouts.py as two ranks: a short training under each layout and choice of kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import kernel_runs
import tiny


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, text in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        found = kernel_runs.losses(tiny.from_json(text))
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
