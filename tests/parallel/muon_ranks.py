"""Run by test_muon_layouts.py as two or four ranks: Newton–Schulz on parts of matrices, then Muon under each layout."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
import torch.distributed as dist

from engine.train import newton_schulz as ns
from engine.train.muon_matrices import Matrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def three_steps(cfg, changes: dict | None = None) -> dict:
    """Losses, gradient norms, the whole model's weights, and how many numbers of state the ranks hold.

    ``changes``: constants in engine.train meanwhile.
    """
    with contextlib.ExitStack() as stack:
        for name, value in (changes or {}).items():
            stack.enter_context(mock.patch(f"engine.train.{name}", value))
        run = tiny.start(cfg, masked=True)
        results = [run.step() for _ in range(3)]
    return {"losses": [r.sums.loss for r in results], "norms": [r.grad_norm for r in results],
            "weights": tiny.whole_weights(run), "held": held(run)}


def held(run: tiny.Run) -> list[dict[str, int]]:
    """By kind, the numbers that each rank's optimizer holds: state, and fp32 weights behind 16-bit ones."""
    counts: dict[str, int] = {}
    for inner in run.optimizer.chained_optimizers:
        for state in inner.optimizer.state.values():
            for kind, values in state.items():
                counts[kind] = counts.get(kind, 0) + values.numel()
        for group in getattr(inner, "fp32_from_float16_groups", []):
            counts["weights"] = counts.get("weights", 0) + sum(p.numel() for p in group)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, counts)
    return ranks


def split_errors() -> dict[str, float]:
    """Relative errors of this rank's part, of every form, against the whole matrices'."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    found = {}
    for rows, columns in ((8, 24), (24, 8), (16, 16), (160, 200)):
        whole = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows))
        expected = ns.orthogonalise(whole, COEFFICIENTS, 5) * 0.2 * max(rows, columns) ** 0.5
        for dim in (0, 1):
            part = whole.chunk(ranks, dim=1 + dim)[rank]
            wanted = expected.chunk(ranks, dim=1 + dim)[rank]
            for form in ("gram", "gather"):
                cut = Matrices(form, 1, 1, ((rows, columns),), dim, group)
                error = (cut.update(part, COEFFICIENTS, 5) - wanted).norm() / wanted.norm()
                found[f"{form} {rows}x{columns} along {dim}"] = error.item()
    return found


def main(folder: Path) -> None:
    for name, (text, changes) in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        found = three_steps(tiny.from_json(text), changes)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, split_errors())
    if dist.get_rank() == 0:
        (folder / "split.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
