"""Run by test_reshard.py as eight ranks: checkpoints of every layout, and every layout continuing from each of them.

    reshard_ranks.py FOLDER FAMILY…        of each family FOLDER/<family>.json, a configuration

The first 1, 2, 4 and 8 ranks in turn save under the layouts of that many ranks, and then load under them. For each pair
rank 0 appends to FOLDER/pairs.jsonl what was found.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gathered
import tiny
import torch
import torch.distributed as dist

from engine.checkpoint import layout
from engine.parallel import topology, wrap

T2, P2 = {"tensor": 2}, {"pipeline": 2}
SP, VPP, DIST = {"sequence_parallel": True}, {"virtual_pipeline": 2}, {"distributed_optimizer": True}
EP = {"expert": 2}
OVERLAP = DIST | {"overlap_grad_reduce": True}
LAYOUTS: dict[str, dict[str, tuple[int, dict]]] = {  # family -> layout -> ranks, changes of the section parallel
    "dense": {
        "one": (1, {}),
        "dp2": (2, DIST),
        "tp2": (2, T2 | SP),
        "pp2": (2, P2 | VPP),
        "tp2_pp2": (4, T2 | P2),
        "tp2_dp2": (4, T2 | SP | DIST),
        "pp2_dp2": (4, P2),
        "tp2_pp2_dp2": (8, T2 | P2 | SP | VPP | DIST),
    },
    "bf16": {
        "one": (1, {}),
        "dp2": (2, {}),
        "tp2_distributed": (2, T2 | DIST),
        "cp2_distributed": (2, {"context": 2} | DIST),
        "dp4_buckets": (4, OVERLAP),
        "pp2_dp2": (4, P2 | DIST),
    },
    "two_bytes": {
        "one": (1, {}),
        "dp2_distributed": (2, DIST),
        "tp2": (2, T2 | SP),
        "ep2_dp4_buckets": (4, EP | OVERLAP),
    },
    "moe": {
        "one": (1, {}),
        "ep2": (2, EP),
        "tp2": (2, T2 | SP),
        "ep2_tp2": (4, EP | T2 | SP),
        "ep2_pp2_distributed": (4, EP | P2 | DIST),
        "ep2_dp4_distributed": (4, EP | DIST),
    },
    "muon": {
        "one": (1, {}),
        "tp2": (2, T2 | SP | {"expert_tensor": 1}),
        "pp2": (2, P2),
        "dp2": (2, {}),
        "ep2_tp2": (4, EP | T2 | SP | {"expert_tensor": 1}),
    },
}
BUCKET = 2000  # elements, where a layout's name ends in "buckets": parameters and ranks' slices cross many borders


def start(family: str, name: str, folder: Path, seed: int) -> tiny.Run:
    tiny.forget_layout()
    cfg = tiny.from_json((folder / f"{family}.json").read_text())
    changes = {f"parallel.{field}": value for field, value in LAYOUTS[family][name][1].items()}
    original = wrap.ddp_config
    if name.endswith("buckets"):
        def smaller(*args):
            settings = original(*args)
            settings.bucket_size = BUCKET
            return settings
        wrap.ddp_config = smaller
    try:
        return tiny.start(cfg.with_values(changes | {"output_dir": folder / family / name, "seed": seed}))
    finally:
        wrap.ddp_config = original


def go_on(run: tiny.Run, steps: int) -> list[float]:
    """The losses of the next steps: from the second on they depend on the optimizer's state."""
    return [run.step().sums.loss for _ in range(steps)]


def save(family: str, name: str, folder: Path) -> None:
    seed = 1 + list(LAYOUTS[family]).index(name)  # no two checkpoints are alike
    run = start(family, name, folder, seed)
    run.step()
    run.step()
    run.save()
    record = {"state": gathered.state(run), "train": run.state.to_dict()} | {"losses": go_on(run, 2)}
    if dist.get_rank() == 0:
        torch.save(record, folder / family / f"{name}.pt")


def load(family: str, target: str, folder: Path) -> None:
    run = start(family, target, folder, seed=999)
    for source in LAYOUTS[family]:
        run.load(layout.find(folder / family / source))
        expected = torch.load(folder / family / f"{source}.pt")
        wrong = gathered.differing(gathered.state(run), expected["state"])
        if run.state.to_dict() != expected["train"]:
            wrong.append("train state")
        losses = go_on(run, 2 if "one" in (source, target) or source == target else 1)
        if dist.get_rank() == 0:
            pair = {"family": family, "source": source, "target": target, "wrong": wrong, "losses": losses,
                    "expected": expected["losses"][: len(losses)]}
            with (folder / "pairs.jsonl").open("a") as f:
                f.write(json.dumps(pair) + "\n")


def worlds(rank: int, stores: Path) -> Iterator[int]:
    """Makes the first 1, 2, 4, 8 ranks the whole world in turn; this rank takes part in those it belongs to."""
    for world in (1, 2, 4, 8):
        if rank < world:
            os.environ["WORLD_SIZE"] = str(world)
            store = dist.FileStore(f"{stores}-{world}", world)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            yield world
            tiny.forget_layout()
            topology.shutdown()


def main(folder: Path, families: list[str]) -> None:
    gc.freeze()  # what the forks share need not be walked by every collection: a quarter of this test's time
    rank = int(os.environ["RANK"])
    for phase in (save, load):
        for world in worlds(rank, folder / f"store-{phase.__name__}"):
            for family in families:
                for name, (ranks, _) in LAYOUTS[family].items():
                    if ranks == world:
                        print(phase.__name__, family, name, flush=True)
                        phase(family, name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
