"""Run by test_two_ranks.py: checkpoints from one layout into others, and saves that fail on one of two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist

from engine.checkpoint import layout
from engine.config import Config
from engine.errors import UserError

LAYOUTS = {
    "tp2": {"parallel.tensor": 2},
    "tp2_sp": {"parallel.tensor": 2, "parallel.sequence_parallel": True},
    "pp2": {"parallel.pipeline": 2},
    "pp2_interleaved": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    "dp2": {},
    "dp2_distributed": {"parallel.distributed_optimizer": True},
    "tp2_distributed": {"parallel.tensor": 2, "parallel.distributed_optimizer": True},
    "dp2_overlap": {"parallel.distributed_optimizer": True, "parallel.overlap_grad_reduce": True},
}
TRANSFERS = [("one", "tp2"), ("one", "pp2"), ("one", "dp2"), ("tp2", "dp2"), ("tp2", "pp2"), ("pp2", "tp2_sp"),
             ("pp2_interleaved", "tp2"), ("dp2", "pp2_interleaved"), ("dp2_overlap", "tp2_distributed"),
             ("tp2_distributed", "dp2_distributed"), ("tp2", "tp2")]


def start(cfg: Config, name: str, output: Path) -> tiny.Run:
    tiny.forget_layout()
    return tiny.start(cfg.with_values(LAYOUTS[name] | {"output_dir": output}))


def transfers(cfg: Config, folder: Path) -> None:
    """Each layout saves after two steps; others load that, save their loss of the next step, and the weights."""
    for name in LAYOUTS:
        run = start(cfg, name, folder / name)
        run.step()
        run.step()
        run.save()
        record(run, folder / f"after-{name}.pt")
    for source, target in TRANSFERS:
        run = start(cfg, target, folder / f"{source}-{target}")
        run.load(layout.latest(layout.root(folder / source)))
        record(run, folder / f"{source}-{target}.pt")


def record(run: tiny.Run, path: Path) -> None:
    weights = tiny.whole_weights(run)
    result = run.step()
    found = {"weights": weights, "loss": result.sums.loss, "norm": result.grad_norm, "next": tiny.whole_weights(run),
             "state": run.state.to_dict()}
    if dist.get_rank() == 0:
        torch.save(found, path)


def failures(cfg: Config, folder: Path) -> None:
    """A full disk on one rank, in each kind of file: every rank raises and names it, and the run can save again."""
    for rank, name in ((1, "__1_0.distcp"), (1, "rank_00001.safetensors"), (0, "common.pt"), (0, ".metadata"),
                       (0, "metadata.json"), (0, "__0_0.distcp"), (0, "state.json"), (0, layout.POINTER)):
        run = start(cfg, "tp2", folder / f"full-{name}")
        run.step()
        before = run.save()
        run.step()
        with pytest.MonkeyPatch.context() as monkeypatch:
            broken = name if dist.get_rank() == rank else "none"
            with tiny.full_disk(monkeypatch, broken) as hit, pytest.raises(UserError, match=f"rank {rank}: .*No space"):
                run.save()
        assert bool(hit) == (dist.get_rank() == rank), (name, hit)
        checkpoints = layout.root(run.cfg.output_dir)
        assert layout.latest(checkpoints) == before, name
        layout.verify(before)
        dist.barrier()
        assert layout.step_of(run.save()) == 2


def refusals(cfg: Config, folder: Path) -> None:
    """Damage, another model, and folders that are not shared: the same error on both ranks."""
    run = start(cfg, "tp2", folder / "refusals")
    run.step()
    path = run.save()
    other = start(cfg.with_values({"model.hidden_size": 64}), "tp2", folder / "refusals")
    with pytest.raises(UserError, match=r"another model: .*hidden_size 32 \(here 64\)"):
        other.load(path)
    run = start(cfg, "tp2", folder / "refusals" / f"rank{dist.get_rank()}")
    assert run.checkpointer().find_resume() is None
    if dist.get_rank() == 0:
        (path / "sharded" / "common.pt").write_bytes(b"")
    dist.barrier()
    run = start(cfg, "tp2", folder / "refusals")
    with pytest.raises(UserError, match=r"common\.pt: does not match"):
        run.load(path)
    mine = path if dist.get_rank() == 0 else folder / "one"
    run = start(cfg.with_values({"resume_from_checkpoint": str(mine)}), "tp2", folder / "unshared")
    with pytest.raises(UserError, match="rank 1 finds"):
        run.checkpointer().find_resume()


def main(folder: Path) -> None:
    cfg = tiny.from_json((folder / "config.json").read_text())
    for part in (transfers, failures, refusals):
        print(part.__name__, flush=True)
        part(cfg, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
