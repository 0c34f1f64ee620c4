"""Run by test_layouts.py as several ranks: checkpoints of other layouts read, evaluated and continued under each."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from engine import evaluate, generate
from engine.checkpoint import restore
from engine.config.inference import EvaluationLayout


def train(text: str, changes: dict) -> None:
    """A checkpoint saved under a layout of several ranks."""
    tiny.forget_layout()
    run = tiny.start(tiny.from_json(text).with_values(changes))
    run.step()
    run.save()


def read(checkpoint: str, layout: dict, tasks: dict) -> dict:
    """What evaluation and generation find under ``layout``; every rank must find the same."""
    tiny.forget_layout()
    restored = restore.model(checkpoint, parallel=EvaluationLayout(**layout))
    found: dict = {"parameters": sum(p.numel() for chunk in restored.chunks for p in chunk.parameters()),
                   "evaluate": [evaluate.run(restored, **options) for options in tasks["evaluate"]]}
    if not layout.get("sequence_parallel") and layout.get("context", 1) == 1:
        found["generate"] = [generate.continuations(restored, tasks["prompt"], **o) for o in tasks["generate"]]
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [[{**r, "tokens_per_sec": 0} for r in found["evaluate"]], found.get("generate")])
    assert all(other == everywhere[0] for other in everywhere), everywhere
    return found


class Closed(io.StringIO):
    def read(self, *args):
        raise AssertionError("only the main rank reads standard input")


def command_line(checkpoint: str, prompt: str) -> list[str]:
    """What each rank prints of `mainspring generate`, its prompt from standard input."""
    tiny.forget_layout()
    sys.stdin = io.StringIO(prompt) if dist.get_rank() == 0 else Closed()
    shown, close, kept = io.StringIO(), restore.topology.shutdown, torch.get_rng_state()
    restore.topology.shutdown = lambda: None  # the ranks go on to other layouts
    with contextlib.redirect_stdout(shown):
        generate.main(["--checkpoint", checkpoint, "--parallel.tensor", str(dist.get_world_size()),
                       "--temperature", "0", "--max_new_tokens", "5"])
    restore.topology.shutdown = close
    torch.set_rng_state(kept)
    outputs: list = [None] * dist.get_world_size()
    dist.all_gather_object(outputs, shown.getvalue())
    return outputs


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    for text, changes in job["train"]:
        print("training", changes, flush=True)
        train(text, changes)
    results: dict = {"read": {}}
    for name, (checkpoint, layout) in job["read"].items():
        print(name, flush=True)
        results["read"][name] = read(checkpoint, layout, job["tasks"])
    results["command line"] = command_line(job["command line"], job["tasks"]["prompt"])
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    restore.topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
