"""An export is done when Transformers, reloading it, computes the engine's logits.

b rows (one), s positions, v vocabulary, h hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpoint.manager import agree
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.export import tokenizer_files
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap

TEXT = ("In the beginning the spring is wound; what the hand gives, the train of wheels spends: 1, 2, 3, 5, 8. "
        "def wind(turns: int) -> float:\n    return turns * 0.5\n")
TOLERANCE = 1e-4


def verify(directory: Path | str, chunks: list[Any], groups: Groups, tokenizer: Tokenizer | None, *,
           text: str = TEXT, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the logits of this model and of the directory's, loaded by Transformers, in fp32.

    Collective. The model's weights must be fp32 and those of the directory (rounded as they were on writing).
    Also compares the tokenizers, unless ``tokenizer`` is None. Raises ``UserError`` on all ranks for a difference above
    ``tolerance``, a tensor that Transformers misses or does not know, or other token ids.
    """
    directory, model = Path(directory), unwrap(chunks[0])
    if len(chunks) > 1 or model.config.context_parallel_size > 1 or model.config.params_dtype != torch.float32:
        raise UserError("the logits are compared in fp32, with one chunk of layers a rank and whole sequences",
                        where="verify", fix="Restore the checkpoint in fp32 and without context parallelism")
    tokens_bs = _tokens(model, tokenizer, text).to(groups.device)
    ours_bsv = logits(model, tokens_bs)
    outcome = agree(groups, lambda: _compare(directory, tokens_bs.cpu(), ours_bsv, tokenizer, tolerance)
                    if groups.is_main else None, f"verifying {directory}")
    return outcome[0]


def _tokens(model: Any, tokenizer: Tokenizer | None, text: str) -> torch.Tensor:
    """The text, then tokens from all over the vocabulary, past the end of a window where there is one."""
    settings = model.config
    window = (settings.window_size[0] + 1) if settings.window_size else 0
    length = min(model.max_sequence_length, max(96, min(window + 32, 512)))
    generator = torch.Generator().manual_seed(0)
    drawn_s = torch.randint(0, settings.vocab_size, (length,), generator=generator)
    spoken = [] if tokenizer is None else [t for t in tokenizer.encode(text) if t < settings.vocab_size][: length // 2]
    return torch.cat([torch.tensor(spoken, dtype=torch.int64), drawn_s])[None, :length]


@torch.no_grad()
def logits(model: Any, tokens_bs: torch.Tensor) -> torch.Tensor:
    """[b, s, v] in fp32 on the CPU, without the vocabulary's padding, on every rank. Collective."""
    pp, (b, s) = model.pg_collection.pp, tokens_bs.shape
    training = model.training
    model.eval()
    if not model.pre_process:
        hidden_sbh = tokens_bs.new_empty((s, b, model.config.hidden_size), dtype=model.config.params_dtype)
        dist.recv(hidden_sbh, group=pp, group_src=pp.rank() - 1)
        model.set_input_tensor(hidden_sbh)
    positions_bs = torch.arange(s, device=tokens_bs.device).expand_as(tokens_bs)
    out = model(tokens_bs, positions_bs, None, runtime_gather_output=True)
    model.train(training)
    if model.post_process:
        found_bsv = out[..., : model.config.vocab_size].float().contiguous()
    else:
        dist.send(out.contiguous(), group=pp, group_dst=pp.rank() + 1)
        found_bsv = torch.empty((b, s, model.config.vocab_size), device=tokens_bs.device)
    world = dist.get_world_size()
    if world > 1:
        dist.broadcast(found_bsv, src=world - world // pp.size())  # the first rank of the last stage
    return found_bsv.cpu()


def _compare(directory: Path, tokens_bs: torch.Tensor, ours_bsv: torch.Tensor, tokenizer: Tokenizer | None,
             tolerance: float) -> float:
    if tokenizer is not None:
        tokenizer_files.check(tokenizer, directory)
    theirs_bsv = _their_logits(directory, tokens_bs)
    difference = float((theirs_bsv - ours_bsv).abs().max())
    if not difference <= tolerance:  # NaN as well
        raise UserError(f"Transformers' logits differ from the engine's by {difference:.3g} (at most {tolerance:.3g})",
                        where=str(directory), fix="Report it with the model's config.yaml")
    return difference


def _their_logits(directory: Path, tokens_bs: torch.Tensor) -> torch.Tensor:
    """By Transformers, strictly: it would draw a tensor that it misses, and warn. Raises ``UserError``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.float32, output_loading_info=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise UserError(f"Transformers reports {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[0]}",
                            where=str(directory), fix="Report it with the model's config.yaml")
    with torch.no_grad():
        return model.eval()(tokens_bs).logits.float()
