"""Text from a model, one token at a time with a key-value cache, under every layout.

Tensor ranks gather the logits, pipeline stages pass hidden states on, and one rank of the last stage draws for all.

b samples of one prompt, s positions, h hidden, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext

from engine.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave the distribution whole; ``seed`` fixes draws."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 1234


def filter_logits(logits_bv: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """-inf outside the ``top_k`` largest and outside the smallest set that holds ``top_p`` of the probability.

    Nucleus sampling: Holtzman et al., 2020, arXiv:1904.09751. The likeliest token always stays.
    """
    if top_k:
        kth = logits_bv.topk(min(top_k, logits_bv.shape[-1]), dim=-1).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits_bv.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits_bv = logits_bv.masked_fill(dropped, float("-inf"))
    return logits_bv


def pick(logits_bv: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next token of each row, [b]."""
    if sampling.temperature == 0.0:
        return logits_bv.argmax(-1)
    logits_bv = filter_logits(logits_bv.float() / sampling.temperature, sampling.top_k, sampling.top_p)
    return torch.multinomial(logits_bv.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits_bv.device)


def _logits(model: Any, tokens_bs: torch.Tensor, start: int, context: Any) -> torch.Tensor | None:
    """[b, v] after the last of ``tokens_bs``, which begin at position ``start``; None before the last stage."""
    pp = model.pg_collection.pp
    b, s = tokens_bs.shape
    if not model.pre_process:
        hidden_sbh = tokens_bs.new_empty((s, b, model.config.hidden_size), dtype=model.config.params_dtype)
        dist.recv(hidden_sbh, group=pp, group_src=pp.rank() - 1)
        model.set_input_tensor(hidden_sbh)
    positions_bs = torch.arange(start, start + s, device=tokens_bs.device).expand_as(tokens_bs)
    out = model(tokens_bs, positions_bs, None, inference_context=context, runtime_gather_output=True)
    if model.post_process:
        return out[:, -1]
    dist.send(out.contiguous(), group=pp, group_dst=pp.rank() + 1)
    return None


def _from_last_stage(next_b: torch.Tensor, model: Any) -> torch.Tensor:
    """The choice of the first rank of the last pipeline stage, on every rank.

    Also where all ranks see the same logits: expert ranks go on with the same tokens or hang, and a GPU's sums over
    experts are not bound to round alike on each.
    """
    world = dist.get_world_size()
    if world > 1:
        dist.broadcast(next_b, src=world - world // model.pg_collection.pp.size())
    return next_b


@torch.no_grad()
def generate(
    model: Any,
    prompt: list[int],
    sampling: Sampling,
    *,
    eod_id: int | None,
    vocab_size: int | None = None,
    num_samples: int = 1,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continuations of ``prompt`` (token ids), without it; each ends before ``eod_id`` or at ``max_new_tokens``.

    ``model`` is this rank's bare chunk. Collective over all ranks, with the same arguments; the same rows on each, and
    under every layout.
    ``vocab_size``: the tokenizer's, where the model has room for more tokens than it was taught.
    ``use_cache=False`` runs the whole sequence anew for each token: the slow way, for tests. Raises ``UserError`` when
    the prompt is empty or leaves no room in the model's context, or when ranks share the sequence.
    """
    if model.config.sequence_parallel or model.config.context_parallel_size > 1:
        raise UserError("ranks cannot share the single token that is new", where="parallel",
                        fix="Load the model without sequence_parallel and context to generate")
    limit = model.max_sequence_length
    size = model.config.vocab_size if vocab_size is None else min(vocab_size, model.config.vocab_size)
    if not prompt:
        raise UserError("the prompt is empty", where="prompt", fix="Give at least one character")
    if len(prompt) >= limit:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context {limit}", where="prompt",
                        fix="Shorten the prompt")
    device = next(model.parameters()).device
    total = min(limit, len(prompt) + sampling.max_new_tokens)
    tokens_bs = torch.tensor([prompt] * num_samples, device=device)
    generator = torch.Generator().manual_seed(sampling.seed)
    context = StaticInferenceContext(num_samples, total) if use_cache else None
    finished_b = torch.zeros(num_samples, dtype=torch.bool, device=device)
    fed, training = 0, model.training
    model.eval()
    while tokens_bs.shape[1] < total and not bool(finished_b.all()):
        logits_bv = _logits(model, tokens_bs[:, fed:], fed, context)
        next_b = finished_b.long() if logits_bv is None else pick(logits_bv[:, :size], sampling, generator)
        next_b = _from_last_stage(next_b, model)
        if eod_id is not None:
            next_b = next_b.masked_fill(finished_b, eod_id)
            finished_b |= next_b == eod_id
        if context is not None:
            fed = tokens_bs.shape[1]
            context.sequence_len_offset = fed
        tokens_bs = torch.cat([tokens_bs, next_b[:, None]], dim=1)
    model.train(training)
    rows = tokens_bs[:, len(prompt):].tolist()
    return [row[: row.index(eod_id)] if eod_id in row else row for row in rows]
