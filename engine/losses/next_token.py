"""Next-token cross-entropy from hidden states, without ever holding all logits.

n tokens, h hidden, v this tensor rank's rows of the (padded) vocabulary.

A chunk of tokens at a time is projected to logits, turned into losses, and its gradient is written over the logits and
multiplied back at once; so the logits of a chunk are the only large tensor, and nothing is recomputed. Gradients are
therefore made in the forward pass, which is possible because each token's weight is known then; backward only scales
them. Under tensor parallelism the statistics of each chunk are reduced over the ranks (three values a token).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from engine_kernels.cross_entropy import cross_entropy_grad_, cross_entropy_stats
from engine_kernels.linear import matmul_nn, matmul_nt, matmul_tn

_CHUNK_BYTES = 64 << 20  # of logits: in a GPU's L2-sized pieces larger chunks gain nothing, on a CPU smaller ones lose


def chunk_tokens(vocab_rows: int, dtype: torch.dtype) -> int:
    """Tokens per chunk so that its logits stay near 64 MiB; a multiple of 128 for the matrix units."""
    return max(128, _CHUNK_BYTES // (vocab_rows * dtype.itemsize) // 128 * 128)


def _reduce_stats(stats, tp_group):
    """This rank's maximum, sum of exponentials and target logit -> those of the whole vocabulary."""
    max_n, sum_n, target_n, best_n = stats
    if tp_group is None or tp_group.size() == 1:
        return max_n, sum_n, target_n, best_n
    local_max = max_n.clone()
    dist.all_reduce(max_n, op=dist.ReduceOp.MAX, group=tp_group)
    # A rank whose maximum is below the vocabulary's cannot hold the best token.
    best = best_n.float() * (local_max == max_n)
    packed = torch.stack([sum_n * torch.exp(local_max - max_n), target_n, best])
    dist.all_reduce(packed, group=tp_group)
    return max_n, packed[0], packed[1], packed[2] > 0


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nh, weight_vh, labels_n, weights_n, tp_group, vocab_start, vocab_valid, scale, impl):
        needs_grad = hidden_nh.requires_grad or weight_vh.requires_grad
        grad_h = torch.empty_like(hidden_nh) if needs_grad else None
        grad_w = None
        losses, correct = [], []
        size = chunk_tokens(weight_vh.shape[0], hidden_nh.dtype)
        for i in range(0, hidden_nh.shape[0], size):
            h, labels, weights = hidden_nh[i : i + size], labels_n[i : i + size], weights_n[i : i + size]
            logits = matmul_nt(h, weight_vh)
            stats = cross_entropy_stats(logits, labels, vocab_start, vocab_valid=vocab_valid, impl=impl)
            max_n, sum_n, target_n, best_n = _reduce_stats(stats, tp_group)
            losses.append((max_n + sum_n.log() - target_n) * weights)
            correct.append(best_n * (weights > 0))
            if grad_h is None:
                continue
            cross_entropy_grad_(logits, labels, vocab_start, max_n, sum_n, weights * scale,
                                vocab_valid=vocab_valid, impl=impl)
            grad_h[i : i + size] = matmul_nn(logits, weight_vh)
            part = matmul_tn(logits, h)
            # The sum over chunks is kept in fp32; a single chunk needs no copy.
            if hidden_nh.shape[0] > size:
                part = part.float()
            grad_w = part if grad_w is None else grad_w.add_(part)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.scale, ctx.weight_dtype = scale, weight_vh.dtype
        correct_sum = torch.cat(correct).sum()
        ctx.mark_non_differentiable(correct_sum)
        return torch.cat(losses).sum(), correct_sum

    @staticmethod
    def backward(ctx, grad_loss, _grad_correct):
        grad_h, grad_w = ctx.saved_tensors
        factor = grad_loss / ctx.scale
        if factor.device.type != "cpu" or factor.item() != 1.0:
            grad_h, grad_w = grad_h * factor.to(grad_h.dtype), grad_w * factor.to(grad_w.dtype)
        return grad_h, grad_w.to(ctx.weight_dtype), None, None, None, None, None, None, None


def next_token_loss(
    hidden_nh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_n: torch.Tensor,
    weights_n: torch.Tensor,
    *,
    vocab_size: int,
    tp_group=None,
    scale: torch.Tensor | float = 1.0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the tokens' cross-entropies (nats), and how many supervised tokens were predicted exactly.

    ``weights_n`` is the loss mask (fp32; 0 leaves a token out). ``vocab_size`` is the real vocabulary: padding rows
    beyond it take no probability. Under tensor parallelism ``weight_vh`` holds this rank's rows and the gradient of
    ``hidden_nh`` is this rank's share. ``scale`` is multiplied into the gradients before they are rounded to the
    dtype of the hidden states and expected back in the gradient of the loss (fp16 loss scaling).
    """
    rank = tp_group.rank() if tp_group is not None else 0
    rows = weight_vh.shape[0]
    start = rank * rows
    valid = max(0, min(rows, vocab_size - start))
    return _LinearCrossEntropy.apply(hidden_nh, weight_vh, labels_n, weights_n, tp_group, start, valid, scale, impl)
