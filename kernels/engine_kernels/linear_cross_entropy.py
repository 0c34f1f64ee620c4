"""From hidden states to the loss, or to each label's log-probability, without ever holding all logits.

    logits = hidden weightᵀ,   loss = sum over tokens of weights * cross_entropy(logits, labels)   (cross_entropy.py)
    logps = logits[label] - logsumexp(logits)

n tokens, c those of a chunk, h hidden, v this shard's rows of the (padded) vocabulary, r shards, s statistics.

A chunk of tokens at a time is projected to logits, which are the only large tensor, and the gradient is written over
them and multiplied back at once. The loss does that in its forward pass, which is possible because each token's weight
is known then: nothing is recomputed, backward only scales. The log-probabilities' weights are known in backward only,
so it projects each chunk again. Chunks are few and large: a weight gradient in fp32 is read and written for each, and
the products fill a GPU. No op here is a kernel of its own: the products are torch's, the rest is `logit_stats` and
`cross_entropy_grad_`, and it runs where they run.

Over several shards of the vocabulary `combine` gathers their statistics, [r, s, n] of this one -> of all in the
vocabulary's order; it is called once a chunk. The gradient of hidden is then this shard's share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine_kernels import jit
from engine_kernels.cross_entropy import cross_entropy_grad_
from engine_kernels.linear import add_matmul_tn_, matmul_nn, matmul_nt, matmul_tn
from engine_kernels.logit_stats import logit_stats, token_entropy, token_losses

Combine = Callable[[Tensor], Tensor]
# Of logits in a chunk. On a CPU what does not fit its caches costs more than the products gain.
_CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}


def linear_cross_entropy_reference(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, weights_n: Tensor, *, vocab_valid: int | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:
    """The loss of one process in plain torch, with all logits at once, in fp32 (fp64 for fp64)."""
    logps_nv, lse_n = _reference_logps(hidden_nh, weight_vh, vocab_valid)
    loss_n = torch.nn.functional.nll_loss(logps_nv, labels_n.clamp(min=0), reduction="none")
    loss_n = (1 - label_smoothing) * loss_n - label_smoothing * logps_nv.mean(-1) + z_loss * lse_n.square()
    return (loss_n * weights_n).masked_fill((labels_n < 0) | (weights_n == 0), 0.0).sum()


def linear_log_probs_reference(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, *, vocab_valid: int | None = None, temperature: float = 1.0
) -> Tensor:
    """The log-probabilities [n] of one process in plain torch, with all logits at once."""
    logps_nv, _ = _reference_logps(hidden_nh / temperature, weight_vh, vocab_valid)
    return logps_nv.gather(1, labels_n.clamp(min=0)[:, None])[:, 0].masked_fill(labels_n < 0, 0.0)


def _reference_logps(hidden_nh: Tensor, weight_vh: Tensor, vocab_valid: int | None) -> tuple[Tensor, Tensor]:
    logits_nv = matmul_nt(hidden_nh, weight_vh[:vocab_valid])
    logits_nv = logits_nv if logits_nv.dtype == torch.float64 else logits_nv.float()
    return logits_nv.log_softmax(-1), logits_nv.logsumexp(-1)


def chunk_tokens(tokens: int, vocab_rows: int, dtype: torch.dtype, device: str) -> int:
    """Tokens a chunk: as few chunks as keep its logits near 1 GiB on a GPU, 64 MiB on a CPU, of equal size.

    A multiple of 128, for the matrix units; never less.
    """
    most = max(128, _CHUNK_BYTES.get(device, 64 << 20) // max(1, vocab_rows * dtype.itemsize) // 128 * 128)
    chunks = max(1, -(-tokens // most))
    return max(128, -(-tokens // chunks // 128) * 128)


@dataclass(frozen=True)
class _Head:
    """What both ops know beside the tensors."""

    vocab_start: int
    vocab_valid: int
    vocab_size: int
    combine: Combine | None
    chunk: int
    impl: str
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def chunks(self, tokens: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, tokens)) for i in range(0, max(tokens, 1), self.chunk))

    def losses(self, logits_cv: Tensor, labels_c: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """-> the chunk's losses [c], its statistics [s, c] of the whole vocabulary."""
        stats_rsc = logit_stats(logits_cv, labels_c, self.vocab_start, self.vocab_valid,
                                logit_sum=self.label_smoothing > 0, entropy=entropy, impl=self.impl)
        if self.combine is not None:
            stats_rsc = self.combine(stats_rsc)
        return token_losses(stats_rsc, labels_c, self.vocab_size, label_smoothing=self.label_smoothing,
                            z_loss=self.z_loss, impl=self.impl)

    def gradient_(self, logits_cv: Tensor, labels_c: Tensor, stats_sc: Tensor, weights_c: Tensor) -> Tensor:
        return cross_entropy_grad_(
            logits_cv, labels_c, stats_sc, weights_c, vocab_start=self.vocab_start, vocab_valid=self.vocab_valid,
            vocab_size=self.vocab_size, label_smoothing=self.label_smoothing, z_loss=self.z_loss, impl=self.impl)


class _Gradients:
    """Of hidden states and weight (where wanted), from the gradient of one chunk's logits after another."""

    def __init__(self, hidden_nh: Tensor, weight_vh: Tensor, wanted: tuple[bool, bool], several: bool):
        self.hidden_nh = torch.empty_like(hidden_nh, memory_format=torch.contiguous_format) if wanted[0] else None
        self.weight_vh: Tensor | None = None
        self.wants_weight, self.several = wanted[1], several

    def add(self, place: slice, grad_cv: Tensor, hidden_ch: Tensor, weight_vh: Tensor) -> None:
        if self.hidden_nh is not None:
            if grad_cv.device.type == "cuda":
                torch.mm(grad_cv, weight_vh, out=self.hidden_nh[place])
            else:
                self.hidden_nh[place] = matmul_nn(grad_cv, weight_vh)
        if self.wants_weight and not self.several:
            self.weight_vh = matmul_tn(grad_cv, hidden_ch)  # a single chunk needs no sum
        elif self.wants_weight:
            first = self.weight_vh is None
            if self.weight_vh is None:
                self.weight_vh = torch.empty(weight_vh.shape, dtype=jit.wide_dtype(weight_vh), device=weight_vh.device)
            add_matmul_tn_(self.weight_vh, grad_cv, hidden_ch, first=first)


def _scaled(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """grad * factor, rounded once to `dtype`. A CPU looks whether there is anything to do, a GPU does not wait."""
    if grad is None or (factor.device.type == "cpu" and factor.item() == 1.0):
        return None if grad is None else grad.to(dtype)
    return torch.mul(grad, factor.view(1, 1), out=torch.empty_like(grad, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, weights_n: Tensor, head: _Head,
                scale: Any, wanted: tuple[bool, bool], per_token: bool):
        places = list(head.chunks(hidden_nh.shape[0]))
        gradients = _Gradients(hidden_nh, weight_vh, wanted, len(places) > 1)
        labels_n = labels_n.masked_fill(weights_n == 0, -1)  # such rows are not even read
        scaled_n = weights_n * scale if any(wanted) else weights_n
        losses, hits = [], []
        for place in places:
            hidden_ch, labels_c = hidden_nh[place], labels_n[place]
            logits_cv = matmul_nt(hidden_ch, weight_vh)
            loss_c, stats_sc = head.losses(logits_cv, labels_c)
            losses.append(loss_c * weights_n[place])
            hits.append(stats_sc[3])
            if any(wanted):
                grad_cv = head.gradient_(logits_cv, labels_c, stats_sc, scaled_n[place])
                gradients.add(place, grad_cv, hidden_ch, weight_vh)
                del grad_cv
            del logits_cv  # before the next chunk's are made
        ctx.save_for_backward(gradients.hidden_nh, gradients.weight_vh)
        ctx.scale, ctx.dtypes = scale, (hidden_nh.dtype, weight_vh.dtype)
        correct = torch.cat(hits) if per_token else torch.cat(hits).sum()
        ctx.mark_non_differentiable(correct)
        return torch.cat(losses).sum(), correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _grad_correct):
        factor = grad_loss / ctx.scale
        grad_h, grad_w = (_scaled(g, factor, t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return grad_h, grad_w, None, None, None, None, None, None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, head: _Head, entropy: bool,
                wanted: tuple[bool, bool]):
        logps, entropies, stats = [], [], []
        for place in head.chunks(hidden_nh.shape[0]):
            logits_cv = matmul_nt(hidden_nh[place], weight_vh)
            loss_c, stats_sc = head.losses(logits_cv, labels_n[place], entropy)
            del logits_cv
            logps.append(-loss_c)
            stats.append(stats_sc[:2])
            if entropy:
                entropies.append(token_entropy(stats_sc))
        if any(wanted):
            ctx.save_for_backward(hidden_nh, weight_vh, labels_n, torch.cat(stats, 1))
        ctx.head, ctx.wanted = head, wanted
        entropy_n = torch.cat(entropies) if entropy else logps[0].new_empty(0)
        ctx.mark_non_differentiable(entropy_n)
        return torch.cat(logps), entropy_n

    @staticmethod
    def backward(ctx, grad_logps_n: Tensor, _grad_entropy):
        hidden_nh, weight_vh, labels_n, stats_sn = ctx.saved_tensors
        head: _Head = ctx.head
        places = list(head.chunks(hidden_nh.shape[0]))
        gradients, weights_n = _Gradients(hidden_nh, weight_vh, ctx.wanted, len(places) > 1), -grad_logps_n
        for place in places:
            logits_cv = matmul_nt(hidden_nh[place], weight_vh)
            grad_cv = head.gradient_(logits_cv, labels_n[place], stats_sn[:, place], weights_n[place])
            gradients.add(place, grad_cv, hidden_nh[place], weight_vh)
            del logits_cv, grad_cv
        grad_w = gradients.weight_vh
        return gradients.hidden_nh, None if grad_w is None else grad_w.to(weight_vh.dtype), None, None, None, None


def _head(op: str, hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, vocab_start: int, vocab_valid: int | None,
          vocab_size: int | None, combine: Combine | None, chunk: int | None, impl: str, **more: float) -> _Head:
    if hidden_nh.dim() != 2 or weight_vh.dim() != 2 or weight_vh.shape[1] != hidden_nh.shape[1]:
        raise ValueError(f"{op}: hidden {tuple(hidden_nh.shape)} must be [n, h] and "
                         f"weight {tuple(weight_vh.shape)} [v, h]")
    if weight_vh.dtype != hidden_nh.dtype:
        raise ValueError(f"{op}: weight is {weight_vh.dtype}, but hidden is {hidden_nh.dtype}")
    if labels_n.shape != hidden_nh.shape[:1] or labels_n.dtype != torch.int64:
        raise ValueError(f"{op}: labels {tuple(labels_n.shape)} {labels_n.dtype} must be [{hidden_nh.shape[0]}] int64")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk_tokens {chunk} must be at least 1")
    rows = weight_vh.shape[0]
    valid = rows if vocab_valid is None else vocab_valid
    if combine is not None and vocab_size is None:
        raise ValueError(f"{op}: vocab_size, of the whole vocabulary, is needed with combine")
    return _Head(vocab_start, valid, vocab_start + valid if vocab_size is None else vocab_size, combine,
                 chunk or chunk_tokens(hidden_nh.shape[0], rows, hidden_nh.dtype, hidden_nh.device.type), impl, **more)


def _wanted(hidden_nh: Tensor, weight_vh: Tensor) -> tuple[bool, bool]:
    """Which gradients to make: none within torch.no_grad, whatever the parameters say."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden_nh.requires_grad, enabled and weight_vh.requires_grad


def linear_cross_entropy(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, *, weights_n: Tensor, vocab_start: int = 0,
    vocab_valid: int | None = None, vocab_size: int | None = None, combine: Combine | None = None,
    scale: Tensor | float = 1.0, label_smoothing: float = 0.0, z_loss: float = 0.0, chunk_tokens: int | None = None,
    impl: str = "auto", per_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens' losses (nats), and how many tokens of nonzero weight were predicted exactly; with
    `per_token` 1 for each that was and 0 for every other [n].

    weight_vh: rows vocab_start ... of the vocabulary, of which vocab_valid are not padding (default all); vocab_size:
    of the whole vocabulary. A negative label or a weight of 0 leaves a token out: exact zeros. `scale` is multiplied
    into the gradients before they are rounded to the hidden states' dtype and expected back in the gradient of the loss
    (fp16 loss scaling). `chunk_tokens`: by default from the size of the logits. `impl`: of the logit kernels. One
    backward pass only. Raises ValueError that names the argument which does not fit.
    """
    op = "linear_cross_entropy"
    head = _head(op, hidden_nh, weight_vh, labels_n, vocab_start, vocab_valid, vocab_size, combine, chunk_tokens, impl,
                 label_smoothing=label_smoothing, z_loss=z_loss)
    if weights_n.shape != labels_n.shape:
        raise ValueError(f"{op}: weights {tuple(weights_n.shape)} must be [{labels_n.shape[0]}]")
    return _LinearCrossEntropy.apply(hidden_nh, weight_vh, labels_n, weights_n, head, scale,
                                     _wanted(hidden_nh, weight_vh), per_token)  # type: ignore[return-value]


def linear_log_probs(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, *, vocab_start: int = 0, vocab_valid: int | None = None,
    vocab_size: int | None = None, combine: Combine | None = None, temperature: float = 1.0, entropy: bool = False,
    chunk_tokens: int | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Each label's log-probability [n] (fp32, nats; differentiable), and where asked each distribution's entropy [n].

    Of softmax(logits / temperature). 0, without a gradient, for a negative label. The entropy has no gradient.
    Arguments as of `linear_cross_entropy`. Raises ValueError that names the argument which does not fit.
    """
    head = _head("linear_log_probs", hidden_nh, weight_vh, labels_n, vocab_start, vocab_valid, vocab_size, combine,
                 chunk_tokens, impl)
    if temperature <= 0:
        raise ValueError(f"linear_log_probs: temperature {temperature} must be above 0")
    if temperature != 1.0:
        hidden_nh = hidden_nh / temperature  # smaller than the logits, and their rounding errors average out
    found = _LinearLogProbs.apply(hidden_nh, weight_vh, labels_n, head, entropy, _wanted(hidden_nh, weight_vh))
    return found[0], found[1] if entropy else None
