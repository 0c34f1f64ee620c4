"""The blend of sources against a plain Python reference in exact integers."""

from __future__ import annotations

import random
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _index
from engine.data import blend as blend_module
from engine.data.blend import BlendIndex, integer_weights
from engine.errors import UserError


def reference(weights, steps):
    """The rule in words: whoever is furthest behind weight * (j + 1) / total - given gives the j-th block."""
    total, given_so_far, out = sum(weights), [0] * len(weights), []
    for j in range(steps):
        deficits = [Fraction(w * (j + 1), total) - count for w, count in zip(weights, given_so_far, strict=True)]
        chosen = deficits.index(max(deficits))
        out.append((chosen, given_so_far[chosen]))
        given_so_far[chosen] += 1
    return out


def compiled(weights, steps):
    zeros = np.zeros(len(weights), np.int64)
    source, block, *_ = _index.blend(np.array(weights, np.int64), zeros, zeros, steps)
    return list(zip(source.tolist(), block.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_cpp_matches_the_reference_with_ties_and_zero_weights(weights):
    assert compiled(weights, 150) == reference(weights, 150)


@pytest.mark.parametrize("weights", [
    [1, 1], [1, 1, 1], [2**40, 2**40 + 1], [2**40 + 1, 2**40], [1, 2**40], [0, 3, 0, 1], [7] * 40, list(range(60)),
    [2**39, 2**38, 2**37, 2**37], [333333333333, 333333333334, 333333333333],
])
def test_cpp_matches_the_reference_near_ties_and_with_many_sources(weights):
    assert compiled(weights, 400) == reference(weights, 400)


def test_a_zero_weight_is_never_drawn_and_equal_weights_take_turns():
    assert {source for source, _ in compiled([0, 3, 0, 1], 1000)} == {1, 3}
    assert [source for source, _ in compiled([5, 5, 5], 7)] == [0, 1, 2, 0, 1, 2, 0]


def test_inputs_are_not_changed_and_the_state_continues():
    weights, zeros = np.array([3, 5, 9]), np.zeros(3, np.int64)
    source, block, deficits, counts = _index.blend(weights, zeros, zeros, 70)
    more_source, more_block, *_ = _index.blend(weights, deficits, counts, 30)
    assert zeros.tolist() == [0, 0, 0]
    whole = compiled([3, 5, 9], 100)
    assert [s for s, _ in whole] == [*source, *more_source]
    assert [b for _, b in whole] == [*block, *more_block]


def test_every_prefix_keeps_the_shares():
    weights = [0.61, 0.3, 0.05, 0.04]
    source, _ = BlendIndex(weights).locate(np.arange(20_000))
    given_so_far = np.cumsum(source[:, None] == np.arange(4), axis=0)
    owed = np.arange(1, 20_001)[:, None] * np.array(weights)
    assert np.abs(given_so_far - owed).max() < 1.5


def test_chunks_do_not_show(monkeypatch):
    monkeypatch.setattr(blend_module, "_CHUNK", 64)
    weights = [0.5, 0.2, 0.3]
    expected = np.array(compiled(integer_weights(weights).tolist(), 5000))
    far_first = BlendIndex(weights)
    for block in (4999, 0, 63, 64, 65, 3000):  # a resume starts far in, then goes back
        assert [int(x[0]) for x in far_first.locate(np.array([block]))] == expected[block].tolist()
    shuffled = np.random.default_rng(0).permutation(5000)
    source, own = far_first.locate(shuffled)
    np.testing.assert_array_equal(np.stack([source, own], 1), expected[shuffled])
    assert len(far_first._held) == blend_module._CHUNKS_HELD


def test_threads_share_one_index(monkeypatch):
    monkeypatch.setattr(blend_module, "_CHUNK", 32)
    index, expected = BlendIndex([3, 2, 2]), BlendIndex([3, 2, 2]).locate(np.arange(4000))[0]
    wrong = []

    def ask(seed):
        for _ in range(200):
            block = np.array([random.Random(seed).randrange(4000)])
            seed += 1
            if index.locate(block)[0][0] != expected[block[0]]:
                wrong.append(block)

    threads = [threading.Thread(target=ask, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_single_source_is_itself():
    source, own = BlendIndex([0.7]).locate(np.array([0, 5, 10**15]))
    assert (source.tolist(), own.tolist()) == ([0, 0, 0], [0, 5, 10**15])


def test_the_scale_of_the_weights_does_not_matter():
    expected = integer_weights([1, 2, 5]).tolist()
    for scale in (1e-300, 1e-3, 7.0, 1e300):
        assert integer_weights([scale, 2 * scale, 5 * scale]).tolist() == expected
    assert integer_weights([1, 1e-30]).tolist() == [2**40, 1]
    assert integer_weights([1, 1]).tolist() == [2**39, 2**39]


@pytest.mark.parametrize("weight", [0, 0.0, -1, -0.5, float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_positive_is_refused_by_its_place(weight):
    with pytest.raises(UserError, match=r"data\.blend\[1\]\.weight: weight .* is not a positive number"):
        integer_weights([1.0, weight, 2.0])


def test_wrong_calls_are_refused():
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="differ in length"):
        _index.blend(two, one, two, 3)
    with pytest.raises(ValueError, match="1 to 65535 sources"):
        _index.blend(two[:0], two[:0], two[:0], 3)
