"""Run by test_fp8_layouts.py as two ranks (and imported by it for one): three steps of a run under each layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch

from engine.config import Config


def in_fp32(cfg: Config) -> Config:
    """What is not 8 bits wide in fp32, which users are refused: bf16's rounding would hide what a layout does."""
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"precision": "fp32"})})


def three_steps(cfg: Config, *, precise: bool) -> dict:
    """What ``layouts_worker.three_steps`` finds, and the first scale of every tensor, by layer and kind.

    Of the layers and micro-batches of this rank, which data-parallel ranks and stages have others of.
    """
    from engine.model import fp8_scaling

    scales, quantise = {}, fp8_scaling.LayerScaling.quantise

    def recording(self, which, x_nk, **options):
        q = quantise(self, which, x_nk, **options)
        scales.setdefault((self.whole.names[self.index], which), q.scale.clone())
        return q

    fp8_scaling.LayerScaling.quantise = recording
    try:
        run = tiny.start(in_fp32(cfg) if precise else cfg, masked=True)
        found = {"initial": tiny.whole_weights(run)}
        results = [run.step() for _ in range(3)]
    finally:
        fp8_scaling.LayerScaling.quantise = quantise
    return found | {"losses": [r.sums.loss for r in results], "tokens": [r.sums.tokens for r in results],
                    "norms": [r.grad_norm for r in results], "weights": tiny.whole_weights(run), "scales": scales}


def main(folder: Path) -> None:
    import torch.distributed as dist

    for name, text in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        found = three_steps(tiny.from_json(text), precise=not name.endswith("bf16"))
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
