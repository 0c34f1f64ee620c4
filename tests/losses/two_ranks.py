"""Run by test_next_token.py as two ranks: each case with this rank's half of the vocabulary's rows."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.losses.log_probs import token_log_probs
from engine.losses.next_token import next_token_loss


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {"loss": {}, "logps": {}}
    for name, ((hidden_nh, weight_vh, labels_n, mask_n, vocab), terms) in torch.load(folder / "cases.pt").items():
        for impl in impls(name):
            # Chunks of 8: several collectives, the last of a partial chunk.
            options = {"vocab_size": vocab, "tp_group": dist.group.WORLD, "chunk_tokens": 8, "impl": impl}
            hidden, weight = leaves(hidden_nh, weight_vh, rank)
            loss, correct = next_token_loss(hidden, weight, labels_n, mask_n, **options, **terms)
            loss.backward()
            found["loss"][name, impl] = loss.detach(), correct, hidden.grad, weight.grad

            hidden, weight = leaves(hidden_nh, weight_vh, rank)
            logps_n, entropy_n = token_log_probs(hidden, weight, labels_n, temperature=0.8, entropy=True, **options)
            (logps_n * mask_n).sum().backward()
            found["logps"][name, impl] = logps_n.detach(), entropy_n, hidden.grad, weight.grad
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def impls(name: str) -> list[str]:
    """The interpreter takes its time, so Triton's kernels have two cases."""
    return ["auto", "torch", "triton"] if name in ("padded", "smoothing and z-loss") else ["auto"]


def leaves(hidden_nh: torch.Tensor, weight_vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden_nh.clone().requires_grad_(), weight_vh.chunk(2)[rank].clone().requires_grad_()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
