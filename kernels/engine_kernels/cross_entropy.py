"""Cross-entropy over a vocabulary that may be split over processes: its gradient, and the whole op on one process.

    loss_n = lse - (1 - smoothing) logit[label] - smoothing / c * sum(logits) + z_loss lse^2,   lse = log(sum_exp) + max
    dlogits = ((1 + 2 z_loss lse) exp(logits - max) / sum_exp - (1 - smoothing) onehot(label) - smoothing / c) * weight

`logit_stats.py` reads the logits once; over several shards the caller gathers the statistics. `cross_entropy_grad_`
then overwrites the shard's logits with the gradient: one read, one write. No probabilities are stored, no fp32 copy of
bf16 logits is made: at 8192 columns those fresh tensors, through page faults, cost more than the arithmetic on a CPU.

Shapes: n tokens, v columns of this shard, c classes of the whole vocabulary, s statistics. Labels are indices into the
whole vocabulary; a negative one is ignored: zero loss, zero gradient. Columns from vocab_valid on are padding: ignored,
zero gradient. C++: csrc/cpu/cross_entropy.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton
from engine_kernels.logit_stats import check_logits, logit_stats, row_blocks, token_losses


def cross_entropy_grad_reference(
    logits_nv: Tensor, labels_n: Tensor, max_n: Tensor, sum_exp_n: Tensor, weight_n: Tensor, *, vocab_start: int,
    vocab_valid: int, vocab_size: int, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:
    """The gradient in plain torch, as a new tensor of the logits' dtype."""
    wide = logits_nv if logits_nv.dtype == torch.float64 else logits_nv.float()
    grad_nv = (wide - max_n[:, None]).exp() / sum_exp_n[:, None]
    if z_loss:
        grad_nv *= 1 + 2 * z_loss * (max_n + sum_exp_n.log())[:, None]
    local_n = labels_n - vocab_start
    here_n = (local_n >= 0) & (local_n < vocab_valid)
    rows = here_n.nonzero()[:, 0]
    grad_nv[rows, local_n[rows]] -= 1 - label_smoothing
    if label_smoothing:
        grad_nv -= label_smoothing / vocab_size
    grad_nv *= weight_n[:, None]
    grad_nv[:, vocab_valid:] = 0
    grad_nv[(labels_n < 0) | (weight_n == 0)] = 0
    return grad_nv.to(logits_nv.dtype)


@triton.jit
def _slope(x, column, label, top, scale, on_label, elsewhere, valid):
    gradient = tl.exp(x - top) * scale - elsewhere
    gradient = tl.where(column == label, gradient - on_label, gradient)
    return tl.where(column < valid, gradient, 0.0)


@triton.jit
def _grad_kernel(
    logits_ptr, labels_ptr, max_ptr, sum_ptr, weight_ptr, row_stride, vocab_start, v, valid, span, on_label, elsewhere,
    z_loss, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One program reads and overwrites a part of one row, [first, last) of its columns, padding included."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, v)
    whole = first + tl.maximum(last - first, 0) // COLUMNS * COLUMNS
    lane = tl.arange(0, COLUMNS)
    label = tl.load(labels_ptr + row)
    weight = tl.load(weight_ptr + row).to(WIDE)
    if (label < 0) | (weight == 0.0):  # exact zeros, whatever the logits
        for block in range(first, last, COLUMNS):
            tl.store(logits_ptr + block + lane, 0.0, mask=block + lane < last)
        return
    label -= vocab_start
    label = tl.where((label >= 0) & (label < valid), label, -1).to(tl.int32)
    top, total = tl.load(max_ptr + row), tl.load(sum_ptr + row)
    scale = (1.0 + 2.0 * z_loss * (top + tl.log(total))) * (weight / total)
    on_label, elsewhere = on_label * weight, elsewhere * weight
    for block in range(first, whole, COLUMNS):
        x = tl.load(logits_ptr + block + lane).to(WIDE)
        gradient = _slope(x, block + lane, label, top, scale, on_label, elsewhere, valid)
        tl.store(logits_ptr + block + lane, gradient.to(logits_ptr.dtype.element_ty))
    if whole < last:
        x = tl.load(logits_ptr + whole + lane, mask=whole + lane < last, other=0.0).to(WIDE)
        gradient = _slope(x, whole + lane, label, top, scale, on_label, elsewhere, valid)
        tl.store(logits_ptr + whole + lane, gradient.to(logits_ptr.dtype.element_ty), mask=whole + lane < last)


@torch.library.custom_op("engine_kernels::cross_entropy_grad_", mutates_args=("logits",))
def _grad_(
    logits: Tensor, labels: Tensor, max_n: Tensor, sum_exp_n: Tensor, weight_n: Tensor, start: int, valid: int,
    on_label: float, elsewhere: float, z_loss: float, impl: str,
) -> None:
    n, v = logits.shape
    if not n * v:
        return
    wide = jit.wide_dtype(logits)
    labels, weight_n = labels.contiguous(), weight_n.to(wide).contiguous()
    max_n, sum_exp_n = max_n.to(wide).contiguous(), sum_exp_n.to(wide).contiguous()
    if impl == "triton":
        parts, span, blocks = row_blocks(logits)
        launch(_grad_kernel, (n, parts), logits, labels, max_n, sum_exp_n, weight_n, logits.stride(0), start, v, valid,
               span, on_label, elsewhere, z_loss, WIDE=jit.wide(logits), **blocks)
    else:
        dispatch.extension().cross_entropy_grad(
            dispatch.dtype_code(logits), logits.data_ptr(), labels.data_ptr(), max_n.data_ptr(), sum_exp_n.data_ptr(),
            weight_n.data_ptr(), n, v, valid, logits.stride(0), start, on_label, elsewhere, z_loss,
            dispatch.num_threads(n * v))


@_grad_.register_fake
def _(logits, labels, max_n, sum_exp_n, weight_n, start, valid, on_label, elsewhere, z_loss, impl) -> None:
    return None


def cross_entropy_grad_(
    logits_nv: Tensor, labels_n: Tensor, stats_sn: Tensor, weight_n: Tensor, *, vocab_start: int = 0,
    vocab_valid: int | None = None, vocab_size: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Overwrite the logits [n, v] with the loss's gradient times weight_n, and return them.

    stats_sn: of the whole vocabulary (`token_losses`; the maxima and sums are used). weight_n: the loss's derivative by
    each token's loss; rows of weight 0 and of negative labels become exact zeros. vocab_size: of the whole vocabulary,
    for smoothing; default vocab_valid. The caller must be the last reader of the logits; their autograd version counter
    is bumped, so a later backward pass that needs them fails, it does not use the gradient.
    """
    valid = check_logits(logits_nv, labels_n, vocab_valid)
    classes = valid if vocab_size is None else vocab_size
    logits_nv, max_n, sum_exp_n = logits_nv.detach(), stats_sn[0], stats_sn[1]
    others = {"labels": labels_n, "stats": stats_sn, "weight": weight_n}
    chosen = dispatch.choose(impl, "cross_entropy", {"logits": logits_nv}, others)
    if chosen == "torch" or (logits_nv.shape[1] > 1 and logits_nv.stride(1) != 1):
        return logits_nv.copy_(cross_entropy_grad_reference(
            logits_nv, labels_n, max_n, sum_exp_n, weight_n, vocab_start=vocab_start, vocab_valid=valid,
            vocab_size=classes, label_smoothing=label_smoothing, z_loss=z_loss))
    torch.ops.engine_kernels.cross_entropy_grad_(
        logits_nv, labels_n, max_n, sum_exp_n, weight_n, vocab_start, valid, 1.0 - label_smoothing,
        label_smoothing / max(classes, 1), z_loss, chosen)
    return logits_nv


class _CrossEntropy(torch.autograd.Function):
    """Per-token loss on one shard; the backward pass writes the gradient into the saved logits."""

    @staticmethod
    def forward(ctx, logits_nv: Tensor, labels_n: Tensor, valid: int, label_smoothing: float, z_loss: float, impl: str
                ) -> Tensor:
        stats_rsn = logit_stats(logits_nv, labels_n, 0, valid, logit_sum=label_smoothing > 0, impl=impl)
        loss_n, stats_sn = token_losses(stats_rsn, labels_n, valid, label_smoothing=label_smoothing, z_loss=z_loss,
                                        impl=impl)
        ctx.save_for_backward(logits_nv, labels_n, stats_sn)
        ctx.options = {"vocab_valid": valid, "label_smoothing": label_smoothing, "z_loss": z_loss, "impl": impl}
        return loss_n

    @staticmethod
    def backward(ctx, dloss_n: Tensor):
        logits_nv, labels_n, stats_sn = ctx.saved_tensors
        if torch.compiler.is_compiling():  # a compiled graph may not write into what it saved
            logits_nv = logits_nv.clone()
        grad_nv = cross_entropy_grad_(logits_nv, labels_n, stats_sn, dloss_n, **ctx.options)
        return grad_nv, None, None, None, None, None


def cross_entropy(
    logits: Tensor, labels: Tensor, *, vocab_valid: int | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0, impl: str = "auto",
) -> Tensor:
    """Cross-entropy, in nats, of logits [..., v] against labels [...] (int64) on one process; fp32 (fp64 for fp64).

    Negative labels are ignored. reduction: "mean" over the tokens that count (0 if none does), "sum", or "none" for
    [...]. label_smoothing as torch's; z_loss: coefficient of logsumexp^2. The backward pass overwrites the logits with
    their gradient: no second backward pass, read them before. Raises ValueError for shapes that do not fit, a label
    outside the vocabulary (on a GPU, which is not waited for, such a label's loss is NaN) or an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'cross_entropy: reduction must be "mean", "sum" or "none", not {reduction!r}')
    logits_nv, labels_n = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    valid = check_logits(logits_nv, labels_n, vocab_valid)
    on_cpu = labels_n.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and labels_n.numel() and (top := int(labels_n.max())) >= valid:
        raise ValueError(f"cross_entropy: label {top} in a vocabulary of {valid}")
    loss_n = _CrossEntropy.apply(logits_nv, labels_n, valid, label_smoothing, z_loss, impl)
    if reduction == "none":
        return loss_n.view(labels.shape)
    total = loss_n.sum()
    return total if reduction == "sum" else total / (labels_n >= 0).sum().clamp(min=1)
