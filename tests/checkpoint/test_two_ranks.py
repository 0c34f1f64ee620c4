"""Checkpoints of one layout under others, and saves that fail on one of two ranks, in one pair of processes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tiny
import torch

from engine.checkpoint import layout

WORKER = Path(__file__).with_name("two_ranks.py")
LAYOUTS = ("tp2", "tp2_sp", "pp2", "pp2_interleaved", "dp2", "dp2_distributed", "tp2_distributed", "dp2_overlap")


def transfers() -> list[tuple[str, str]]:
    """The worker's list, without importing it (it is run by path)."""
    for node in ast.parse(WORKER.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "TRANSFERS":
            return ast.literal_eval(node.value)
    raise AssertionError("no TRANSFERS")


def assert_continues(found: dict, expected: dict, what: str) -> None:
    """Loaded weights bit for bit those that were saved; the next step within rounding."""
    assert found["weights"].keys() == expected["weights"].keys(), what
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), (what, name)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), what
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5), what
    assert found["state"] == expected["state"], what
    norm = torch.stack([value.norm() for value in expected["next"].values()]).norm()
    for name, value in expected["next"].items():
        assert (found["next"][name] - value).norm() <= 1e-6 * norm, (what, name)


def step(run: tiny.Run) -> dict:
    weights = tiny.whole_weights(run)
    result = run.step()
    return {"weights": weights, "loss": result.sums.loss, "norm": result.grad_norm, "next": tiny.whole_weights(run),
            "state": run.state.to_dict()}


def test_every_layout_loads_what_every_other_saved(config, tmp_path):
    cfg = config(model__num_layers=4, train__eps=1e-5, train__max_steps=9, train__global_batch_size=8)
    one = tiny.start(cfg.with_values({"output_dir": tmp_path / "one"}))
    one.step()
    one.step()
    one.save()
    expected = step(one)
    (tmp_path / "config.json").write_text(tiny.to_json(cfg))
    for code, output in tiny.launch(WORKER, 2, tmp_path):
        assert code == 0, output[-6000:]
    saved = {name: torch.load(tmp_path / f"after-{name}.pt") for name in LAYOUTS} | {"one": expected}
    for source, target in transfers():
        assert_continues(torch.load(tmp_path / f"{source}-{target}.pt"), saved[source], f"{source} -> {target}")
    for source in LAYOUTS:
        distributed = source.endswith(("distributed", "overlap"))
        run = tiny.start(cfg.with_values({"output_dir": tmp_path / "back",
                                          "parallel.distributed_optimizer": distributed}))
        run.load(layout.latest(layout.root(tmp_path / source)))
        assert_continues(step(run), saved[source], f"{source} -> one rank")
