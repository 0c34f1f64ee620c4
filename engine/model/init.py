"""Initial weights that do not depend on the layout.

Each parameter is drawn whole, on the CPU, from a generator seeded by (seed, its name in the unsplit model), and every
rank keeps its slice. One rank, TP2, PP2 or a GPU therefore start from the same model. Rows that only pad the vocabulary
are zero.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch

from engine.model.config import ModelSettings


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _tensor_slice(full: torch.Tensor, param: Any, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This tensor rank's part: along ``partition_dim``, in ``partition_stride`` interleaved blocks (gate, up)."""
    if tp_size == 1 or not getattr(param, "tensor_model_parallel", False):
        return full
    dim, stride = param.partition_dim, max(1, param.partition_stride)
    blocks = full.chunk(stride, dim=dim)
    return torch.cat([block.chunk(tp_size, dim=dim)[tp_rank] for block in blocks], dim=dim)


def _global_names(chunk: Any) -> dict[str, Any]:
    """Parameters by their name in the unsplit model: layer numbers count from the first pipeline stage."""
    offset = {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}

    def rename(match: re.Match) -> str:
        return f"decoder.layers.{offset[int(match.group(1))]}."

    return {re.sub(r"^decoder\.layers\.(\d+)\.", rename, name): p for name, p in chunk.named_parameters()}


def _std(name: str, settings: ModelSettings) -> float:
    """Projections into the residual stream are scaled by 1/√(2·layers) (GPT-2, Megatron's scaled_init_method)."""
    into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return settings.init_method_std / (math.sqrt(2.0 * settings.num_layers) if into_residual else 1.0)


@torch.no_grad()
def initialise(chunks: list[Any], settings: ModelSettings, seed: int, *, tied: bool) -> None:
    """Draws every parameter of this rank's model chunks in place."""
    for chunk in chunks:
        tp = chunk.pg_collection.tp
        for name, param in _global_names(chunk).items():
            if name.endswith("bias"):
                param.zero_()
                continue
            if param.dim() == 1:
                param.fill_(1.0)
                continue
            if tied and name == "output_layer.weight":  # the last stage's copy of the embedding
                name = "embedding.word_embeddings.weight"
            shape = list(param.shape)
            if getattr(param, "tensor_model_parallel", False):
                shape[param.partition_dim] *= tp.size()
            vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            drawn = [settings.vocab_size, shape[1]] if vocabulary else shape
            full = torch.randn(drawn, generator=_generator(seed, name)) * _std(name, settings)
            if vocabulary:
                full = torch.nn.functional.pad(full, (0, 0, 0, shape[0] - settings.vocab_size))
            param.copy_(_tensor_slice(full, param, tp.rank(), tp.size()))
