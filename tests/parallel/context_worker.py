"""Run by test_context.py as several ranks: three steps of a run under each layout, and the exchange by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import context_runs
import tiny
import torch
import torch.distributed as dist


def exchange(folder: Path) -> None:
    """Keys and values of all ranks in order, and the sum of all ranks' gradients for each's own, in fp32 and bf16."""
    from engine.parallel import context

    group = dist.group.WORLD
    assert group is not None
    size, generator = group.size(), torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        whole = [torch.randn(2, 3, 4 * size, 5, generator=generator).to(dtype) for _ in range(2)]
        own = [context.slice_sequence(x.transpose(1, 2), group).transpose(1, 2).requires_grad_() for x in whole]
        gathered = context.gather_keys_values(own[0], own[1], group)
        grads = [[torch.randn(x.shape, generator=generator).to(dtype) for x in whole] for _ in range(size)]
        torch.autograd.backward(gathered, grads[group.rank()])
        for x, y, mine, which in zip(whole, gathered, own, (0, 1), strict=True):
            assert torch.equal(x, y)
            summed = torch.stack([of_rank[which] for of_rank in grads]).sum(0, dtype=torch.float32).to(dtype)
            assert mine.grad is not None
            assert torch.equal(mine.grad, context.slice_sequence(summed.transpose(1, 2), group).transpose(1, 2))
    if group.rank() == 0:
        torch.save(size, folder / "exchange.pt")


def main(folder: Path) -> None:
    for name, (packed, text) in json.loads((folder / "cases.json").read_text()).items():
        print("case", name, flush=True)
        tiny.forget_layout()
        found = context_runs.three_steps(tiny.from_json(text), packed)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    exchange(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
