"""Preference losses against their formulas in plain Python, their gradients against the formulas' derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.losses.log_probs import token_log_probs
from engine.losses.preference import branch_sums, preference_loss

CASES = [("dpo", 0.0), ("dpo", 0.2), ("robust", 0.1), ("robust", 0.3), ("ipo", 0.0)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def formula(policy, reference, lengths, loss: str, beta: float, e: float) -> tuple[float, float, float]:
    """-> the loss and its derivatives by the log-probabilities of chosen and rejected, from the definitions."""
    r = [p - q for p, q in zip(policy, reference, strict=True)]
    if loss == "ipo":
        error = r[0] / lengths[0] - r[1] / lengths[1] - 1 / (2 * beta)
        return error**2, 2 * error / lengths[0], -2 * error / lengths[1]
    delta = beta * (r[0] - r[1])
    right, wrong = math.exp(log_sigmoid(-delta)), math.exp(log_sigmoid(delta))  # -d/dx log s(x) = s(-x)
    if loss == "dpo":
        slope = beta * (-(1 - e) * right + e * wrong)
        return -(1 - e) * log_sigmoid(delta) - e * log_sigmoid(-delta), slope, -slope
    slope = beta * (-(1 - e) * right - e * wrong) / (1 - 2 * e)
    return (-(1 - e) * log_sigmoid(delta) + e * log_sigmoid(-delta)) / (1 - 2 * e), slope, -slope


@pytest.mark.parametrize(("loss", "e"), CASES)
@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(loss, e, beta, dtype):
    policy = (-50 * torch.rand(7, 2, dtype=torch.float64)).to(dtype).requires_grad_()
    reference = (policy.detach() + torch.randn(7, 2, dtype=dtype) * 3)
    lengths = torch.randint(1, 30, (7, 2))
    loss_p, rewards_p2 = preference_loss(policy, reference, lengths, loss=loss, beta=beta, label_smoothing=e)
    weights = torch.rand(7, dtype=dtype)
    (loss_p * weights).sum().backward()
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    assert policy.grad is not None
    for i in range(7):
        value, *slopes = formula(policy[i].tolist(), reference[i].tolist(), lengths[i].tolist(), loss, beta, e)
        assert loss_p[i].item() == pytest.approx(value, rel=bound)
        assert policy.grad[i].tolist() == pytest.approx([s * weights[i].item() for s in slopes], rel=bound, abs=bound)
    torch.testing.assert_close(rewards_p2, beta * (policy.detach() - reference))
    assert not rewards_p2.requires_grad


@pytest.mark.parametrize(("loss", "e"), CASES)
def test_the_loss_is_finite_however_far_apart(loss, e):
    policy = torch.tensor([[-1.0, -20000.0], [-20000.0, -1.0]], requires_grad=True)
    loss_p, _ = preference_loss(policy, torch.zeros(2, 2), torch.ones(2, 2), loss=loss, beta=1.0, label_smoothing=e)
    loss_p.sum().backward()
    assert loss_p.isfinite().all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_a_model_that_is_its_reference_loses_ln_2():
    policy = torch.full((3, 2), -40.0)
    for loss, e, expected in (("dpo", 0.0, math.log(2)), ("dpo", 0.2, math.log(2)), ("robust", 0.2, math.log(2)),
                              ("ipo", 0.0, 25.0)):
        loss_p, _ = preference_loss(policy, policy, torch.ones(3, 2), loss=loss, beta=0.1, label_smoothing=e)
        assert loss_p.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_robust_is_unbiased_under_flipped_labels():
    """Its mean over labels of which a share e is flipped is plain DPO: what it is for."""
    policy, reference, e = torch.randn(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64), 0.3
    lengths = torch.ones(50, 2)

    def losses(flip: bool):
        swapped = [x.flip(1) if flip else x for x in (policy, reference)]
        return preference_loss(*swapped, lengths, loss="robust", beta=0.7, label_smoothing=e)[0]

    plain, _ = preference_loss(policy, reference, lengths, beta=0.7)
    torch.testing.assert_close((1 - e) * losses(False) + e * losses(True), plain)


@pytest.mark.parametrize("wrong", [{"loss": "kto"}, {"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5},
                                   {"label_smoothing": -0.1}])
def test_settings_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), **wrong)


@settings(max_examples=40, deadline=None)
@given(pairs=st.integers(0, 5), tokens=st.integers(1, 60), rows=st.integers(1, 3), seed=st.integers(0, 1000))
def test_sums_of_answers(pairs, tokens, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    branch = torch.randint(-1, 2 * pairs, (rows, tokens), generator=generator)
    log_probs = torch.randn(rows, tokens, generator=generator, requires_grad=True)
    sums, lengths = branch_sums(log_probs, branch, pairs)
    assert sums.dtype == torch.float64
    assert sums.shape == lengths.shape == (pairs, 2)
    weights = torch.randn(pairs, 2, generator=generator, dtype=torch.float64)
    (sums * weights).sum().backward()
    for q in range(2 * pairs):
        own = branch == q
        assert lengths.flatten()[q] == own.sum()
        assert sums.flatten()[q].item() == pytest.approx(math.fsum(log_probs[own].tolist()), abs=1e-12)
    slopes = torch.cat([weights.flatten(), torch.zeros(1)])[branch].float()  # -1: the last
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad, slopes)


def test_small_differences_of_long_answers_survive():
    """fp32 sums of 30000 log-probabilities would lose the difference that beta is multiplied with."""
    log_probs = torch.full((1, 60000), -0.3)
    log_probs[0, 5] -= 1e-4
    branch = torch.arange(60000)[None] // 30000
    sums, _ = branch_sums(log_probs, branch, 1)
    assert (sums[0, 1] - sums[0, 0]).item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("kept", [0, 1, 9, 20, 33, 40])
@pytest.mark.parametrize("entropy", [False, True])
def test_labels_that_are_left_out_cost_nothing_and_get_nothing(kept, entropy):
    """Below three quarters the others' rows are put together; the result is that of all rows."""
    generator = torch.Generator().manual_seed(kept)
    hidden = torch.randn(40, 24, generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(64, 24, generator=generator)).requires_grad_()
    labels = torch.randint(0, 50, (40,), generator=generator)
    left_out = torch.randperm(40, generator=generator)[kept:]
    labels[left_out] = -1
    logps, entropies = token_log_probs(hidden, weight, labels, vocab_size=50, entropy=entropy, chunk_tokens=8)
    slopes = torch.randn(40, generator=generator)
    (logps * slopes).sum().backward()
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    table = (exact_h @ exact_w[:50].t()).log_softmax(-1)
    expected = torch.where(labels >= 0, table.gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    (expected * slopes).sum().backward()
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.all(logps[left_out] == 0)
    for found, exact in ((hidden, exact_h), (weight, exact_w)):
        assert found.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert torch.all(hidden.grad[left_out] == 0)  # type: ignore[index]
    if entropy:
        assert entropies is not None
        wide = -(table.exp() * table).sum(-1).detach()
        torch.testing.assert_close(entropies[labels >= 0].double(), wide[labels >= 0], rtol=1e-4, atol=1e-5)
