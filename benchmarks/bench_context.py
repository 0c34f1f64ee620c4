"""Keys and values for context parallelism: one all-gather against a ring, the messages alone and beside attention.

    torchrun --nproc-per-node 2 benchmarks/bench_context.py --tokens 8192        # gloo here, nccl on GPUs
    python benchmarks/bench_context.py --paper                                    # docs/context_parallel.md's table

What is timed: the exchange of one layer's K and V forward (all-gather: one collective and the copy into order; ring:
cp - 1 rounds of point-to-point messages), and the attention of one rank's two chunks, which a ring would hide behind.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from engine.parallel import context
from engine_kernels.attention import causal_attention

LAYERS, HEADS, GROUPS, HEAD_DIM = 32, 32, 8, 128  # Llama 3 8B


def paper(flops: float = 500e12, nvlink: float = 350e9, infiniband: float = 40e9) -> str:
    """One layer forward and backward of the 8B shape in bf16, for one sequence over cp H100s, TP1. A line each.

    Rates are what large messages and flash attention reach: ``flops`` a second, bytes a second and direction a GPU.
    """
    lines = ["| tokens | cp | attention, ms | K, V of all ranks, MiB | all-gather and reduce-scatter: NVLink, ms | "
             "InfiniBand, ms | messages: all-gather | ring |", "|---|---|---|---|---|---|---|---|"]
    for tokens, cp in ((32768, 2), (32768, 8), (131072, 8), (131072, 16), (131072, 32)):
        attention = 3.5 * 2 * HEADS * HEAD_DIM * tokens**2 / cp / flops  # backward is 2.5 forwards, causal halves
        whole = 2 * GROUPS * HEAD_DIM * 2 * tokens
        moved = 2 * whole * (cp - 1) / cp  # K, V in; dK, dV out
        node = f"{moved / nvlink * 1e3:.1f}" if cp <= 8 else "—"
        lines.append(f"| {tokens // 1024}k | {cp} | {attention * 1e3:.1f} | {whole / 2**20:.0f} | {node} | "
                     f"{moved / infiniband * 1e3:.1f} | 2 | {3 * (cp - 1)} |")
    return "\n".join(lines)


def _ring(k_bgsd: torch.Tensor, v_bgsd: torch.Tensor, group: dist.ProcessGroup) -> None:
    """The parts of every rank pass by, one a round."""
    rank, size = group.rank(), group.size()
    held = torch.stack([k_bgsd, v_bgsd])
    for _ in range(size - 1):
        arriving = torch.empty_like(held)
        sends = [dist.P2POp(dist.isend, held, group=group, group_peer=(rank + 1) % size),
                 dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        held = arriving


def _milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of the slowest rank, the best of the repeats."""
    taken = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        taken.append(slowest.item() * 1e3)
    return min(taken[1:])


@torch.no_grad()
def measure(tokens: int, repeats: int) -> None:
    """Prints one line of figures. Under torchrun."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    mine = context.chunks(tokens, group)
    own = tokens // group.size()
    q, k, v = (torch.randn(1, heads, own, HEAD_DIM, device=device, dtype=torch.bfloat16)
               for heads in (HEADS, GROUPS, GROUPS))
    whole_k, whole_v = context.gather_keys_values(k, v, group)

    def attend() -> None:
        for q_part, (_, end) in zip(q.chunk(len(mine), dim=2), mine, strict=True):
            causal_attention(q_part, whole_k[:, :, :end], whole_v[:, :, :end])

    timed = {"all-gather": lambda: context.gather_keys_values(k, v, group), "ring": lambda: _ring(k, v, group),
             "attention": attend}
    found = {name: _milliseconds(run, device, repeats) for name, run in timed.items()}
    if group.rank() == 0:
        print(f"{group.size()} ranks, {dist.get_backend()}, {tokens} tokens, one layer forward in bf16: "
              + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--paper", action="store_true")
    arguments = parser.parse_args()
    if arguments.paper:
        print(paper())
    else:
        measure(arguments.tokens, arguments.repeats)
