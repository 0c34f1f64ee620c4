"""Weights and optimizer state by the names of the unsplit model, gathered without the engine's checkpoints: the oracle
of what those must restore."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import tiny
import torch
import torch.distributed as dist

from engine.model import whole
from engine.parallel.wrap import gather_parameters, unwrap

Piece = tuple[str, str, whole.Split, torch.Size, int, torch.Tensor]


def _held(inner: Any) -> Iterator[tuple[Any, int, dict[str, torch.Tensor]]]:
    """(model parameter, first element of it that this rank holds, its state) in Megatron's own account."""
    if hasattr(inner, "model_param_gbuf_map"):  # the distributed optimizer
        for p, (group, order) in inner.model_param_group_index_map.items():
            main = inner.optimizer.param_groups[group]["params"][order]
            yield p, inner._get_model_param_range_map(p)["param"].start, _state(inner, main)
        return
    models = inner.float16_groups + inner.fp32_from_fp32_groups if hasattr(inner, "float16_groups") else [
        group["params"] for group in inner.optimizer.param_groups]
    for p in (p for group in [*models, getattr(inner, "kept", [])] for p in group):
        yield p, 0, _state(inner, getattr(p, "main_param", p))


def _state(inner: Any, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """"param" is what is behind 16-bit weights: their fp32 copy, or they themselves with the bits that they lack."""
    state = dict(inner.optimizer.state.get(main, {}))
    low = state.pop("remainder", None)
    if low is not None:
        high = main.detach().view(torch.int16).int() * 2**16
        return {"param": (high + low.int()).view(torch.float32), **state}
    return {"param": main, **state} if main.dtype == torch.float32 else state


def _buffers(bare: Any) -> dict[str, torch.Tensor]:
    """What a model keeps beside parameters, the same on every rank that has the layer: the router's bias."""
    first = bare.decoder.layers[0].layer_number - 1
    names = bare.state_dict().keys() & dict(bare.named_buffers()).keys()
    rename = re.compile(r"(?<=^decoder\.layers\.)\d+")
    return {rename.sub(lambda m: str(int(m.group()) + first), name): bare.get_buffer(name) for name in names}


def _pieces(run: tiny.Run) -> list[Piece]:
    places, found = {}, []
    for chunk in run.chunks:
        for name, p in whole.global_names(chunk).items():
            places[p] = name, whole.split_of(name, p, unwrap(chunk).pg_collection)
            found.append(("weights", *places[p], p.shape, 0, p.detach().flatten().clone()))
        found += [("buffers", name, whole.Split(), value.shape, 0, value.flatten().clone())
                  for name, value in _buffers(unwrap(chunk)).items()]
    for inner in run.optimizer.chained_optimizers:
        for p, start, state in _held(inner):
            if p.dtype == torch.float32:
                state = {kind: value for kind, value in state.items() if kind != "param"}
            found += [(kind, *places[p], p.shape, start, value.detach().flatten().clone())
                      for kind, value in state.items()]
    return found


def state(run: tiny.Run) -> dict[str, dict[str, torch.Tensor]]:
    """{"weights" or kind of state: {parameter: unsplit tensor, padding rows included}} on every rank.

    Copies on several ranks are checked to be equal.
    """
    gather_parameters(run.chunks)
    gathered: list = [None] * run.groups.world_size
    dist.all_gather_object(gathered, _pieces(run))
    found: dict[str, dict[str, dict[int, whole.Part]]] = {}
    for kind, name, split, shape, start, values in (piece for pieces in gathered for piece in pieces):
        by_index = found.setdefault(kind, {}).setdefault(name, {})
        _, part = by_index.setdefault(split.index, (split, torch.full(shape, torch.nan, dtype=values.dtype)))
        target = part.view(-1)[start : start + values.numel()]
        assert (target.isnan() | (target == values)).all(), f"ranks hold different {kind} of {name}"
        target.copy_(values)
    joined = {kind: {name: whole.join(list(by_index.values())) for name, by_index in by_name.items()}
              for kind, by_name in found.items()}
    for kind, tensors in joined.items():
        assert not any(value.isnan().any() for value in tensors.values()), f"no rank holds all {kind}"
        if run.cfg.model.tie_embeddings and "output_layer.weight" in tensors:
            assert torch.equal(tensors.pop("output_layer.weight"), tensors["embedding.word_embeddings.weight"])
    steps = {group["step"] for group in run.optimizer.param_groups if "step" in group}
    return joined | {"step": {"of every group": torch.tensor(sorted(steps))}}


def differing(found: dict, expected: dict) -> list[str]:
    """What in one ``state`` is not bit for bit as in another; rows of a larger vocabulary's padding must be zero."""
    wrong = [f"the kind {kind}" for kind in found.keys() ^ expected.keys()]
    for kind in found.keys() & expected.keys():
        wrong += [f"{kind}: {name}" for name in found[kind].keys() ^ expected[kind].keys()]
        for name in found[kind].keys() & expected[kind].keys():
            a, b = found[kind][name], expected[kind][name]
            rows = min(len(a), len(b)) if name in whole.VOCABULARY else len(b)
            if a.dtype != b.dtype or not torch.equal(a[:rows], b[:rows]) or a[rows:].any():
                wrong.append(f"{kind}: {name}")
    return sorted(wrong)
