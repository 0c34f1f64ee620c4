"""Run by test_two_ranks.py: saves that fail on one of two ranks, and checkpoints that both refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch.distributed as dist

from engine.checkpoint import layout, optimizer_state, sharded
from engine.config import Config
from engine.errors import UserError

LAYOUTS = {"tp2": {"parallel.tensor": 2}, "pp2": {"parallel.pipeline": 2}}


def start(cfg: Config, name: str, output: Path) -> tiny.Run:
    tiny.forget_layout()
    return tiny.start(cfg.with_values(LAYOUTS[name] | {"output_dir": output}))


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
    mine = path if dist.get_rank() == 0 else folder / "full-common.pt"  # which failures() left
    run = start(cfg.with_values({"resume_from_checkpoint": str(mine)}), "tp2", folder / "unshared")
    with pytest.raises(UserError, match="rank 1 finds"):
        run.checkpointer().find_resume()


def lacking(cfg: Config, folder: Path) -> None:
    """A checkpoint without a tensor that only the last stage asks for: both ranks say so, and none waits."""
    run = start(cfg, "pp2", folder / "lacking")
    run.step()
    to_save = optimizer_state.to_save

    def without(*args) -> dict:
        state = to_save(*args)
        state["optimizer"] = {name: value for name, value in state["optimizer"].items()
                              if value.key != "optimizer.state.exp_avg.decoder.final_layernorm.weight"}
        return state

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharded.optimizer_state, "to_save", without)
        path = run.save()
    with pytest.raises(UserError, match=r"holds no optimizer\.state\.exp_avg\.decoder\.final_layernorm\.weight"):
        start(cfg, "pp2", folder / "lacking").load(path)


def main(folder: Path) -> None:
    cfg = tiny.from_json((folder / "config.json").read_text())
    for part in (failures, refusals, lacking):
        print(part.__name__, flush=True)
        part(cfg, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
