"""Run by test_lora_reshard.py as four ranks: one rank's checkpoint of adapters under each layout, and what the layout
then makes of it: a checkpoint of its own, a PEFT directory, merged weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gathered
import lora_runs
import tiny
import torch


def main(folder: Path) -> None:
    import torch.distributed as dist

    from engine.export import peft
    from engine.model import lora_merge
    from engine.parallel.wrap import gather_parameters, unwrap

    for name, (text, lora, source) in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        run = tiny.start(lora_runs.with_lora(tiny.from_json(text), **lora))
        lora_runs.load(run, Path(source))
        lora_runs.save(run)
        state = gathered.state(run)
        gather_parameters(run.chunks)
        bare = [unwrap(chunk) for chunk in run.chunks]
        peft.save(bare, run.cfg, run.groups, folder / f"{name}.adapter")
        merged = lora_merge.merge(bare, run.groups)
        weights = tiny.whole_weights(run)
        if dist.get_rank() == 0:
            torch.save({"state": state, "weights": weights, "merged": (merged.changed, merged.total)},
                       folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
