"""Run by test_own_gradient_sums.py: gradients of two steps, reduced after and during the backward pass."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny
import torch

from engine.parallel import topology, wrap


def main(folder: Path) -> None:
    cfg = tiny.from_json((folder / "cfg.json").read_text())
    original = wrap.ddp_config

    def small_buckets(*args):
        settings = original(*args)
        settings.bucket_size = 2000  # many: their reductions start at different times
        return settings

    for kind, overlap in (("plain", False), ("overlap", True), ("buckets", True)):
        wrap.ddp_config = small_buckets if kind == "buckets" else original
        run, found = tiny.start(cfg.with_values({"parallel.overlap_grad_reduce": overlap})), []
        for _ in range(2):  # in the second, Megatron's hooks start the reductions
            run.step()
            found.append({name: p.main_grad.clone() for name, p in tiny.unwrapped(run).named_parameters()})
            added = [name for name, p in tiny.unwrapped(run).named_parameters() if p.grad_added_to_main_grad]
            assert len(added) == 8, added
        if os.environ["RANK"] == "0":
            torch.save(found, folder / f"{kind}.pt")
        tiny.forget_layout()
    topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
