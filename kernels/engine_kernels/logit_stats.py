"""What cross-entropy needs to know of a row of logits, from one read; shards of the vocabulary combine exactly.

n tokens, v columns of a shard, s statistics, r shards (tensor-parallel ranks, or parts of a row on one GPU), in order:

    0 max                    2 logit of the label (0 outside the shard)         4 sum of logits, where asked
    1 sum exp(logit - max)   3 1 if the label is the shard's first maximum      5 sum exp(logit - max) (logit - max)

s is 4, or 6 with zeros where not asked. Per token, with lse = max + log(sum), c classes in the whole vocabulary:

    loss = lse - (1 - smoothing) target - smoothing / c * sum of logits + z_loss lse^2,   entropy = log(sum) - [5] / sum

(label smoothing as torch's; z-loss: PaLM, arXiv:2204.02311.) A shard writes its own statistics, all shards are
gathered by one collective, and each rank combines them in the same order: the same bits everywhere, and among equal
maxima the first of the vocabulary counts. Labels are indices into the whole vocabulary. A row of a negative label is
ignored: not read, statistics -inf and zeros. Columns from vocab_valid on are padding. C++: csrc/cpu/cross_entropy.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton

_SPAN = 32768  # columns a program reads: 8192 rows of 131,072 are 32,768 programs, and the last wave of them is short


def logit_stats_reference(
    logits_nv: Tensor, labels_n: Tensor, vocab_start: int, vocab_valid: int, *, logit_sum: bool = False,
    entropy: bool = False,
) -> Tensor:
    """`logit_stats` in plain torch, in fp32 (fp64 for fp64 logits), as a single shard [1, s, n]."""
    x_nv = logits_nv[:, :vocab_valid]
    x_nv = x_nv if x_nv.dtype == torch.float64 else x_nv.float()
    stats_sn = x_nv.new_zeros(6 if logit_sum or entropy else 4, x_nv.shape[0])
    if not vocab_valid:
        stats_sn[0] = -torch.inf
        return stats_sn[None]
    max_n = x_nv.amax(-1)
    below_nv = x_nv - torch.where(max_n == -torch.inf, 0.0, max_n)[:, None]  # a row of -inf sums to 0, not to NaN
    local_n = labels_n - vocab_start
    here_n = (local_n >= 0) & (local_n < vocab_valid)
    target_n = x_nv.gather(1, local_n.clamp(0, vocab_valid - 1)[:, None])[:, 0]
    stats_sn[0], stats_sn[1], stats_sn[2] = max_n, below_nv.exp().sum(-1), torch.where(here_n, target_n, 0.0)
    stats_sn[3] = here_n & (x_nv.argmax(-1) == local_n)
    if logit_sum:
        stats_sn[4] = x_nv.sum(-1)
    if entropy:
        stats_sn[5] = (below_nv.exp() * below_nv.masked_fill(below_nv == -torch.inf, 0.0)).sum(-1)
    ignored_n = labels_n < 0
    stats_sn.masked_fill_(ignored_n, 0.0)[0].masked_fill_(ignored_n, -torch.inf)
    return stats_sn[None]


def combine_stats(stats_rsn: Tensor) -> Tensor:
    """The statistics [s, n] of the whole vocabulary from those of its shards [r, s, n], in plain torch."""
    if stats_rsn.shape[0] == 1:
        return stats_rsn[0]
    max_rn, sum_rn = stats_rsn[:, 0], stats_rsn[:, 1]
    max_n = max_rn.amax(0)
    below_rn = max_rn - torch.where(max_n == -torch.inf, 0.0, max_n)
    factor_rn = below_rn.exp()
    best_rn = max_rn == max_n
    first_rn = best_rn & (best_rn.cumsum(0) == 1)
    rows = [max_n, (sum_rn * factor_rn).sum(0), stats_rsn[:, 2].sum(0), (stats_rsn[:, 3] * first_rn).sum(0)]
    if stats_rsn.shape[1] == 6:
        moved_rn = stats_rsn[:, 5] + below_rn.masked_fill(below_rn == -torch.inf, 0.0) * sum_rn
        rows += [stats_rsn[:, 4].sum(0), (factor_rn * moved_rn).sum(0)]
    return torch.stack(rows)


def token_losses_reference(
    stats_rsn: Tensor, labels_n: Tensor, vocab_size: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`token_losses` in plain torch."""
    stats_sn = combine_stats(stats_rsn)
    lse_n = stats_sn[0] + stats_sn[1].log()
    if label_smoothing:
        loss_n = lse_n - (1 - label_smoothing) * stats_sn[2] - label_smoothing / vocab_size * stats_sn[4]
    else:
        loss_n = lse_n - stats_sn[2]
    if z_loss:
        loss_n = loss_n + z_loss * lse_n.square()
    loss_n = loss_n.masked_fill(labels_n >= vocab_size, torch.nan)
    return loss_n.masked_fill(labels_n < 0, 0.0), stats_sn


@triton.jit
def _absorb(x, column, first, label, target, top, early, total, logits, times, last, LOGIT_SUM: tl.constexpr,
            ENTROPY: tl.constexpr):
    """Takes a block of logits [groups, width] into the statistics, which each group keeps of its own.

    A group is what one thread loads at once: no thread waits for another, a sum is rescaled once in `width` columns.
    """
    group_top = tl.max(x, 1)
    new_top = tl.maximum(top, group_top)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    factor = tl.exp(top - shift)
    below = x - shift[:, None]
    e = tl.exp(below)
    if ENTROPY:
        moved = tl.where(top == float("-inf"), 0.0, top - shift)
        below = tl.where(below < -200.0, -200.0, below)  # -inf: 0 * 200
        times = factor * (times + moved * total) + tl.sum(e * below, 1)
    total = total * factor + tl.sum(e, 1)
    if LOGIT_SUM:
        logits += tl.sum(tl.where(column < last, x, 0.0), 1)
    if first < label:
        early = tl.maximum(early, tl.max(((column < label) & (x >= target)).to(tl.int32), 1))
    return new_top, early, total, logits, times


@triton.jit
def _stats_kernel(
    logits_ptr, labels_ptr, stats_ptr, n, row_stride, vocab_start, valid, span,
    STATS: tl.constexpr, LOGIT_SUM: tl.constexpr, ENTROPY: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program reads a part of one row, [first, last) of its columns."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    stats_ptr += part.to(tl.int64) * STATS * n + row
    label = tl.load(labels_ptr + row)
    if label < 0:
        tl.store(stats_ptr, float("-inf"))
        for k in range(1, STATS):
            tl.store(stats_ptr + k * n, 0.0)
        return
    first = part * span
    last = tl.minimum(first + span, valid)
    label -= vocab_start
    here = (label >= first) & (label < last)
    label = tl.where(here, label, -1).to(tl.int32)
    logits_ptr += row * row_stride
    target = tl.load(logits_ptr + label, mask=here, other=0.0).to(WIDE)
    top = tl.full((COLUMNS // WIDTH,), float("-inf"), WIDE)
    early = tl.zeros((COLUMNS // WIDTH,), tl.int32)  # whether a column before the label is as large
    total = tl.zeros((COLUMNS // WIDTH,), WIDE)
    logits, times = total, total
    lane = tl.arange(0, COLUMNS // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = first + tl.maximum(last - first, 0) // COLUMNS * COLUMNS
    for block in range(first, whole, COLUMNS):  # no mask: loads stay 16 bytes wide whatever `valid` is
        x = tl.load(logits_ptr + block + lane).to(WIDE)
        top, early, total, logits, times = _absorb(
            x, block + lane, block, label, target, top, early, total, logits, times, last, LOGIT_SUM, ENTROPY)
    if whole < last:
        x = tl.load(logits_ptr + whole + lane, mask=whole + lane < last, other=float("-inf")).to(WIDE)
        top, early, total, logits, times = _absorb(
            x, whole + lane, whole, label, target, top, early, total, logits, times, last, LOGIT_SUM, ENTROPY)
    row_top = tl.max(top, 0)
    shift = tl.where(row_top == float("-inf"), 0.0, row_top)
    factor = tl.exp(top - shift)
    tl.store(stats_ptr, row_top)
    tl.store(stats_ptr + n, tl.sum(total * factor, 0))
    tl.store(stats_ptr + 2 * n, target)
    tl.store(stats_ptr + 3 * n, (here & (target == row_top) & (tl.max(early, 0) == 0)).to(WIDE))
    if STATS == 6:
        moved = tl.where(top == float("-inf"), 0.0, top - shift)
        tl.store(stats_ptr + 4 * n, tl.sum(logits, 0))
        tl.store(stats_ptr + 5 * n, tl.sum(factor * (times + moved * total), 0))


@triton.jit
def _losses_kernel(
    stats_ptr, labels_ptr, loss_ptr, whole_ptr, n, shards, vocab_size, on_label, elsewhere, z_loss,
    STATS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):
    """`combine_stats` and the loss of each token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    top = tl.full((ROWS,), float("-inf"), WIDE)
    for r in range(shards):
        top = tl.maximum(top, tl.load(stats_ptr + r * STATS * n + row, mask=inside, other=0.0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((ROWS,), WIDE)
    target, hit, logits, times, seen = total, total, total, total, total
    for r in range(shards):
        at = stats_ptr + r * STATS * n + row
        own = tl.load(at, mask=inside, other=0.0)
        own_sum = tl.load(at + n, mask=inside, other=1.0)
        factor = tl.exp(own - shift)
        total += factor * own_sum
        target += tl.load(at + 2 * n, mask=inside, other=0.0)
        hit += tl.load(at + 3 * n, mask=inside, other=0.0) * ((own == top) & (seen == 0.0)).to(WIDE)
        seen += (own == top).to(WIDE)
        if STATS == 6:
            logits += tl.load(at + 4 * n, mask=inside, other=0.0)
            moved = tl.where(own == float("-inf"), 0.0, own - shift) * own_sum
            times += factor * (tl.load(at + 5 * n, mask=inside, other=0.0) + moved)
    tl.store(whole_ptr + row, top, mask=inside)
    tl.store(whole_ptr + n + row, total, mask=inside)
    tl.store(whole_ptr + 2 * n + row, target, mask=inside)
    tl.store(whole_ptr + 3 * n + row, hit, mask=inside)
    label = tl.load(labels_ptr + row, mask=inside, other=-1)
    counts = label >= 0
    lse = tl.where(counts, top, 0.0) + tl.log(tl.where(counts, total, 1.0))
    loss = lse - on_label * target + z_loss * lse * lse
    if STATS == 6:
        tl.store(whole_ptr + 4 * n + row, logits, mask=inside)
        tl.store(whole_ptr + 5 * n + row, times, mask=inside)
        loss -= elsewhere * logits
    loss = tl.where(counts, tl.where(label >= vocab_size, float("nan"), loss), 0.0)
    tl.store(loss_ptr + row, loss, mask=inside)


def row_blocks(logits_nv: Tensor) -> tuple[int, int, dict[str, int]]:
    """-> (parts of a row, columns of a part, options): 16 columns a thread, programs for every multiprocessor.

    Depends on the shard's padded width only, so that every tensor-parallel rank has as many parts.
    """
    n, v = logits_nv.shape
    columns = min(4096, max(128, jit.next_power_of_2(v)))
    filling = jit.cdiv(8 * jit.multiprocessors(logits_nv), max(n, 1))
    parts = min(jit.cdiv(v, columns), max(jit.cdiv(v, _SPAN), filling))
    span = jit.cdiv(jit.cdiv(v, parts), columns) * columns
    return jit.cdiv(v, span), span, {"COLUMNS": columns, "num_warps": max(1, columns // 512)}


@torch.library.custom_op("engine_kernels::logit_stats", mutates_args=())
def _stats(logits: Tensor, labels: Tensor, start: int, valid: int, logit_sum: bool, entropy: bool, impl: str) -> Tensor:
    stats_rsn = _stats_outputs(logits, labels, start, valid, logit_sum, entropy, impl)
    n, v = logits.shape
    logits_nv, labels = dispatch.as_rows(logits) if v else logits, labels.contiguous()
    if impl == "triton":
        parts, span, blocks = row_blocks(logits) if v else (1, 0, {"COLUMNS": 128})
        aligned = (logits_nv.data_ptr() | logits_nv.stride(0) * logits.element_size()) % 16 == 0
        if not aligned:  # a thread then loads single columns, and keeps the statistics of each
            blocks["COLUMNS"] = min(blocks["COLUMNS"], 2048)
        launch(_stats_kernel, (n, parts), logits_nv, labels, stats_rsn, n, logits_nv.stride(0), start, valid, span,
               STATS=stats_rsn.shape[1], LOGIT_SUM=logit_sum, ENTROPY=entropy, WIDE=jit.wide(logits),
               WIDTH=16 // logits.element_size() if aligned else 1, **blocks)
    else:
        dispatch.extension().cross_entropy_stats(
            dispatch.dtype_code(logits), logits_nv.data_ptr(), labels.data_ptr(), stats_rsn.data_ptr(), n, v, valid,
            logits_nv.stride(0), start, logit_sum, entropy, dispatch.num_threads(n * v))
    return stats_rsn


@_stats.register_fake
def _stats_outputs(logits, labels, start, valid, logit_sum, entropy, impl):
    parts = row_blocks(logits)[0] if impl == "triton" and logits.shape[1] else 1
    return logits.new_empty(parts, 6 if logit_sum or entropy else 4, logits.shape[0], dtype=jit.wide_dtype(logits))


@torch.library.custom_op("engine_kernels::token_losses", mutates_args=())
def _losses(stats: Tensor, labels: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
            ) -> tuple[Tensor, Tensor]:
    loss_n, whole_sn = _losses_outputs(stats, labels, vocab_size, label_smoothing, z_loss)
    shards, s, n = stats.shape
    launch(_losses_kernel, (jit.cdiv(n, 128),), stats.contiguous(), labels.contiguous(), loss_n, whole_sn, n, shards,
           vocab_size, 1.0 - label_smoothing, label_smoothing / max(vocab_size, 1), z_loss,
           STATS=s, WIDE=jit.wide(stats), ROWS=128, num_warps=4)
    return loss_n, whole_sn


@_losses.register_fake
def _losses_outputs(stats, labels, vocab_size, label_smoothing, z_loss):
    return stats.new_empty(stats.shape[2]), stats.new_empty(stats.shape[1:])


def check_logits(logits_nv: Tensor, labels_n: Tensor, vocab_valid: int | None) -> int:
    """-> the columns that are not padding. Raises ValueError for shapes that do not fit."""
    if logits_nv.dim() != 2 or labels_n.shape != logits_nv.shape[:1] or labels_n.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits {tuple(logits_nv.shape)} must be [n, v] and labels "
                         f"{tuple(labels_n.shape)} {labels_n.dtype} be [n] int64")
    v = logits_nv.shape[1]
    if vocab_valid is not None and not 0 <= vocab_valid <= v:
        raise ValueError(f"cross_entropy: vocab_valid {vocab_valid} must be in 0..{v}")
    return v if vocab_valid is None else vocab_valid


def logit_stats(
    logits_nv: Tensor, labels_n: Tensor, vocab_start: int = 0, vocab_valid: int | None = None, *,
    logit_sum: bool = False, entropy: bool = False, impl: str = "auto",
) -> Tensor:
    """Statistics [r, s, n] of a shard's logits [n, v] (columns vocab_start ... vocab_start + v of the vocabulary).

    fp32 (fp64 for fp64). r is 1 but where a GPU splits rows, and then the same on all shards of one width. Outside
    autograd. `vocab_valid`: this shard's columns that are not padding, default all. `logit_sum`, for label smoothing,
    and `entropy` ask for statistics 4 and 5. Raises ValueError for shapes that do not fit.
    """
    valid = check_logits(logits_nv, labels_n, vocab_valid)
    chosen = dispatch.choose(impl, "cross_entropy", {"logits": logits_nv}, {"labels": labels_n})
    if chosen == "torch":
        return logit_stats_reference(logits_nv.detach(), labels_n, vocab_start, valid, logit_sum=logit_sum,
                                     entropy=entropy)
    return torch.ops.engine_kernels.logit_stats(logits_nv.detach(), labels_n, vocab_start, valid, logit_sum, entropy,
                                                chosen)


def token_losses(
    stats_rsn: Tensor, labels_n: Tensor, vocab_size: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each token's loss [n] and the statistics [s, n] of the whole vocabulary, from all shards' [r, s, n] in its order.

    0 for an ignored token, NaN for a label of `vocab_size` or more. Smoothing needs `logit_sum` of `logit_stats`.
    Raises ValueError for label_smoothing outside [0, 1), a negative z_loss, or statistics without the logits' sum.
    """
    if not 0 <= label_smoothing < 1 or z_loss < 0:
        raise ValueError(f"cross_entropy: label_smoothing {label_smoothing} must be in [0, 1), "
                         f"z_loss {z_loss} at least 0")
    if label_smoothing and stats_rsn.shape[1] != 6:
        raise ValueError("cross_entropy: label_smoothing needs statistics with logit_sum=True")
    if impl == "cpu" or (impl == "auto" and stats_rsn.device.type == "cpu"):
        impl = "torch"  # a few numbers a token
    chosen = dispatch.choose(impl, "token_losses", {"stats": stats_rsn}, {"labels": labels_n}, kernels=("triton",))
    if chosen == "torch":
        return token_losses_reference(stats_rsn, labels_n, vocab_size, label_smoothing=label_smoothing, z_loss=z_loss)
    return torch.ops.engine_kernels.token_losses(stats_rsn, labels_n, vocab_size, label_smoothing, z_loss)


def token_entropy(stats_sn: Tensor) -> Tensor:
    """Entropy [n], in nats, of each token's distribution from combined statistics; 0 for an ignored token."""
    return torch.where(stats_sn[0] == -torch.inf, 0.0, stats_sn[1].log() - stats_sn[5] / stats_sn[1])
