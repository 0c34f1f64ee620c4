"""Run by test_next_token.py as two ranks: each case with this rank's half of the vocabulary's rows."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.losses import next_token


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    next_token.chunk_tokens = lambda rows, dtype: 8  # several reductions, the last of a partial chunk
    found = {}
    for name, (hidden_nh, weight_vh, labels_n, mask_n, vocab) in torch.load(folder / "cases.pt").items():
        hidden = hidden_nh.requires_grad_()
        weight = weight_vh.chunk(2)[rank].clone().requires_grad_()
        loss, correct = next_token.next_token_loss(hidden, weight, labels_n, mask_n, vocab_size=vocab,
                                                   tp_group=dist.group.WORLD)
        loss.backward()
        found[name] = (loss.detach(), correct, hidden.grad, weight.grad)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
