"""Run by test_perplexity.py as two ranks: the evaluation of a model after one step, under each layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch.distributed as dist

from engine.data import loader
from engine.evaluation.perplexity import evaluate

LAYOUTS = {"dp2": {}, "tp2": {"parallel.tensor": 2}, "pp2": {"parallel.pipeline": 2}, "cp2": {"parallel.context": 2},
           "pp2_interleaved": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
           "dp2_overlap": {"parallel.distributed_optimizer": True, "parallel.overlap_grad_reduce": True}}


def main(folder: Path) -> None:
    text, options = json.loads((folder / "job.json").read_text())
    results = {}
    for name, changes in LAYOUTS.items():
        tiny.forget_layout()
        run = tiny.start(tiny.from_json(text).with_values(changes))
        run.step()
        place = {"dp_rank": run.groups.data_parallel_rank, "dp_size": run.groups.data_parallel_size}
        with loader.build(run.cfg, "validation", **place) as data:
            results[name] = [
                evaluate(run.chunks, data, run.groups, **{"micro_batch_size": 4, "seq_length": tiny.SEQ} | o)
                for o in options]
        print(name, "done", flush=True)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
