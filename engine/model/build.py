"""Builds this rank's chunks of the model from the configuration."""

from __future__ import annotations

from typing import Any

import torch

from engine.config import Config, padded_vocab_size
from engine.errors import UserError
from engine.model import config as model_config
from engine.parallel.topology import Groups
from engine_kernels import jit


def _stages(cfg: Config, groups: Groups) -> list[tuple[int | None, bool, bool]]:
    """(virtual stage, has the embedding, has the loss) of each chunk on this pipeline rank."""
    rank, size, chunks = groups.pg.pp.rank(), groups.pg.pp.size(), cfg.parallel.virtual_pipeline
    if chunks == 1:
        return [(None, rank == 0, rank == size - 1)]
    return [(v, rank == 0 and v == 0, rank == size - 1 and v == chunks - 1) for v in range(chunks)]


def model(cfg: Config, groups: Groups, vocab_size: int) -> list[Any]:
    """The model chunks of this rank, initialised by parameter name, on the device, in training mode.

    One chunk, or ``parallel.virtual_pipeline`` of them. ``vocab_size``: see ``engine.config.vocabulary``.
    """
    from engine.model import attention, fp8, lora, spec
    from engine.model.gpt import GPT
    from engine.model.init import initialise
    from engine.model.whole import quantised_names

    if cfg.model.kernels == "triton" and (obstacle := jit.obstacle(torch.empty(0, device=groups.device))):
        raise UserError(obstacle, where="model.kernels", fix="Use kernels auto")
    dtype = model_config.resolve_precision(cfg.train.precision, groups.device)
    attention.check_backend(cfg, dtype, groups.device)
    settings = model_config.build(cfg, vocab_size, dtype)
    if groups.device.type != "cuda":
        from engine.parallel import cpu

        cpu.install()  # megatron modules imported since the groups were built
    m = cfg.model
    chunks = []
    for vp_stage, first, last in _stages(cfg, groups):
        chunk = GPT(
            config=settings,
            transformer_layer_spec=spec.build(settings, m.backend, vp_stage),
            vocab_size=padded_vocab_size(m, vocab_size, cfg.parallel.tensor),
            max_sequence_length=m.seq_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=m.tie_embeddings,
            # The engine's attention makes its own rotation tables; Transformer Engine's takes Megatron's.
            position_embedding_type="rope" if m.backend == "te" else "none",
            rotary_percent=m.rotary_percent,
            rotary_base=int(m.rotary_base),
            pg_collection=groups.pg,
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(groups.device))
        for name, weight in quantised_names(chunk).items():
            weight.name = name
    fp8.install(chunks, groups)
    initialise(chunks, settings, cfg.seed, tied=m.tie_embeddings, quantised=cfg.init_from is None)
    if cfg.lora is not None:
        lora.install(chunks, cfg, groups)
    return chunks


def parameter_count(chunks: list[Any]) -> int:
    """Parameters held by this rank, quantised ones among them."""
    from engine.model import quantized

    return sum(p.numel() for chunk in chunks for p in chunk.parameters()) + quantized.parameter_count(chunks)
