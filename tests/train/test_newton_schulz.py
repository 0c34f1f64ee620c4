"""Newton–Schulz against float64, against torch's in bf16, and its split forms against its whole one."""

from __future__ import annotations

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from engine.train import newton_schulz as ns

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(8, 32), (32, 8), (24, 24), (1, 17), (17, 1), (160, 200), (200, 160)]


def matrices(n: int, rows: int, columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(n, rows, columns, generator=g) * torch.logspace(-3, 3, n)[:, None, None]


def by_singular_values(x_nrc: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The steps on float64 singular values: U p(p(… S)) Vᵀ with p(s) = a s + b s³ + c s⁵."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(x_nrc.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s[:, None, :] @ vh


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_the_polynomial_of_singular_values_in_float64(shape, one_by_one, monkeypatch):
    monkeypatch.setattr(ns, "onednn_is_faster_in_fp32", lambda: one_by_one)
    x_nrc = matrices(3, *shape)
    found, expected = ns.orthogonalise(x_nrc, COEFFICIENTS, 5), by_singular_values(x_nrc)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 3e-6
    if min(shape) > 1:
        singular = torch.linalg.svdvals(found)
        assert singular.median() > 0.6
        assert singular.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_equals_torch_bit_by_bit(shape):
    x_nrc = matrices(4, *shape)
    found = ns.orthogonalise(x_nrc.bfloat16(), COEFFICIENTS, 5)
    for mine, x_rc in zip(found, x_nrc, strict=True):
        assert torch.equal(mine, torch_newton_schulz(x_rc, COEFFICIENTS, 5, ns.EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(dtype):
    x_nrc = torch.zeros(2, 6, 4, dtype=dtype)
    assert torch.equal(ns.orthogonalise(x_nrc, COEFFICIENTS, 5), x_nrc)


def test_the_result_does_not_depend_on_the_batch():
    x_nrc = matrices(5, 160, 200)
    alone = torch.cat([ns.orthogonalise(x_nrc[i : i + 1], COEFFICIENTS, 5) for i in range(5)])
    assert torch.allclose(ns.orthogonalise(x_nrc, COEFFICIENTS, 5), alone, rtol=1e-4, atol=1e-6)


def test_operations_are_counted_as_they_run():
    """Every product through torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ns.orthogonalise(matrices(2, 48, 20), COEFFICIENTS, 3)
    assert counter.get_total_flops() == 2 * ns.flops(48, 20, 3)


@pytest.mark.parametrize(("rows", "columns", "dim", "ranks", "choice"), [
    (14336, 4096, 0, 8, "gram"),  # a gate of Llama 3 8B
    (4096, 14336, 1, 8, "gram"),  # its second weight
    (4096, 4096, 1, 8, "gram"),  # attention's projection
    (768, 2048, 0, 2, "gather"),  # an expert narrower than the model: gate or up,
    (2048, 768, 1, 2, "gather"),  # and its second weight
])
def test_the_cheaper_way_over_tensor_ranks(rows, columns, dim, ranks, choice):
    assert ns.cheaper_split(rows, columns, dim, ranks, 5, 2) == choice
