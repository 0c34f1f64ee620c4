"""Log-probabilities of given tokens from hidden states (preference and reward stages), over tensor-parallel ranks.

n tokens, h hidden, v this tensor rank's rows of the (padded) vocabulary. The work is
``engine_kernels.linear_cross_entropy``'s; this file knows the process group.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.losses import rows
from engine.losses.vocabulary import shard
from engine_kernels.linear_cross_entropy import linear_log_probs


def token_log_probs(
    hidden_nh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_n: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: Any = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(label) [n] of each token (fp32, nats, differentiable), and where asked its distribution's entropy [n].

    Negative labels are left out: 0, and no gradient. ``vocab_size`` is the real vocabulary: padding rows beyond it take
    no probability. Under tensor parallelism ``weight_vh`` holds this rank's rows, the results are the same on every
    rank and the gradient of ``hidden_nh`` is this rank's share. The distribution is softmax(logits / ``temperature``).
    The entropy has no gradient. Under ``torch.no_grad`` (a reference model) nothing is kept.

    Where a quarter of the labels or more are left out (prompts, padding), logits are made of the others alone. That
    waits for a GPU to count them, which costs less than the products it spares.
    """
    options = {"temperature": temperature, "entropy": entropy, "chunk_tokens": chunk_tokens, "impl": impl,
               **shard(weight_vh.shape[0], vocab_size, tp_group)}
    rows_k = rows.counted(labels_n >= 0, waits=True)
    if rows_k is None:
        return linear_log_probs(hidden_nh, weight_vh, labels_n, **options)
    logps_k, entropy_k = linear_log_probs(rows.take(hidden_nh, rows_k), weight_vh, labels_n[rows_k], **options)
    n = len(labels_n)
    return rows.put(logps_k, rows_k, n), None if entropy_k is None else rows.put(entropy_k, rows_k, n)
