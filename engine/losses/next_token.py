"""Next-token cross-entropy from hidden states, without ever holding all logits, over tensor-parallel ranks.

n tokens, h hidden, v this tensor rank's rows of the (padded) vocabulary. The work is
``engine_kernels.linear_cross_entropy``'s; this file knows the process group.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.losses import rows
from engine.losses.vocabulary import shard
from engine_kernels.linear_cross_entropy import linear_cross_entropy


def next_token_loss(
    hidden_nh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_n: torch.Tensor,
    weights_n: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: Any = None,
    scale: torch.Tensor | float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    impl: str = "auto",
    per_token: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the tokens' losses (nats), and how many supervised tokens were predicted exactly; with
    ``per_token`` 1 for each of the n tokens that was, else 0.

    ``weights_n`` is the loss mask (fp32; 0 leaves a token out). ``vocab_size`` is the real vocabulary: padding rows
    beyond it take no probability. Under tensor parallelism ``weight_vh`` holds this rank's rows and the gradient of
    ``hidden_nh`` is this rank's share. ``scale`` is multiplied into the gradients before they are rounded to the
    dtype of the hidden states and expected back in the gradient of the loss (fp16 loss scaling). The loss is
    cross-entropy, with ``label_smoothing`` as torch's, plus ``z_loss`` * logsumexp(logits)^2.
    """
    options = {"scale": scale, "label_smoothing": label_smoothing, "z_loss": z_loss, "chunk_tokens": chunk_tokens,
               "impl": impl, "per_token": per_token, **shard(weight_vh.shape[0], vocab_size, tp_group)}
    # In pretraining all tokens count, and a GPU should not be waited for to learn that.
    rows_k = rows.counted((weights_n != 0) & (labels_n >= 0), waits=False)
    if rows_k is None:
        return linear_cross_entropy(hidden_nh, weight_vh, labels_n, weights_n=weights_n, **options)
    loss, correct = linear_cross_entropy(rows.take(hidden_nh, rows_k), weight_vh, labels_n[rows_k],
                                         weights_n=weights_n[rows_k], **options)
    return loss, rows.put(correct, rows_k, len(labels_n)) if per_token else correct
