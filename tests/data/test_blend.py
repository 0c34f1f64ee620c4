"""The blend's closed form against a queue of times in plain integers: every position, counts, ranks, shares, ties."""

from __future__ import annotations

import heapq
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _index
from engine.data.blend import NEVER, BlendIndex, Segment, integer_weights
from engine.errors import UserError

# More than 8 sources take another path in C++; ties, and weights that are far apart, are the hard ones.
mixtures = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 2**40), st.just(2**40)), min_size=1, max_size=20)


def steps_of(weights):
    return [(2 * 2**40 * sum(weights) + weight) // (2 * weight) for weight in weights]


def reference(weights, blocks):
    """[(source, its block)]: the sources wait in a queue for the times of their next blocks."""
    steps = steps_of(weights)
    queue, out = [(step // 2, source, 0) for source, step in enumerate(steps)], []
    heapq.heapify(queue)
    for _ in range(blocks):
        due, source, own = queue[0]
        heapq.heapreplace(queue, (due + steps[source], source, own + 1))
        out.append((source, own))
    return out


def array(weights):
    return np.array(weights, np.int64)


def pairs(found):
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(mixtures, st.integers(0, 500), st.integers(0, 200), st.data())
def test_every_question_has_the_answer_of_the_queue(weights, first, count, data):
    blocks = reference(weights, first + count + 1)
    assert pairs(_index.blend_range(array(weights), first, count, 2)) == blocks[first : first + count]
    asked = data.draw(st.lists(st.integers(0, first + count), max_size=12))
    asked += sorted(asked)
    assert pairs(_index.blend_locate(array(weights), array(asked))) == [blocks[block] for block in asked]
    given_before = [sum(source == i for source, _ in blocks[:first]) for i in range(len(weights))]
    assert _index.blend_counts(array(weights), first).tolist() == given_before
    assert _index.blend_rank(array(weights), *blocks[first]) == first
    owns = [data.draw(st.integers(-1, 20)) for _ in weights]
    coming = [(own * step + step // 2, source) for source, (own, step) in
              enumerate(zip(owns, steps_of(weights), strict=True)) if own >= 0]
    assert _index.blend_earliest(array(weights), array(owns)) == min(coming, default=(0, -1))[1]


@pytest.mark.parametrize("weights", [[3, 5, 9], [1] * 7, [1, 2**40, 2**39], list(range(1, 41))])
@pytest.mark.parametrize("far", [10**6, 10**13, 2**61])
def test_far_blocks_follow_from_the_times_alone(weights, far):
    """Where no queue comes: (source, own) at j is right if it comes after j others, and counts add up."""
    steps = steps_of(weights)
    count = 2 * len(weights) + 5
    found = pairs(_index.blend_range(array(weights), far, count, 1))
    times = [(own * steps[source] + steps[source] // 2, source) for source, own in found]
    assert times == sorted(times)

    def before(when, source):  # blocks of all sources before this time, ties in the order of sources
        return sum(max(0, -((step // 2 - when - (i < source)) // step)) for i, step in enumerate(steps))

    assert [before(*pair) for pair in times] == list(range(far, far + count))
    assert pairs(_index.blend_locate(array(weights), np.arange(far, far + count))) == found
    assert _index.blend_counts(array(weights), far).sum() == far
    assert [_index.blend_rank(array(weights), *pair) for pair in found] == list(range(far, far + count))


def test_a_range_over_many_starts_is_the_same_with_any_number_of_threads():
    weights = array([50, 20, 15, 10, 5])
    source, own = _index.blend_range(weights, 7, 300_000, 1)
    for threads in (2, 5):
        other = _index.blend_range(weights, 7, 300_000, threads)
        np.testing.assert_array_equal(np.stack(other), np.stack([source, own]))
    expected = reference(weights.tolist(), 200_007)
    assert list(zip(source[:200_000].tolist(), own[:200_000].tolist(), strict=True)) == expected[7:]


def test_a_walk_longer_than_what_one_start_is_good_for():
    """The second source comes every 2^21 blocks: beyond what the 64-bit times of a range reach."""
    weights, blocks = array([2**40, 2**19]), 2**21 + 10
    located = _index.blend_locate(weights, np.arange(blocks))
    np.testing.assert_array_equal(np.stack(located), np.stack(_index.blend_range(weights, 0, blocks, 1)))
    assert np.flatnonzero(located[0]).tolist() == [_index.blend_rank(weights, 1, 0)]
    assert abs(_index.blend_rank(weights, 1, 1) - 3 * 2**20) < 4


@settings(max_examples=40, deadline=None)
@given(mixtures)
def test_no_count_is_further_from_its_share_than_the_bound(weights):
    """The bound of csrc/index/blend.hpp, after every one of the first blocks, in exact fractions."""
    total, given_so_far = sum(weights), [0] * len(weights)
    bounds = [(1 + Fraction((len(weights) - 2) * weight, total)) / 2 + Fraction(1, 10**6) for weight in weights]
    for j, (source, _) in enumerate(pairs(_index.blend_range(array(weights), 0, 600, 1)), 1):
        given_so_far[source] += 1
        for count, weight, bound in zip(given_so_far, weights, bounds, strict=True):
            assert abs(count - Fraction(j * weight, total)) <= bound


def test_shares_of_a_usual_blend_are_within_a_block_and_a_half():
    weights = [0.61, 0.3, 0.05, 0.04]
    source, _ = BlendIndex(weights).locate(np.arange(20_000))
    given_so_far = np.cumsum(source[:, None] == np.arange(4), axis=0)
    owed = np.arange(1, 20_001)[:, None] * np.array(weights)
    assert np.abs(given_so_far - owed).max() < 1.2
    assert [int(s) for s in BlendIndex([5, 5, 5]).locate(np.arange(7))[0]] == [0, 1, 2, 0, 1, 2, 0]


def test_ten_trillion_blocks_are_as_near_as_one():
    index = BlendIndex([5, 2])
    started = time.perf_counter()
    far = index.locate(np.array([10**13]))
    assert time.perf_counter() - started < 0.05
    assert abs(int(far[1][0]) - (5 if far[0][0] == 0 else 2) / 7 * 10**13) < 6


def test_threads_share_one_index():
    index, expected = BlendIndex([3, 2, 2]), BlendIndex([3, 2, 2]).locate(np.arange(4000))[0]
    wrong = []

    def ask(seed):
        blocks = np.random.default_rng(seed).integers(0, 4000, 300)
        wrong.extend(block for block in blocks if index.locate(np.array([block]))[0][0] != expected[block])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- segments -------------------------------------------------------------------------------------------------------


def three_segments(**more):
    """Blocks 0 to 9 of sources 0 and 1; then three of 2 alone; then 2 and 0 again."""
    first = [sum(source == i for source, _ in reference([3, 1], 10)) for i in range(2)]
    return BlendIndex.of([Segment(0, (0, 1), (3, 1), (0, 0, 0)), Segment(10, (2,), (1,), (*first, 0)),
                          Segment(13, (0, 2), (1, 1), (*first, 3))], **more), first


def test_segments_go_on_with_each_sources_next_block():
    index, first = three_segments()
    expected = [*reference([3, 1], 10), (2, 0), (2, 1), (2, 2)]
    expected += [(0, first[0] + own) if source == 0 else (2, 3 + own) for source, own in reference([1, 1], 20)]
    assert pairs(index.locate(np.arange(33))) == expected
    shuffled = np.random.default_rng(0).permutation(33)
    assert pairs(index.locate(shuffled)) == [expected[block] for block in shuffled]
    for blocks in range(34):
        assert index.counts(blocks).tolist() == [sum(s == i for s, _ in expected[:blocks]) for i in range(3)]
    segment = index.segments[2]
    for place, (source, own) in enumerate(expected[13:], 14):
        assert segment.first_end([own + 1 if source == number else NEVER for number in range(3)]) == place
    assert segment.first_end([NEVER, 1, NEVER]) == segment.first_end([2**62 - 1, 1, NEVER]) == NEVER
    assert (index.segment_at(9).start, index.segment_at(10).start, index.segment_at(99).start) == (0, 10, 13)


def test_names_of_sources_and_the_end():
    index, _ = three_segments(readers=[4, -1, 7], end=20)
    plain, _ = three_segments()
    own = plain.locate(np.arange(20))
    assert pairs(index.locate(np.arange(20))) == [([4, -1, 7][source], block) for source, block in pairs(own)]
    assert index.counts(25).tolist() == index.counts(20).tolist()
    with pytest.raises(UserError, match=r"data\.blend: its sources are used up after 20 blocks"):
        index.locate(np.array([3, 20]))


def test_a_single_source_is_itself():
    source, own = BlendIndex([0.7]).locate(np.array([0, 5, 10**15]))
    assert (source.tolist(), own.tolist()) == ([0, 0, 0], [0, 5, 10**15])
    assert BlendIndex([0.7]).counts(10**15).tolist() == [10**15]
    assert [len(x) for x in BlendIndex([1, 2]).locate(np.empty(0, np.int64))] == [0, 0]


# ---- weights and errors ---------------------------------------------------------------------------------------------


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
    two = array([1, 1])
    for weights in ([], [1, 0], [1, -1], [2**61, 2**61], [1] * 65536):
        with pytest.raises(ValueError, match=r"1 to 65535 sources|must be positive, and their sum below"):
            _index.blend_counts(array(weights), 3)
    assert len(_index.blend_counts(array([1] * 65535), 10**6)) == 65535
    for call in (lambda: _index.blend_counts(two, -1), lambda: _index.blend_counts(two, NEVER + 1),
                 lambda: _index.blend_range(two, -1, 3), lambda: _index.blend_range(two, NEVER - 1, 3),
                 lambda: _index.blend_locate(two, array([-1])), lambda: _index.blend_locate(two, array([NEVER])),
                 lambda: _index.blend_rank(two, 2, 0), lambda: _index.blend_rank(two, 0, -1)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="must not be negative"):
        _index.blend_range(two, 0, -1)
    with pytest.raises(ValueError, match="one dimension"):
        _index.blend_locate(two, array([[1]]))
    with pytest.raises(ValueError, match="differ in length"):
        _index.blend_earliest(two, array([1]))
    assert _index.blend_earliest(two, array([2**62, 2**63 - 1])) == -1
    for own in (10**9, 2**27):  # the latter's time is a small one in 128 bits
        assert _index.blend_rank(array([1, 2**61]), 0, own) == NEVER
        assert _index.blend_earliest(array([1, 2**61]), array([own, -1])) == -1
    assert _index.blend_rank(two, 0, 2**62) == NEVER
    assert _index.blend_rank(two, 1, 2**63 - 1) == NEVER
