"""The C++ kernels beside the plain torch chain that Transformers runs for the same op, forward and forward + backward.

    python benchmarks/run.py kernels_cpu [--json FILE] [--threads 1] [--ops swiglu ...]

Runs of the two are interleaved; printed are medians and minima in milliseconds, and the bytes an op must move (each
input read once, each output written once) over the minimum, beside the rate of a copy measured in the same process.
Freed memory is kept for both alike, as the trainer keeps it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from engine.runtime import keep_freed_memory
from engine_kernels.attention import causal_attention
from engine_kernels.cross_entropy import cross_entropy
from engine_kernels.linear import matmul_nn, matmul_nt, matmul_tn
from engine_kernels.qkv_rotary import split_qkv_rotary
from engine_kernels.rms_norm import rms_norm
from engine_kernels.swiglu import swiglu

# The model of issue 2's profile: batch 8 x sequence 512, 4 query heads over 2 groups.
S, B, D, FFN, V, H, G, HEAD = 512, 8, 256, 704, 8192, 4, 2, 64


Function = Callable[..., Any]


@dataclass
class Case:
    """One op: `chain` and `kernel` are functions of `inputs`; bytes moved, forward and forward + backward."""

    op: str
    chain: Function
    kernel: Function
    inputs: list[Tensor]
    forward_bytes: int
    both_bytes: int


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def llama_mlp_activation(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def llama_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((logits * 1).float(), labels)


def kernel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits * 1, labels)  # both copy: the gradient overwrites, and the leaf must survive


def llama_rotary(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """apply_rotary_pos_emb on q and k of a fused projection, and SDPA's layout for all three."""

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    heads = mixed.view(S, B, G, H // G + 2, HEAD).permute(1, 2, 3, 0, 4)
    q, k, v = heads.split((H // G, 1, 1), 2)
    cos, sin = (torch.cat((t, t), -1).to(mixed.dtype) for t in (cos, sin))
    q, k = (t.reshape(B, -1, S, HEAD) for t in (q, k))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v.reshape(B, G, S, HEAD)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Transformers: repeated keys and values."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def cases(dtype: torch.dtype) -> list[Case]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    n, e = S * B, torch.finfo(dtype).bits // 8
    labels = torch.randint(0, V, (n,))
    angles = torch.rand(S, HEAD // 2).cos(), torch.rand(S, HEAD // 2).sin()
    kernel_rotary = partial(split_qkv_rotary, num_groups=G, queries_per_group=H // G, head_dim=HEAD)
    q_bytes, kv_bytes = n * H * HEAD * e, n * G * HEAD * e
    found = [
        Case("rms_norm", llama_rms_norm, partial(rms_norm, eps=1e-5), [new(S, B, D), new(D)],
             2 * n * D * e, 5 * n * D * e),
        Case("swiglu", llama_mlp_activation, swiglu, [new(S, B, 2 * FFN)], 3 * n * FFN * e, 8 * n * FFN * e),
        Case("split_qkv_rotary", llama_rotary, kernel_rotary, [new(S, B, (H + 2 * G) * HEAD), *angles],
             2 * n * (H + 2 * G) * HEAD * e, 4 * n * (H + 2 * G) * HEAD * e),
        Case("cross_entropy", llama_loss, kernel_loss, [new(n, V), labels], 3 * n * V * e, 6 * n * V * e),
    ]
    # y = x wT, and the two products of its backward pass, on the gate-up projection's shape.
    x, w, g = (new(*shape).detach() for shape in ((n, D), (2 * FFN, D), (n, 2 * FFN)))
    moved = (n * D + 2 * FFN * D + n * 2 * FFN) * e
    found += [
        Case("linear forward", lambda x, w: x.mm(w.t()), matmul_nt, [x, w], moved, moved),
        Case("linear dgrad", lambda g, w: g.mm(w), matmul_nn, [g, w], moved, moved),
        Case("linear wgrad", lambda g, x: g.t().mm(x), matmul_tn, [g, x], moved, moved),
    ]
    for s in (256, 512, 1024):
        b = n // s
        found.append(Case(f"causal_attention s={s}", sdpa, causal_attention,
                          [new(b, H, s, HEAD), new(b, G, s, HEAD), new(b, G, s, HEAD)],
                          2 * q_bytes + 2 * kv_bytes, 6 * q_bytes + 6 * kv_bytes))
    return found


def forward(function: Function, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        function(*inputs)


def both(function: Function, inputs: list[Tensor], gradients: list[Tensor]) -> None:
    outputs = function(*inputs)
    for t in inputs:
        t.grad = None
    torch.autograd.backward(outputs if isinstance(outputs, tuple) else [outputs], gradients)


def interleaved(runs: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Milliseconds of each run, taken in turns after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(repeats + 2):
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if i >= 2:
                mine.append((time.perf_counter() - start) * 1e3)
    return times


@dataclass
class Row:
    op: str
    dtype: str
    threads: int
    part: str
    chain_ms: float
    kernel_ms: float
    ratio: float
    chain_min_ms: float
    kernel_min_ms: float
    kernel_gb_s: float
    copy_gb_s: float


def measure(case: Case, dtype: str, threads: int, repeats: int, copy_gb_s: float) -> list[Row]:
    outputs = case.chain(*case.inputs)
    gradients = [torch.randn_like(o) for o in (outputs if isinstance(outputs, tuple) else [outputs])]
    del outputs
    rows = []
    parts = [("forward", partial(forward, inputs=case.inputs), case.forward_bytes)]
    if any(t.requires_grad for t in case.inputs):
        parts.append(("both", partial(both, inputs=case.inputs, gradients=gradients), case.both_bytes))
    for part, one, size in parts:
        chain, kernel = interleaved([partial(one, case.chain), partial(one, case.kernel)], repeats)
        medians = statistics.median(chain), statistics.median(kernel)
        rows.append(Row(case.op, dtype, threads, part, *medians, medians[0] / medians[1], min(chain), min(kernel),
                        size / min(kernel) / 1e6, copy_gb_s))
    return rows


def copy_rate(repeats: int) -> float:
    """GB/s read and written by a copy between two warm tensors of 128 MB."""
    source, target = torch.ones(2**25), torch.zeros(2**25)
    return 2 * 2**27 / min(interleaved([lambda: target.copy_(source)], repeats)[0]) / 1e6


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each op")
    parser.add_argument("--ops", nargs="+", help="only ops whose name begins so")


def run(options: argparse.Namespace) -> list[harness.Row]:
    """The suite for benchmarks/run.py."""
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()  # on both sides alike: page faults would drown the ops
    copy_gb_s = copy_rate(options.repeats)
    found = [row for dtype in (torch.float32, torch.bfloat16) for case in cases(dtype)
             if not options.ops or case.op.startswith(tuple(options.ops))
             for row in measure(case, str(dtype).removeprefix("torch."), threads, options.repeats, copy_gb_s)]
    return [harness.Row(f"{row.op} {row.dtype} {row.part}",
                        {"threads": row.threads, "chain ms": row.chain_ms, "kernel ms": row.kernel_ms,
                         "x chain": row.ratio, "kernel GB/s": row.kernel_gb_s, "copy GB/s": row.copy_gb_s},
                        compare="x chain")
            for row in found]
