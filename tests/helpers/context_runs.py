"""Runs whose ranks share sequences, and what three steps of one leave behind: shared by tests and their ranks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import tiny
import torch

from engine.config import Config


class PackedLoader:
    """Rows of documents that end where the row's own tokens say: other places in every row, some after one token."""

    def __init__(self, inner: Any):
        self.inner = inner

    def micro_batches(self, *args: Any, **kwargs: Any):
        for batch in self.inner.micro_batches(*args, **kwargs):
            batch = copy.copy(batch)
            length = batch.tokens_bs.shape[1]
            batch.cu_seqlens_b, batch.position_ids_bs = [], batch.position_ids_bs.clone()
            for row, tokens in enumerate(batch.tokens_bs.tolist()):
                ends = sorted({0, length, 1 + tokens[0] % (length - 1), 1 + tokens[1] % (length - 1)})
                batch.cu_seqlens_b.append(torch.tensor(ends, dtype=torch.int32))
                for first, end in itertools.pairwise(ends):
                    batch.position_ids_bs[row, first:end] = torch.arange(end - first)
            yield batch


def three_steps(cfg: Config, packed: bool) -> dict[str, Any]:
    """Initial weights; losses, tokens, predictions and norms of each step; the first's gradients; weights afterwards;
    the last loss again, evaluated. All of the unsplit model, on every rank. Loss masks are uneven."""
    from engine.evaluation.perplexity import evaluate

    run = tiny.start(cfg, masked=True)
    if packed:
        run.data = PackedLoader(run.data)
    found: dict[str, Any] = {"initial": tiny.whole_weights(run), "gradients": None}
    results = []
    for _ in range(3):
        results.append(run.step())
        if found["gradients"] is None and not cfg.parallel.distributed_optimizer:  # which keeps a part on each rank
            found["gradients"] = tiny.whole_weights(run, lambda p: p.main_grad)
    data = run.data.inner.inner if packed else run.data.inner
    scores = evaluate(run.chunks, data, run.groups, micro_batch_size=2, seq_length=tiny.SEQ, max_sequences=6)
    sums = [r.sums for r in results]
    return found | {"losses": [s.loss for s in sums] + [scores["loss"]], "norms": [r.grad_norm for r in results],
                    "counts": [(s.tokens, s.correct) for s in sums] + [scores["tokens"]],
                    "weights": tiny.whole_weights(run)}


def differences(found: dict, expected: dict, bound: float) -> list[str]:
    """What is not equal: initial weights and counts of tokens exactly, the rest by more than ``bound``, norm-wise."""
    wrong = [f"{name} initially" for name, value in expected["initial"].items()
             if not torch.equal(value, found["initial"][name])]
    if bound < 1e-4 and found["counts"] != expected["counts"]:  # bf16 may predict another token
        wrong.append(f"counts {found['counts']} for {expected['counts']}")
    for name in ("losses", "norms"):
        for a, b in zip(found[name], expected[name], strict=True):
            if not abs(a - b) <= bound * b:
                wrong.append(f"{name} {found[name]} for {expected[name]}")
    for kind in ("gradients", "weights"):
        if found[kind] is None or expected[kind] is None:
            continue
        assert found[kind].keys() == expected[kind].keys(), found[kind].keys() ^ expected[kind].keys()
        for name, value in expected[kind].items():
            error = ((found[kind][name].double() - value.double()).norm() / value.double().norm()).item()
            if not error <= bound:
                wrong.append(f"{kind}: {name} is off by {error:.1e}")
    return wrong
