"""``Fp8Config``: how the engine's linear layers come by 8-bit numbers, and what stands against it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from engine.config.base import Problem, Section, option

if TYPE_CHECKING:
    from engine.config.schema import Config

ALIGNMENT = 16  # torch._scaled_mm and Transformer Engine multiply matrices whose sizes are multiples of this


class Fp8Config(Section):
    """The engine's FP8: e4m3 for activations and weights, e5m2 for gradients. Transformer Engine has its own."""

    scaling: Literal["current", "delayed"] = option(
        "current", "scales from the numbers themselves, or from the largest of earlier steps (one pass less)"
    )
    granularity: Literal["tensorwise", "rowwise"] = option("tensorwise", "one scale a tensor, or one a row")
    history_length: int = option(16, "steps that delayed scaling looks back", "steps", ge=1, le=10**5)
    margin: int = option(0, "powers of two that delayed scaling leaves above the largest", "1", ge=0, le=8)
    power_of_2_scales: bool = option(True, "round scales up to powers of two, which makes scaling itself exact")
    first_layers_bf16: int = option(0, "first layers that stay in bf16", "layers", ge=0, le=10000)
    last_layers_bf16: int = option(0, "last layers that stay in bf16", "layers", ge=0, le=10000)

    def problems(self) -> Iterator[Problem]:
        if self.scaling == "delayed" and self.granularity == "rowwise":
            yield Problem("granularity", "rows are other tokens in every step, but scaling is delayed",
                          "Use granularity tensorwise, or scaling current")


def problems(cfg: Config) -> Iterator[Problem]:
    """What ``train.fp8`` contradicts in other sections."""
    if not cfg.train.fp8:
        return
    yield from _backend_problems(cfg)
    yield from _size_problems(cfg)
    recipe, layers = cfg.train.fp8_recipe, cfg.model.num_layers
    if recipe.first_layers_bf16 + recipe.last_layers_bf16 >= layers:
        name = "last" if recipe.last_layers_bf16 >= recipe.first_layers_bf16 else "first"
        yield Problem(f"train.fp8_recipe.{name}_layers_bf16",
                      f"with {recipe.first_layers_bf16} first and {recipe.last_layers_bf16} last layers in bf16, none "
                      f"of model.num_layers ({layers}) is left for FP8",
                      f"Use fewer than {layers} in all, or train.fp8 false (--no-fp8)")


def _backend_problems(cfg: Config) -> Iterator[Problem]:
    backend = cfg.model.backend
    if backend == "reference":
        yield Problem("train.fp8", "the reference backend multiplies in the parameters' precision",
                      "Use model.backend engine, or train.fp8 false (--no-fp8)")
    if backend != "te":
        return
    # Where Transformer Engine meets a device it cannot run on, checks say so of model.backend.
    if cfg.device not in ("cpu", "mps") and importlib.util.find_spec("transformer_engine") is None:
        yield Problem("train.fp8", "model.backend is te, but Transformer Engine is not installed",
                      "Use model.backend engine, or pip install 'mainspring[te]' on a machine with a GPU")
    if cfg.train.fp8_recipe != Fp8Config():
        yield Problem("train.fp8_recipe", "is the engine's, but model.backend is te, which has its own",
                      "Remove it, or use model.backend engine")


def _size_problems(cfg: Config) -> Iterator[Problem]:
    """Features of every matrix on a rank. Routed experts stay in bf16."""
    m, tensor = cfg.model, cfg.parallel.tensor
    head_dim = m.head_dim or m.hidden_size // m.num_attention_heads
    groups = m.num_query_groups or m.num_attention_heads
    sizes = [("hidden_size", m.hidden_size, 1),
             ("head_dim", m.num_attention_heads * head_dim, tensor),
             ("head_dim", (m.num_attention_heads + 2 * groups) * head_dim, tensor)]
    if m.moe is None or m.moe.num_dense_layers or m.backend == "te":
        sizes.append(("ffn_hidden_size", m.ffn_hidden_size or 0, tensor))
    if m.moe is not None and m.moe.shared_ffn_hidden_size is not None:
        sizes.append(("moe.shared_ffn_hidden_size", m.moe.shared_ffn_hidden_size, tensor))
    wrong = {name: (size // share, share) for name, size, share in sizes if size // share % ALIGNMENT}
    for name, (local, share) in wrong.items():
        multiple = f"Use a multiple of {ALIGNMENT * share}"
        yield Problem(f"model.{name}",
                      f"{local} features on a rank are not a multiple of {ALIGNMENT}, as FP8 needs (train.fp8)",
                      f"{'Use heads of more features' if name == 'head_dim' else multiple}, or --no-fp8")
