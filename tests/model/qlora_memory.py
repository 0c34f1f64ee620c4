"""Run by test_qlora.py in a process of its own: the memory that loading a checkpoint takes, into codes and as it is.

    qlora_memory.py FOLDER        FOLDER/cases.json; writes FOLDER/<case>.json: bytes by which the process grew at most
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import qlora_runs
import tiny


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, case in json.loads((folder / "cases.json").read_text()).items():
        cfg = qlora_runs.qlora(tiny.from_json(case["config"]), **case["lora"])
        tiny.forget_layout()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what the first case freed would serve the second uncounted
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        chunks = qlora_runs.loaded(cfg, Path(case["checkpoint"]))
        (folder / f"{name}.json").write_text(json.dumps({"peak": resident("VmHWM") - before}))
        del chunks
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
