"""Loss, perplexity and token accuracy on a held-out split, with the training loss's own code."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from engine.data.loader import Loader, uncounted
from engine.model import forward
from engine.model.objective import NEXT_TOKEN, Objective
from engine.parallel.topology import Groups


@torch.no_grad()
def evaluate(
    chunks: list[Any],
    loader: Loader,
    groups: Groups,
    *,
    micro_batch_size: int,
    seq_length: int,
    max_sequences: int | None = None,
    objective: Objective = NEXT_TOKEN,
) -> dict[str, float]:
    """Every token of the split (or of its first ``max_sequences`` rows) predicted once, in file order.

    Returns loss (nats a token), the objective's metrics (by default perplexity and accuracy, the share of tokens
    predicted exactly), tokens (or what else the loss is a mean over), tokens_per_sec.
    Collective over all ranks; the same numbers on each, and under every layout.
    """
    training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    sums = forward.LossSums(0.0, 0, 0)
    start = time.perf_counter()
    batches = loader.evaluation_batches(micro_batch_size, seq_length, max_sequences)
    # A few micro-batches a call keep a pipeline busy without holding the whole split in memory.
    stages = groups.pg.pp.size()
    for some in iter(lambda: list(itertools.islice(batches, 2 * stages)), []):
        while len(chunks) > 1 and len(some) % stages:  # interleaving needs whole rounds: one that counts nothing
            some.append(uncounted(some[-1]))
        sums += forward.run(chunks, some, groups, num_micro_batches=len(some), micro_batch_size=micro_batch_size,
                            seq_length=seq_length, forward_only=True, objective=objective)
    for chunk in chunks:
        chunk.train(training)
    seconds = time.perf_counter() - start
    return {
        "loss": sums.loss,
        **objective.metrics(sums),
        "tokens": sums.tokens,
        "tokens_per_sec": sums.tokens / seconds,
    }
