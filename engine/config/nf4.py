"""What a frozen base in 4 bits (``lora.base nf4``) contradicts in other sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.config.base import Problem

if TYPE_CHECKING:
    from engine.config.schema import Config

BLOCK = 64  # engine_kernels.nf4.BLOCK, which imports torch


def problems(cfg: Config) -> Iterator[Problem]:
    """Precision; the widths are another matter (``widths``), known with the model."""
    if cfg.lora is not None and cfg.train.fp8:
        base = "4" if cfg.lora.base == "nf4" else "16 or 32"
        yield Problem("train.fp8", f"multiplies weights in 8 bits, but lora holds frozen ones in {base}",
                      "Use train.fp8 false (--no-fp8)")


def widths(cfg: Config) -> Iterator[Problem]:
    """Input features of every matrix on a rank: blocks of 64 must not lie on two ranks, which would make the quantised
    model depend on the layout."""
    if cfg.lora is None or cfg.lora.base != "nf4":
        return
    m, p = cfg.model, cfg.parallel
    head_dim = m.head_dim or m.hidden_size // m.num_attention_heads
    sizes = [("hidden_size", "parallel.tensor", m.hidden_size, 1),
             ("head_dim", "parallel.tensor", m.num_attention_heads * head_dim, p.tensor)]
    if m.moe is None or m.moe.num_dense_layers:
        sizes.append(("ffn_hidden_size", "parallel.tensor", m.ffn_hidden_size or 0, p.tensor))
    if m.moe is not None:
        field = "parallel.expert_tensor" if p.expert_tensor else "parallel.tensor"
        sizes.append(("moe.ffn_hidden_size", field, m.moe.ffn_hidden_size or 0, p.expert_tensor or p.tensor))
        sizes.append(("moe.shared_ffn_hidden_size", "parallel.tensor", m.moe.shared_ffn_hidden_size or 0, p.tensor))
    for name, field, size, ranks in sizes:
        if size % ranks == 0 and size // ranks % BLOCK:  # else the layout itself does not work
            fits = [d for d in range(1, ranks) if size % d == 0 and size // d % BLOCK == 0]
            fix = f"Use {field} {max(fits)}, or lora.base none" if fits else "Use lora.base none"
            yield Problem("lora.base", f"nf4 has blocks of {BLOCK} input features, which {size // ranks} on a rank "
                          f"(model.{name}, {field} {ranks}) are no multiple of", fix)
