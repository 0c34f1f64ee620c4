"""The measure itself: what an error is, over split tensors, copies, padding, and tensors of nothing but rounding."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.whole import Split
from engine.verification import compare

WHOLE, PARTED = (0, 1, 0, 1), [(0, 2, 0, 2), (0, 2, 1, 2)]  # gate and up interleaved over two ranks
STEP = {"loss": 5.0, "tokens": 7, "correct": 1, "grad_norm": 2.0, "router": None}
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
FC1, NORM = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"


def run(folder: Path, name: str, gradients: dict, *, steps=None) -> Path:
    """The file of one rank, in which initial weights, gradients and weights are all the same."""
    parts = {key: (place, torch.as_tensor(value, dtype=torch.float32)) for key, (place, value) in gradients.items()}
    path = folder / f"{name}.pt"
    torch.save({"initial": parts, "gradients": parts, "weights": parts, "steps": steps or [STEP]}, path)
    return path


def errors(tmp_path: Path, expected: dict, *ranks: dict, tied: bool = False, kind="gradients") -> dict[str, dict]:
    one = run(tmp_path, "one", {name: (WHOLE, value) for name, value in expected.items()})
    others = [run(tmp_path, f"rank{i}", rank) for i, rank in enumerate(ranks)]
    found = compare.compare([one], others, tied=tied)
    return {tensor["name"]: tensor[kind] for tensor in found["tensors"]}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-7, 10.0))
def test_the_error_is_norm_wise_over_the_whole_tensor(tmp_path_factory, seed, size):
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randn(8, 3, generator=draw)
    off = whole + size * torch.randn(8, 3, generator=draw)
    ranks = [{FC1: (place, Split(*place).take(off))} for place in PARTED]
    found = errors(tmp_path_factory.mktemp("case"), {FC1: whole}, *ranks)[FC1]
    exact = float((off.double() - whole.double()).norm() / whole.double().norm())
    assert found["error"] == pytest.approx(exact, rel=1e-6)


def test_the_worst_copy_counts(tmp_path):
    whole = torch.ones(4)
    right = {NORM: (WHOLE, whole)}
    found = errors(tmp_path, {NORM: whole}, right, {NORM: (WHOLE, whole * 1.5)}, right)
    assert found[NORM]["error"] == found[NORM]["copies"] == pytest.approx(0.5)
    assert found[NORM]["rank"] == 1
    parts = [{FC1: (place, torch.ones(4, 3))} for place in (*PARTED, *PARTED)]
    parts[3][FC1][1][0, 0] = 2.0  # the second copy of the second part
    found = errors(tmp_path, {FC1: torch.ones(8, 3)}, *parts)[FC1]
    assert found["error"] == pytest.approx(1 / math.sqrt(24))
    assert found["rank"] == 3


def test_copies_that_agree_on_what_is_wrong_are_wrong(tmp_path):
    found = errors(tmp_path, {NORM: torch.ones(4)}, {NORM: (WHOLE, [2.0] * 4)}, {NORM: (WHOLE, [2.0] * 4)})[NORM]
    assert (found["error"], found["copies"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([{NORM: (WHOLE, [1.0, 1.0])}], "missing"),
        ([{NORM: (WHOLE, [1.0, 1.0]), FC1: (PARTED[0], torch.ones(4, 3))}], r"only parts \[0\] of 2"),
        ([{NORM: (WHOLE, [1.0, 1.0]), FC1: (WHOLE, torch.ones(8, 4))}], r"shape \[8, 4\] for \[8, 3\] on rank 0"),
        ([{NORM: (WHOLE, [1.0, 1.0]), FC1: (WHOLE, torch.full((8, 3), torch.nan))}], None),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(tmp_path, ranks, problem):
    found = errors(tmp_path, {FC1: torch.ones(8, 3), NORM: torch.ones(2)}, *ranks)
    assert found[NORM]["error"] == 0.0
    assert found[FC1]["error"] == math.inf
    assert problem is None or re.fullmatch(problem, found[FC1]["problem"])


def test_a_tensor_that_one_rank_does_not_have_is_wrong(tmp_path):
    found = errors(tmp_path, {NORM: torch.ones(2)}, {NORM: (WHOLE, [1.0, 1.0]), FC1: (WHOLE, torch.ones(8, 3))})
    assert found[FC1] == {"error": math.inf, "copies": 0.0, "size": 0.0, "rank": None,
                          "problem": "not in the model of one rank"}


@pytest.mark.parametrize(("noise", "passes"), [(1e-9, True), (1e-7, False), (1.0, False)])
def test_rounding_in_a_gradient_that_is_zero_is_forgiven_and_no_more(tmp_path, noise, passes):
    """``noise`` relative to the model's average element; at the tolerance of 1e-5 the line is at 1e-8."""
    average = 3.0  # of a model that is this norm and a tiny zero tensor
    expected = {NORM: torch.full((4000,), average), FC1: torch.zeros(4, 3)}
    rank = {NORM: (WHOLE, expected[NORM]), FC1: (WHOLE, torch.full((4, 3), noise * average))}
    found = errors(tmp_path, expected, rank)
    assert (found[FC1]["error"] < 1e-5) == passes
    assert found[FC1]["error"] == pytest.approx(noise / compare.FLOORS["gradients"], rel=0.01)


def test_a_small_tensor_that_is_wrong_is_not_forgiven(tmp_path):
    expected = {NORM: torch.ones(4000), FC1: torch.full((4, 3), 1e-6)}
    found = errors(tmp_path, expected, {NORM: (WHOLE, expected[NORM]), FC1: (WHOLE, torch.full((4, 3), 2e-6))})
    assert found[FC1]["error"] == pytest.approx(1e-3, rel=0.01)


def test_a_bias_that_began_at_zero_is_measured_by_the_average_weight(tmp_path):
    expected = {NORM: torch.ones(4000), FC1: torch.full((4, 3), 0.01)}
    found = errors(tmp_path, expected, {NORM: (WHOLE, expected[NORM]), FC1: (WHOLE, torch.full((4, 3), 0.02))},
                   kind="weights")
    assert found[FC1]["error"] == pytest.approx(0.01, rel=0.01)
    assert errors(tmp_path, expected, {NORM: (WHOLE, expected[NORM] * 1.5), FC1: (WHOLE, expected[FC1])},
                  kind="weights")[NORM]["error"] == pytest.approx(0.5)


def test_the_head_on_the_last_stage_is_a_copy_of_a_tied_embedding(tmp_path):
    whole = torch.ones(6, 2)
    ranks = [{EMBEDDING: (WHOLE, whole)}, {HEAD: (WHOLE, whole * 3)}]
    found = errors(tmp_path, {EMBEDDING: whole}, *ranks, tied=True)
    assert found.keys() == {EMBEDDING}
    assert found[EMBEDDING]["error"] == pytest.approx(2.0)
    assert errors(tmp_path, {EMBEDDING: whole}, *ranks)[HEAD]["problem"] == "not in the model of one rank"


def test_rows_that_only_pad_must_stay_zero(tmp_path):
    whole, padded = torch.ones(6, 2), torch.cat([torch.ones(6, 2), torch.zeros(2, 2)])
    parts = [(0, 1, 0, 2), (0, 1, 1, 2)]
    ranks = [{EMBEDDING: (place, half)} for place, half in zip(parts, padded.chunk(2), strict=True)]
    assert errors(tmp_path, {EMBEDDING: whole}, *ranks)[EMBEDDING]["error"] == 0.0
    ranks[1][EMBEDDING][1][-1] = 1.0
    assert errors(tmp_path, {EMBEDDING: whole}, *ranks)[EMBEDDING]["error"] == pytest.approx(math.sqrt(2 / 12))


def test_steps_are_compared_on_every_rank():
    off = STEP | {"loss": 5.5, "router": {"tokens": [[3, 1]], "z": None}}
    found = compare.compare_steps([STEP | {"router": {"tokens": [[2, 2]], "z": None}}],
                                  [[STEP | {"router": {"tokens": [[2, 2]], "z": None}}], [off]])
    assert found[0]["loss"] == {"expected": 5.0, "found": 5.5, "error": pytest.approx(0.1)}
    assert found[0]["router"]["tokens"]["error"] == pytest.approx(math.sqrt(2) / math.sqrt(8))
    assert found[0]["router"]["z"]["error"] == 0.0
    lost = compare.compare_steps([STEP], [[STEP | {"loss": math.nan, "tokens": 6}]])
    assert lost[0]["loss"]["error"] == math.inf
    assert lost[0]["tokens_error"] == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (EMBEDDING, "embedding"), (HEAD, "output head"), (NORM, "norms"), (FC1, "mlp.fc1"),
        ("decoder.layers.3.self_attention.q_layernorm.weight", "norms"),
        ("decoder.layers.3.self_attention.linear_qkv.bias", "attention.qkv"),
        ("decoder.layers.3.self_attention.core_attention.softmax_offset", "attention, other"),
        ("decoder.layers.3.mlp.router.weight", "router"),
        ("decoder.layers.3.mlp.experts.local_experts.12.linear_fc2.weight", "experts.fc2"),
        ("decoder.layers.3.mlp.shared_experts.linear_fc1.weight", "shared expert"),
        ("decoder.layers.3.mamba.weight", "other"),
    ],
)
def test_groups_of_parameters(name, group):
    assert compare.group_of(name) == group
