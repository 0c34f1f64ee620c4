"""Generation with the key-value cache against generation without, filters against brute force, ends, bad prompts."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from engine.errors import UserError
from engine.evaluation.generation import Sampling, filter_logits, generate, pick
from engine.model import build
from engine.parallel import topology

PROMPT = [5, 17, 250, 33]


@pytest.fixture
def model(config):
    """Sharp enough logits that no near-tie depends on rounding."""
    def make(**changes):
        cfg = config(**{"model__init_std": 0.3} | changes)
        return build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]

    return make


SHAPES = {"grouped": {}, "qk norm": {"model__qk_norm": True, "model__tie_embeddings": False},
          "biases, one group": {"model__attention_bias": True, "model__num_query_groups": 1},
          "part rotates": {"model__rotary_percent": 0.5, "model__dropout": 0.3}}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", [Sampling(11, temperature=0.0), Sampling(11, temperature=1.0, top_p=1.0),
                                      Sampling(11, temperature=0.7, top_k=20, top_p=0.9, seed=3)], ids=str)
def test_cache_equals_no_cache(model, shape, sampling):
    m = model(**SHAPES[shape])
    cached, plain = (generate(m, PROMPT, sampling, eod_id=None, num_samples=3, use_cache=c) for c in (True, False))
    assert cached == plain
    assert [len(row) for row in cached] == [11] * 3
    assert max(itertools.chain.from_iterable(cached)) < tiny.VOCAB
    if sampling.temperature:
        assert cached[0] != cached[1]


def test_greedy_by_hand(model):
    m, tokens = model(), list(PROMPT)
    for _ in range(6):
        with torch.no_grad():
            logits = m.eval()(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1, : tiny.VOCAB]
        tokens.append(int(logits.argmax()))
    assert generate(m, PROMPT, Sampling(6, temperature=0.0), eod_id=None) == [tokens[len(PROMPT):]]


def test_the_mode_of_the_model_is_left_as_it_was(model):
    m = model()
    for training in (True, False):
        m.train(training)
        generate(m, PROMPT, Sampling(2), eod_id=None)
        assert m.training is training


def test_the_seed_fixes_the_draw(model):
    m = model()
    first, again, other = (generate(m, PROMPT, Sampling(8, 1.0, top_p=1.0, seed=s), eod_id=None) for s in (1, 1, 2))
    assert first == again != other


def test_each_row_stops_at_its_own_eod(model):
    m = model()
    sampling = Sampling(12, temperature=1.5, top_p=1.0)
    whole = generate(m, PROMPT, sampling, eod_id=None, num_samples=3)
    eod = whole[0][3]
    cut = [row[: row.index(eod)] if eod in row else row for row in whole]
    assert len(cut[0]) <= 3
    assert max(map(len, cut)) == 12, "no other row goes on"
    assert generate(m, PROMPT, sampling, eod_id=eod, num_samples=3) == cut
    assert generate(m, PROMPT, sampling, eod_id=eod, num_samples=1)[0] == generate(
        m, PROMPT, sampling, eod_id=None, num_samples=1)[0][: len(generate(
            m, PROMPT, sampling, eod_id=eod, num_samples=1)[0])]


def test_the_context_ends_generation(model):
    m = model()
    assert len(generate(m, PROMPT, Sampling(1000, 0.0), eod_id=None)[0]) == tiny.SEQ - len(PROMPT)
    assert len(generate(m, list(range(tiny.SEQ - 1)), Sampling(5, 0.0), eod_id=None)[0]) == 1


def test_bad_prompts(model):
    m = model()
    with pytest.raises(UserError, match="prompt: the prompt is empty"):
        generate(m, [], Sampling(), eod_id=None)
    for length in (tiny.SEQ, 3 * tiny.SEQ):
        with pytest.raises(UserError, match=f"the prompt has {length} tokens, the model's context {tiny.SEQ}"):
            generate(m, [1] * length, Sampling(), eod_id=None)


def brute_force(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """The indices that stay: the k likeliest, of those the fewest that together reach top_p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[:top_k] if top_k else order
    weights = torch.tensor([logits[i] for i in order], dtype=torch.float64).softmax(0).tolist()
    total, kept = 0.0, set()
    for i, weight in zip(order, weights, strict=True):
        if kept and total >= top_p:
            break
        kept.add(i)
        total += weight
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 40, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.77, 0.95, 1.0])
def test_filters_equal_brute_force(top_k, top_p):
    logits_bv = 3 * torch.randn(25, 40, generator=torch.Generator().manual_seed(top_k))
    kept = filter_logits(logits_bv, top_k, top_p)
    for row, left in zip(logits_bv.tolist(), kept, strict=True):
        assert set(left.isfinite().nonzero()[:, 0].tolist()) == brute_force(row, top_k, top_p)
    assert torch.equal(kept[kept.isfinite()], logits_bv[kept.isfinite()])


def test_draws_follow_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    drawn = pick(logits, Sampling(temperature=0.5, top_k=3, top_p=1.0), torch.Generator().manual_seed(0))
    expected = (torch.tensor([2.0, 1.0, 0.0]) / 0.5).softmax(0)
    assert torch.bincount(drawn, minlength=4)[3] == 0
    assert torch.allclose(torch.bincount(drawn, minlength=4)[:3] / 20000, expected, atol=0.015)
    assert torch.all(pick(logits, Sampling(temperature=0.0), torch.Generator()) == 0)
