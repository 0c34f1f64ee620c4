"""Two runs of one model compared: relative errors of losses, of every gradient and of every weight.

The error of a tensor is ||found - expected|| / ||expected||, in float64, of the unsplit tensor. Every rank's part is
compared with its part of the expected tensor; of parts that several ranks hold (data-parallel copies, tensor ranks'
copies of what is not split, the embedding's copy on the last pipeline stage) the worst counts.

Some tensors have no size to measure an error by, so the denominator is at least the norm that the tensor would have
if its elements were ``FLOORS`` times the model's average element (the root mean square over all tensors of its kind):

- Gradients that are nothing but rounding: biases that cancel, an expert that few tokens chose, sums of terms far larger
  than themselves. With 1e-3 and a tolerance of 1e-5 an element is forgiven an error of 1e-8 of the average element, a
  sixth of fp32's rounding unit (6e-8); a tensor that is all wrong is forgiven only if it is 1e8 times smaller than the
  average. One that should be zero and is not has this floor as its denominator too.
- Weights that begin at zero, biases above all. AdamW and Muon move every tensor's elements by about the learning rate,
  whatever their size, so an error of an update is measured by the average weight: 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.model.whole import VOCABULARY, Split, join

FLOORS = {"initial": 1.0, "gradients": 1e-3, "weights": 1.0}
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_GROUPS = (
    (r"^embedding\.", "embedding"),
    (r"^output_layer\.", "output head"),
    (r"layernorm", "norms"),
    (r"\.linear_qkv\.", "attention.qkv"),
    (r"\.linear_proj\.", "attention.proj"),
    (r"\.self_attention\.", "attention, other"),
    (r"\.router\.", "router"),
    (r"\.shared_experts\.", "shared expert"),
    (r"experts\..*linear_fc1", "experts.fc1"),
    (r"experts\..*linear_fc2", "experts.fc2"),
    (r"\.mlp\.linear_fc1\.", "mlp.fc1"),
    (r"\.mlp\.linear_fc2\.", "mlp.fc2"),
)

Parts = dict[str, tuple[tuple[int, int, int, int], torch.Tensor]]


def group_of(name: str) -> str:
    """The parameter group that a tensor belongs to in tables."""
    return next((group for pattern, group in _GROUPS if re.search(pattern, name)), "other")


def compare(expected: list[Path], found: list[Path], *, tied: bool) -> dict[str, Any]:
    """The files that the ranks of two jobs wrote (worker.py) -> everything that a report shows, as plain JSON."""
    one = [torch.load(path, weights_only=True, mmap=True) for path in expected]
    other = [torch.load(path, weights_only=True, mmap=True) for path in found]
    kinds = {kind: _compare_tensors([run[kind] for run in one], [run[kind] for run in other], tied=tied, floor=floor)
             for kind, floor in FLOORS.items()}
    tensors = [
        {"name": name, "group": group_of(name), **{kind: kinds[kind].get(name) for kind in kinds}}
        for name in sorted(set().union(*kinds.values()), key=_order)]
    return {"steps": compare_steps(one[0]["steps"], [run["steps"] for run in other]), "tensors": tensors}


def _order(name: str) -> list[Any]:
    """Layers by number, and the head after them."""
    return [int(part) if part.isdigit() else 0 for part in name.split(".")] if name.startswith("decoder") else [-1]


def compare_steps(expected: list[dict], ranks: list[list[dict]]) -> list[dict[str, Any]]:
    """Losses, gradient norms, counts and router statistics of each step; the worst rank of ``ranks`` counts."""
    steps = []
    for i, one in enumerate(expected):
        others = [run[i] for run in ranks]
        step: dict[str, Any] = {"tokens": [one["tokens"], others[0]["tokens"]],
                                "correct": [one["correct"], others[0]["correct"]]}
        for name in ("loss", "grad_norm"):
            worst = max((other[name] for other in others), key=lambda value, name=name: relative(value, one[name]))
            step[name] = {"expected": one[name], "found": worst, "error": relative(worst, one[name])}
        step["tokens_error"] = max(relative(other["tokens"], one["tokens"]) for other in others)
        if one["router"] is not None or others[0]["router"] is not None:
            step["router"] = _compare_routers(one["router"] or {}, [other["router"] or {} for other in others])
        steps.append(step)
    return steps


def _compare_routers(expected: dict, ranks: list[dict]) -> dict[str, Any]:
    """{statistic: {"expected", "found", "error"}}: the error of a list is that of its norm; None equals None only."""
    found = {}
    for name in expected.keys() | ranks[0].keys():
        one, others = expected.get(name), [other.get(name) for other in ranks]
        errors = [_error_of_lists(other, one) for other in others]
        worst = max(range(len(errors)), key=errors.__getitem__)
        found[name] = {"expected": one, "found": others[worst], "error": errors[worst]}
    return found


def _error_of_lists(found: Any, expected: Any) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (expected, found))
    if one.shape != other.shape:
        return math.inf
    return relative_norm(float((other - one).norm()), float(one.norm()))


def relative(found: float, expected: float) -> float:
    """|found - expected| / |expected|; infinite where it is not a number."""
    return relative_norm(abs(found - expected), abs(expected))


def relative_norm(difference: float, size: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size > 0.0 else (0.0 if difference == 0.0 else math.inf)


def _compare_tensors(expected: list[Parts], found: list[Parts], *, tied: bool,
                     floor: float) -> dict[str, dict[str, Any]]:
    """{name: {"error", "copies": how far apart its copies are, "size": root mean square, "rank": the worst one's}}."""
    wholes = _wholes(expected)
    floor *= _average(wholes.values())
    held: dict[str, list[tuple[int, Split, torch.Tensor]]] = {name: [] for name in wholes}
    for rank, parts in enumerate(found):
        for name, (split, values) in parts.items():
            name = _EMBEDDING if tied and name == _HEAD else name
            held.setdefault(name, []).append((rank, Split(*split), values))
    return {name: _compare_tensor(name, wholes.get(name), pieces, floor) for name, pieces in held.items()}


def _wholes(ranks: list[Parts]) -> dict[str, torch.Tensor]:
    """The unsplit tensors of the run that is compared with, of copies the first."""
    pieces: dict[str, dict[int, tuple[Split, torch.Tensor]]] = {}
    for parts in ranks:
        for name, (split, values) in parts.items():
            pieces.setdefault(name, {}).setdefault(split[2], (Split(*split), values))
    return {name: join(list(by_index.values())) for name, by_index in pieces.items()}


def _average(tensors: Iterable[torch.Tensor]) -> float:
    """Root mean square of all elements."""
    squares = count = 0.0
    for tensor in tensors:
        squares += float(tensor.double().square().sum())
        count += tensor.numel()
    return math.sqrt(squares / max(count, 1.0))


def _compare_tensor(name: str, whole: torch.Tensor | None, pieces: list[tuple[int, Split, torch.Tensor]],
                    floor: float) -> dict[str, Any]:
    """``pieces``: (rank, place, values) of every rank that holds a part. ``floor``: least size of an element."""
    if whole is None or not pieces:
        return _wrong("missing" if pieces == [] else "not in the model of one rank")
    if name in VOCABULARY:  # a layout may pad it to more rows; those must stay zero
        rows = pieces[0][1].whole_shape(pieces[0][2].shape)[0]
        whole = torch.nn.functional.pad(whole, (0, 0, 0, max(0, rows - whole.shape[0])))
    first: dict[int, torch.Tensor] = {}
    worst: dict[int, tuple[float, int]] = {}
    apart = 0.0
    for rank, split, values in pieces:
        part = split.take(whole)
        if part.shape != values.shape:
            return _wrong(f"shape {list(values.shape)} for {list(part.shape)} on rank {rank}")
        difference = float((values.double() - part.double()).norm())
        difference = difference if math.isfinite(difference) else math.inf
        worst[split.index] = max(worst.get(split.index, (-1.0, 0)), (difference, rank))
        apart = max(apart, float((values.double() - first.setdefault(split.index, values).double()).norm()))
    if len(worst) != pieces[0][1].count:
        return _wrong(f"only parts {sorted(worst)} of {pieces[0][1].count}")
    norm = float(whole.double().norm())
    size = max(norm, floor * math.sqrt(whole.numel()))
    total = math.sqrt(sum(difference**2 for difference, _ in worst.values()))
    return {"error": relative_norm(total, size), "copies": relative_norm(apart, size),
            "size": norm / math.sqrt(max(1, whole.numel())), "rank": max(worst.values())[1]}


def _wrong(problem: str) -> dict[str, Any]:
    return {"error": math.inf, "copies": 0.0, "size": 0.0, "rank": None, "problem": problem}
