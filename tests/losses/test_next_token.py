"""Loss and log-probabilities from hidden states against float64: values, accuracy, gradients, two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from engine.losses.log_probs import token_log_probs
from engine.losses.next_token import next_token_loss
from engine_kernels import linear_cross_entropy
from engine_kernels.linear import matmul_nt

H, ROWS = 24, 384  # hidden size; rows of the padded vocabulary
MASKS = ("full", "uneven", "one", "none")


def inputs(n: int, mask: str, *, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Hidden states, weights, labels and a loss mask; labels that are often right, so that accuracy is not zero."""
    g = torch.Generator().manual_seed(seed)
    hidden_nh, weight_vh = torch.randn(n, H, generator=g), 0.3 * torch.randn(ROWS, H, generator=g)
    labels_n = torch.randint(0, vocab, (n,), generator=g)
    guessed_n = (hidden_nh @ weight_vh[:vocab].t()).argmax(-1)
    labels_n = torch.where(torch.rand(n, generator=g) < 0.4, guessed_n, labels_n)
    mask_n = {"full": torch.ones(n), "uneven": (torch.rand(n, generator=g) < 0.3).float(),
              "one": F.one_hot(torch.tensor(n - 1), n).float(), "none": torch.zeros(n)}[mask]
    return hidden_nh.to(dtype), weight_vh.to(dtype), labels_n, mask_n


def reference(hidden_nh, weight_vh, labels_n, mask_n, vocab: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0):
    """-> loss sum, correct predictions, gradients of hidden states and of all rows, in float64."""
    hidden, weight = hidden_nh.double().requires_grad_(), weight_vh.double().requires_grad_()
    logits_nv = hidden @ weight[:vocab].t()
    loss_n = F.cross_entropy(logits_nv, labels_n, reduction="none", label_smoothing=label_smoothing)
    loss = ((loss_n + z_loss * logits_nv.logsumexp(-1).square()) * mask_n).sum()
    loss.backward()
    correct = ((logits_nv.argmax(-1) == labels_n) & (mask_n > 0)).sum()
    return loss.detach(), correct, hidden.grad, weight.grad


def fused(hidden_nh, weight_vh, labels_n, mask_n, vocab: int, *, factor: float = 1.0, **options):
    hidden, weight = hidden_nh.clone().requires_grad_(), weight_vh.clone().requires_grad_()
    loss, correct = next_token_loss(hidden, weight, labels_n, mask_n, vocab_size=vocab, **options)
    (loss * factor).backward()
    return loss.detach(), correct, hidden.grad, weight.grad


def assert_equals_reference(found, expected, *, tolerance: float = 2e-6, factor: float = 1.0) -> None:
    loss, correct, grad_h, grad_w = found
    assert loss.item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert correct.item() == expected[1].item()
    for grad, wanted in ((grad_h, expected[2]), (grad_w, expected[3])):
        wanted = wanted * factor
        assert (grad.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 33])
def test_equals_float64_at_chunk_boundaries(n, mask, impl, terms):
    given = inputs(n, mask, vocab=300, seed=n)
    expected = reference(*given, 300, **terms)
    assert_equals_reference(fused(*given, 300, impl=impl, chunk_tokens=8, **terms), expected)
    if mask == "full" and n > 8:
        assert expected[1] > 0, "no prediction is right: accuracy is not tested"


@pytest.mark.parametrize("vocab", [ROWS, 383, 300, 1])
def test_padding_rows_take_no_probability_and_no_gradient(vocab):
    given = inputs(20, "uneven", vocab=vocab, seed=vocab)
    given[1][vocab:] = 100.0  # logits far above all others, were they counted
    found = fused(*given, vocab)
    assert_equals_reference(found, reference(*given, vocab))
    assert torch.all(found[3][vocab:] == 0)


def test_masked_tokens_leave_exact_zeros():
    given = inputs(20, "uneven", vocab=300)
    hidden_grad = fused(*given, 300)[2]
    assert torch.all(hidden_grad[given[3] == 0] == 0)
    loss, correct, grad_h, grad_w = fused(*given[:3], torch.zeros(20), 300)
    assert loss == 0
    assert correct == 0
    assert torch.all(grad_h == 0)
    assert torch.all(grad_w == 0)


@pytest.mark.parametrize("chunk", [8, 64])
def test_bf16_is_as_near_as_its_rounding(chunk):
    given = inputs(50, "uneven", vocab=300, dtype=torch.bfloat16)
    found = fused(*given, 300, chunk_tokens=chunk)
    loss, _, grad_h, grad_w = reference(*given, 300)  # of the same rounded inputs
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(loss.item(), rel=4e-3)
    for grad, wanted in ((found[2], grad_h), (found[3], grad_w)):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("scale", [4096.0, torch.tensor(1024.0)])
def test_scale_is_in_the_gradients_once(scale):
    given = inputs(20, "uneven", vocab=300)
    found = fused(*given, 300, scale=scale, factor=float(scale))
    assert_equals_reference(found, reference(*given, 300), factor=float(scale))


def test_another_factor_on_the_loss_reaches_the_gradients():
    given = inputs(20, "uneven", vocab=300)
    assert_equals_reference(fused(*given, 300, factor=0.25), reference(*given, 300), factor=0.25)


def test_scale_keeps_small_fp16_gradients():
    hidden_nh, weight_vh, labels_n, mask_n = inputs(20, "full", vocab=300)
    given = hidden_nh.half(), (weight_vh * 1e-4).half(), labels_n, mask_n * 1e-4  # gradients below fp16's smallest
    expected = reference(*given, 300)[2]
    lost = fused(*given, 300, impl="torch")[2]
    kept = fused(*given, 300, impl="torch", scale=2.0**18, factor=2.0**18)[2].double() / 2.0**18
    assert (lost.double() - expected).norm() > 0.1 * expected.norm()
    assert (kept - expected).norm() < 0.02 * expected.norm()


def test_without_gradients_only_the_loss_is_computed():
    given = inputs(20, "uneven", vocab=300)
    with torch.no_grad():
        loss, correct = next_token_loss(*given, vocab_size=300)
    expected = reference(*given, 300)
    assert loss.item() == pytest.approx(expected[0].item(), rel=2e-6)
    assert correct == expected[1]


def log_prob_reference(hidden_nh, weight_vh, labels_n, mask_n, vocab: int, temperature: float):
    """-> log-probabilities, entropies, and gradients of their mask-weighted sum, in float64."""
    hidden, weight = hidden_nh.double().requires_grad_(), weight_vh.double().requires_grad_()
    logps_nv = (hidden @ weight[:vocab].t() / temperature).log_softmax(-1)
    logps_n = logps_nv.gather(1, labels_n[:, None])[:, 0]
    (logps_n * mask_n).sum().backward()
    return logps_n.detach(), -(logps_nv.exp() * logps_nv).sum(-1).detach(), hidden.grad, weight.grad


def assert_equals_log_prob_reference(found, expected, *, tolerance: float = 2e-6) -> None:
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * max(exact.norm(), 1.0)


def log_probs(hidden_nh, weight_vh, labels_n, mask_n, vocab: int, temperature: float, **options):
    hidden, weight = hidden_nh.clone().requires_grad_(), weight_vh.clone().requires_grad_()
    logps_n, entropy_n = token_log_probs(hidden, weight, labels_n, vocab_size=vocab, temperature=temperature,
                                         entropy=True, **options)
    (logps_n * mask_n).sum().backward()
    return logps_n.detach(), entropy_n, hidden.grad, weight.grad


@pytest.mark.parametrize("impl", ["auto", "torch", "triton"])
def test_log_probs_equal_float64(impl):
    given = *inputs(21, "uneven", vocab=300), 300, 0.7
    assert_equals_log_prob_reference(log_probs(*given, impl=impl, chunk_tokens=8), log_prob_reference(*given))


def test_two_ranks_that_share_the_vocabulary_equal_one(tmp_path: Path):
    plain, more = {}, {"label_smoothing": 0.1, "z_loss": 1e-3}
    cases = {}
    for name, vocab, mask, dtype, terms in (
            ("padded", 300, "uneven", torch.float32, plain), ("full", ROWS, "full", torch.float32, plain),
            ("second rank all padding", 150, "uneven", torch.float32, plain),
            ("nothing supervised", 300, "none", torch.float32, plain), ("bf16", 300, "uneven", torch.bfloat16, plain),
            ("smoothing and z-loss", 300, "uneven", torch.float32, more),
            ("the same with all padding", 150, "full", torch.float32, more)):
        cases[name] = (*inputs(21, mask, vocab=vocab, seed=vocab, dtype=dtype), vocab), terms
    torch.save(cases, tmp_path / "cases.pt")
    for code, output in tiny.launch(Path(__file__).with_name("two_ranks.py"), 2, tmp_path, timeout=120):
        assert code == 0, output
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    for name, (given, terms) in cases.items():
        for key in [key for key in ranks[0]["loss"] if key[0] == name]:
            tolerance = 1e-2 if name == "bf16" else 2e-6
            (loss0, correct0, hidden0, weight0), (loss1, correct1, hidden1, weight1) = (r["loss"][key] for r in ranks)
            assert torch.equal(loss0, loss1), key
            assert correct0 == correct1, key
            found = loss0, correct0, hidden0.float() + hidden1.float(), torch.cat([weight0, weight1])
            assert_equals_reference(found, reference(*given, **terms), tolerance=tolerance)

            (logps0, entropy0, hidden0, weight0), (logps1, entropy1, hidden1, weight1) = (
                r["logps"][key] for r in ranks)
            assert torch.equal(logps0, logps1), key
            assert torch.equal(entropy0, entropy1), key
            found = logps0, entropy0, hidden0.float() + hidden1.float(), torch.cat([weight0, weight1])
            assert_equals_log_prob_reference(found, log_prob_reference(*given, temperature=0.8), tolerance=tolerance)


@pytest.mark.parametrize("op", ["loss", "hits", "log_probs"])
def test_tokens_that_do_not_count_are_not_projected_on_a_cpu(monkeypatch, op):
    hidden, weight, labels, _ = inputs(40, "full", vocab=300)
    mask, projected = torch.zeros(40), []
    mask[10:15] = 1.0
    monkeypatch.setattr(linear_cross_entropy, "matmul_nt", lambda x, w: projected.append(len(x)) or matmul_nt(x, w))
    if op == "log_probs":
        token_log_probs(hidden, weight, labels.masked_fill(mask == 0, -1), vocab_size=300)
    else:
        next_token_loss(hidden, weight, labels, mask, vocab_size=300, per_token=op == "hits")
    assert projected == [5]


@pytest.mark.parametrize("mask", MASKS)
def test_hits_of_each_token(mask):
    hidden, weight, labels, mask_n = inputs(50, mask, vocab=300)
    loss, hits_n = next_token_loss(hidden, weight, labels, mask_n, vocab_size=300, per_token=True)
    guessed_n = (hidden @ weight[:300].t()).argmax(-1)
    assert torch.equal(hits_n > 0, (guessed_n == labels) & (mask_n > 0))
    summed, count = next_token_loss(hidden, weight, labels, mask_n, vocab_size=300)
    assert (loss, hits_n.sum()) == (summed, count)
