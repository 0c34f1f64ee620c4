"""Faults planted in the ranks: verify-layout catches each, and names the parameters where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.config.verify import TOLERANCES
from engine.verification import jobs, report
from engine.verification.layouts import CP2, DENSE, DISTRIBUTED, EP2, MOE, PP2, TP2, TP2_SP, UNTIED
from engine.verification.ranks import compare_all

FAULTS = Path(__file__).with_name("faults.py")


@dataclass(frozen=True)
class Mutation:
    """A fault, the layout that it is planted in, and what must be named."""

    fault: str
    layout: dict[str, Any]
    failed: set[str]  # of loss, gradients, weights, router, …
    group: str | None  # of the worst gradient; norms stand beside every matrix, and count where they are meant
    clean: Callable[[dict], bool] = lambda tensor: False  # gradients that the fault does not reach
    plausible: float = 1e-3  # the least error: far above the tolerance


def above_the_last_fc1(tensor: dict) -> bool:
    """Computed after, so differentiated before, the product whose input gradient is wrong."""
    return tensor["name"] in ("decoder.final_layernorm.weight", "output_layer.weight") or tensor["name"].startswith(
        "decoder.layers.3.mlp.")


MUTATIONS = [
    Mutation("column_backward_not_reduced", TP2 | UNTIED, {"gradients", "weights"}, "norms", above_the_last_fc1),
    Mutation("row_forward_not_reduced", TP2, {"loss", "gradients", "weights"}, None),
    Mutation("data_parallel_not_reduced", {}, {"gradients", "weights"}, None),
    Mutation("data_parallel_not_reduced", DISTRIBUTED, {"gradients", "weights"}, None),
    Mutation("tied_copies_not_reduced", PP2, {"gradients", "weights"}, "embedding",
             lambda tensor: tensor["group"] != "embedding"),
    Mutation("sequence_parallel_not_reduced", TP2_SP, {"gradients"}, "norms",
             lambda tensor: tensor["group"] != "norms"),
    Mutation("context_offset", CP2, {"loss", "gradients"}, "attention.qkv"),
    Mutation("router_scaled", MOE | EP2, {"gradients", "weights"}, "router",
             lambda tensor: tensor["group"] != "router"),
    Mutation("expert_gradients_averaged", MOE | EP2, {"gradients"}, "experts",
             lambda tensor: not tensor["group"].startswith("experts")),
    Mutation("tokens_counted_per_rank", {}, {"gradients", "weights"}, None),
    Mutation("copies_drift", {}, {"copies", "weights"}, None, lambda tensor: True, 1e-6),
]


def planted(mutation: Mutation) -> jobs.Case:
    cfg, ranks = jobs.fit(Config().with_values(DENSE | mutation.layout), ranks=2)
    return jobs.case(mutation.fault, cfg, ranks, tolerance=TOLERANCES["fp32"], plant=f"{FAULTS}:{mutation.fault}")


@pytest.fixture(scope="module")
def summaries() -> list[dict]:
    cases = [planted(mutation) for mutation in MUTATIONS]
    return [report.summary(case, found) for case, found in zip(cases, compare_all(cases), strict=True)]


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=lambda i: f"{MUTATIONS[i].fault}-{i}")
def test_a_planted_fault_is_caught_and_named(summaries, number):
    mutation, found = MUTATIONS[number], summaries[number]
    assert "failure" not in found, found
    assert not found["passed"]
    assert mutation.failed <= set(found["failed"]), found["worst"]
    assert found["worst"]["initial"] == 0.0
    gradients = {tensor["name"]: tensor["gradients"]["error"] for tensor in found["tensors"] if tensor["gradients"]}
    if mutation.group is not None:
        groups = [group for group in found["groups"] if group != "norms" or mutation.group == "norms"]
        worst = max(groups, key=lambda group: found["groups"][group]["gradients"])
        assert worst.startswith(mutation.group), found["groups"]
        assert found["groups"][worst]["gradients"] > mutation.plausible
    for tensor in found["tensors"]:
        if mutation.clean(tensor) and tensor["gradients"]:
            assert gradients[tensor["name"]] < TOLERANCES["fp32"], tensor
