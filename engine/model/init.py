"""Initial weights that do not depend on the layout.

Each parameter is drawn whole, on the CPU, from a generator seeded by (seed, its name in the unsplit model), and every
rank keeps its slice. One rank, TP2, PP2 or a GPU therefore start from the same model. Rows that only pad the vocabulary
are zero.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from engine.model.config import ModelSettings
from engine.model.whole import VOCABULARY, global_names, quantised_names, split_of


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _std(name: str, settings: ModelSettings) -> float:
    """Projections into the residual stream are scaled by 1/√(2·layers) (GPT-2, Megatron's scaled_init_method)."""
    into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return settings.init_method_std / (math.sqrt(2.0 * settings.num_layers) if into_residual else 1.0)


@torch.no_grad()
def initialise(chunks: list[Any], settings: ModelSettings, seed: int, *, tied: bool, quantised: bool = True) -> None:
    """Draws every parameter of this rank's model chunks in place, and quantised weights unless they will be loaded."""
    for chunk in chunks:
        drawn_here: dict[str, Any] = global_names(chunk) | (quantised_names(chunk) if quantised else {})
        for name, param in drawn_here.items():
            if name.endswith("bias"):
                param.zero_()
                continue
            if param.dim() == 1 and not name.endswith("softmax_offset"):  # attention sinks: drawn, as GPT-OSS's
                param.fill_(1.0)
                continue
            split = split_of(name, param, chunk.pg_collection)
            if tied and name == "output_layer.weight":  # the last stage's copy of the embedding
                name = "embedding.word_embeddings.weight"
            shape = split.whole_shape(param.shape)
            drawn = [settings.vocab_size, shape[1]] if name in VOCABULARY else shape
            full = torch.randn(drawn, generator=generator(seed, name)) * _std(name, settings)
            if name in VOCABULARY:
                full = torch.nn.functional.pad(full, (0, 0, 0, shape[0] - settings.vocab_size))
            param.copy_(split.take(full))
