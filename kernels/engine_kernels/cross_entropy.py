"""Cross-entropy over a vocabulary that may be split over processes, in one pass over the logits each way.

    loss_n = log(sum_exp_n) + max_n - target_n,   dlogits = (exp(logits - max) / sum_exp - onehot(label)) * weight

`cross_entropy_stats` gives a shard's max, sum of exp(logit - max) and target logit. Over several shards the caller
all-reduces: max_all = MAX(max); sum_all = SUM(sum_exp * exp(max - max_all)); target_all = SUM(target). Then
`cross_entropy_grad_` overwrites the shard's logits with the gradient. No probabilities are stored, no fp32 copy of bf16
logits is made: at 8192 columns those fresh tensors, through page faults, cost more than the arithmetic.

Shapes: n tokens, v columns of this shard. Labels are indices into the whole vocabulary; a negative one is ignored: zero
loss, zero gradient. Columns from vocab_valid on are padding: ignored, zero gradient. C++: csrc/cpu/cross_entropy.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch


def cross_entropy_stats_reference(
    logits_nv: Tensor, labels_n: Tensor, vocab_start: int, vocab_valid: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cross_entropy_stats` in plain torch, in fp32 (fp64 for fp64 logits)."""
    wide = logits_nv[:, :vocab_valid]
    wide = wide if wide.dtype == torch.float64 else wide.float()
    if not vocab_valid:
        zero_n = wide.new_zeros(wide.shape[0])
        return zero_n - torch.inf, zero_n, zero_n.clone(), zero_n.bool()
    max_n = wide.amax(-1)
    shift_n = torch.where(max_n == -torch.inf, 0.0, max_n)  # a row of -inf sums to 0, not to NaN
    sum_exp_n = (wide - shift_n[:, None]).exp().sum(-1)
    local_n = labels_n - vocab_start
    here_n = (labels_n >= 0) & (local_n >= 0) & (local_n < vocab_valid)
    target_n = wide.gather(1, local_n.clamp(0, vocab_valid - 1)[:, None])[:, 0]
    hit_n = here_n & (wide.argmax(-1) == local_n)
    return max_n, sum_exp_n, torch.where(here_n, target_n, 0.0), hit_n


def cross_entropy_grad_reference(
    logits_nv: Tensor, labels_n: Tensor, vocab_start: int, vocab_valid: int, max_n: Tensor, sum_exp_n: Tensor,
    weight_n: Tensor,
) -> Tensor:
    """The gradient in plain torch, as a new tensor of the logits' dtype."""
    wide = logits_nv if logits_nv.dtype == torch.float64 else logits_nv.float()
    grad_nv = (wide - max_n[:, None]).exp() / sum_exp_n[:, None]
    local_n = labels_n - vocab_start
    here_n = (local_n >= 0) & (local_n < vocab_valid)
    rows = here_n.nonzero()[:, 0]
    grad_nv[rows, local_n[rows]] -= 1
    grad_nv *= weight_n[:, None]
    grad_nv[:, vocab_valid:] = 0
    grad_nv[(labels_n < 0) | (weight_n == 0)] = 0
    return grad_nv.to(logits_nv.dtype)


def _check(logits_nv: Tensor, labels_n: Tensor, vocab_valid: int | None) -> int:
    if logits_nv.dim() != 2 or labels_n.shape != logits_nv.shape[:1] or labels_n.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits {tuple(logits_nv.shape)} must be [n, v] and labels "
                         f"{tuple(labels_n.shape)} {labels_n.dtype} be [n] int64")
    v = logits_nv.shape[1]
    if vocab_valid is not None and not 0 <= vocab_valid <= v:
        raise ValueError(f"cross_entropy: vocab_valid {vocab_valid} must be in 0..{v}")
    return v if vocab_valid is None else vocab_valid


@torch.library.custom_op("engine_kernels::cross_entropy_stats", mutates_args=(), device_types="cpu")
def _stats(logits: Tensor, labels: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, v = logits.shape
    max_n, sum_exp_n, target_n = (torch.empty(n, dtype=torch.float32) for _ in range(3))
    hit_n = torch.empty(n, dtype=torch.bool)
    logits = dispatch.as_rows(logits) if v else logits
    labels = labels.contiguous()
    dispatch.extension().cross_entropy_stats(
        dispatch.dtype_code(logits), logits.data_ptr(), labels.data_ptr(), max_n.data_ptr(), sum_exp_n.data_ptr(),
        target_n.data_ptr(), hit_n.data_ptr(), n, v, valid, logits.stride(0), start, dispatch.num_threads(n * v),
    )
    return max_n, sum_exp_n, target_n, hit_n


@_stats.register_fake
def _(logits: Tensor, labels: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = [logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3)]
    return new[0], new[1], new[2], logits.new_empty(logits.shape[0], dtype=torch.bool)


@torch.library.custom_op("engine_kernels::cross_entropy_grad_", mutates_args=("logits",), device_types="cpu")
def _grad_(
    logits: Tensor, labels: Tensor, start: int, valid: int, max_n: Tensor, sum_exp_n: Tensor, weight_n: Tensor
) -> None:
    n, v = logits.shape
    if not n * v:
        return
    labels, max_n, sum_exp_n = labels.contiguous(), max_n.float().contiguous(), sum_exp_n.float().contiguous()
    weight_n = weight_n.float().contiguous()
    dispatch.extension().cross_entropy_grad(
        dispatch.dtype_code(logits), logits.data_ptr(), labels.data_ptr(), max_n.data_ptr(), sum_exp_n.data_ptr(),
        weight_n.data_ptr(), n, v, valid, logits.stride(0), start, dispatch.num_threads(n * v),
    )


@_grad_.register_fake
def _(logits, labels, start, valid, max_n, sum_exp_n, weight_n) -> None:
    return None


def cross_entropy_stats(
    logits_nv: Tensor, labels_n: Tensor, vocab_start: int = 0, vocab_valid: int | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of one shard's logits [n, v] (columns vocab_start ... vocab_start + v of the vocabulary).

    Returns max_n, sum_exp_n and target_n (0 where the label is not in this shard or is ignored), fp32, and hit_n, bool:
    the label is in this shard and is its first maximum, argmax(logits) == label. Over several shards the prediction is
    right where hit_n holds on a shard and max_n equals the all-reduced maximum. Outside autograd. `vocab_valid`: this
    shard's columns that are not padding, default all. Raises ValueError for shapes that do not fit.
    """
    valid = _check(logits_nv, labels_n, vocab_valid)
    if dispatch.choose(impl, "cross_entropy", {"logits": logits_nv}, {"labels": labels_n}, kernels=("cpu",)) == "torch":
        return cross_entropy_stats_reference(logits_nv.detach(), labels_n, vocab_start, valid)
    return torch.ops.engine_kernels.cross_entropy_stats(logits_nv.detach(), labels_n, vocab_start, valid)


def cross_entropy_grad_(
    logits_nv: Tensor, labels_n: Tensor, vocab_start: int, max_n: Tensor, sum_exp_n: Tensor, weight_n: Tensor,
    vocab_valid: int | None = None, *, impl: str = "auto",
) -> Tensor:
    """Overwrite the logits [n, v] with (softmax - onehot) * weight_n, and return them.

    max_n, sum_exp_n: of the whole vocabulary (all-reduced). weight_n: the loss's derivative by each token's loss; rows
    of weight 0 and of negative labels become exact zeros. The caller must be the last reader of the logits; their
    autograd version counter is bumped, so a later backward pass that needs them fails, it does not use the gradient.
    """
    valid = _check(logits_nv, labels_n, vocab_valid)
    logits_nv = logits_nv.detach()
    others = {"labels": labels_n, "max": max_n, "sum_exp": sum_exp_n, "weight": weight_n}
    if dispatch.choose(impl, "cross_entropy", {"logits": logits_nv}, others, kernels=("cpu",)) == "torch" or logits_nv.stride(1) != 1:
        return logits_nv.copy_(cross_entropy_grad_reference(
            logits_nv, labels_n, vocab_start, valid, max_n, sum_exp_n, weight_n))
    torch.ops.engine_kernels.cross_entropy_grad_(
        logits_nv, labels_n, vocab_start, valid, max_n, sum_exp_n, weight_n)
    return logits_nv


class _CrossEntropy(torch.autograd.Function):
    """Per-token loss on one shard; the backward pass writes the gradient into the saved logits."""

    @staticmethod
    def forward(ctx, logits_nv: Tensor, labels_n: Tensor, valid: int, impl: str) -> Tensor:
        max_n, sum_exp_n, target_n, _ = cross_entropy_stats(logits_nv, labels_n, 0, valid, impl=impl)
        ctx.save_for_backward(logits_nv, labels_n, max_n, sum_exp_n)
        ctx.valid, ctx.impl = valid, impl
        return torch.where(labels_n < 0, 0.0, sum_exp_n.log() + max_n - target_n)

    @staticmethod
    def backward(ctx, dloss_n: Tensor):
        logits_nv, labels_n, max_n, sum_exp_n = ctx.saved_tensors
        if torch.compiler.is_compiling():  # a compiled graph may not write into what it saved
            logits_nv = logits_nv.clone()
        grad_nv = cross_entropy_grad_(
            logits_nv, labels_n, 0, max_n, sum_exp_n, dloss_n, ctx.valid, impl=ctx.impl)
        return grad_nv, None, None, None


def cross_entropy(
    logits: Tensor, labels: Tensor, *, vocab_valid: int | None = None, reduction: str = "mean", impl: str = "auto"
) -> Tensor:
    """Cross-entropy, in nats, of logits [..., v] against labels [...] (int64) on one process.

    Negative labels are ignored. reduction: "mean" over the tokens that count (0 if none does), "sum", or "none" for
    [...]. The backward pass overwrites the logits with their gradient: no second backward pass, read them before.
    Raises ValueError for shapes that do not fit, a label outside the vocabulary or an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'cross_entropy: reduction must be "mean", "sum" or "none", not {reduction!r}')
    logits_nv, labels_n = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    valid = _check(logits_nv, labels_n, vocab_valid)
    if labels_n.numel() and not torch.compiler.is_compiling() and (top := int(labels_n.max())) >= valid:
        raise ValueError(f"cross_entropy: label {top} in a vocabulary of {valid}")
    loss_n = _CrossEntropy.apply(logits_nv, labels_n, valid, impl)
    if reduction == "none":
        return loss_n.view(labels.shape)
    total = loss_n.sum()
    return total if reduction == "sum" else total / (labels_n >= 0).sum().clamp(min=1)
