"""Best-fit decreasing in C++ against a plain one, and the rows of epochs."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _index
from engine.data.packing import RowIndex, pack


def plain(sizes: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as in the books: every row looked at for every example. -> rows, in the order opened."""
    rows: list[list[int]] = []
    room: list[int] = []
    touched: list[int] = []  # among equally full rows the C++ takes the one that came to this room last
    for now, item in enumerate(sorted(order, key=lambda i: -sizes[i])):  # stable
        fitting = [row for row in range(len(rows)) if room[row] >= sizes[item]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(capacity)
            touched.append(now)
        row = min(fitting, key=lambda i: (room[i], -touched[i]))
        rows[row].append(item)
        room[row] -= sizes[item]
        touched[row] = now
    return rows


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_best_fit_decreasing_as_in_the_books(data):
    capacity = data.draw(st.sampled_from([1, 7, 63, 64, 65, 4096, 4097, 300_000]))
    sizes = data.draw(st.lists(st.integers(1, capacity) | st.integers(1, max(1, capacity // 5)), max_size=60))
    order = data.draw(st.permutations(range(len(sizes))))
    found = pack(np.array(sizes, np.int32), capacity, order_n=np.array(order, np.int64))
    assert [row.tolist() for row in found] == plain(sizes, order, capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=400), st.integers(500, 2000), st.integers(0, 2**64 - 1))
def test_every_example_once_and_no_row_too_full_and_the_fill_does_not_depend_on_the_order(sizes, capacity, seed):
    sizes_n = np.array(sizes, np.int32)
    found = pack(sizes_n, capacity, order_n=_index.shuffled(len(sizes), seed, 0, 0))
    assert sorted(found.items_n.tolist()) == list(range(len(sizes)))
    fills = [int(sizes_n[found[row]].sum()) for row in range(len(found))]
    assert min(fills) > 0
    assert max(fills) <= capacity
    straight = pack(sizes_n, capacity)
    assert sorted(fills) == sorted(int(sizes_n[straight[row]].sum()) for row in range(len(straight)))


def lengths(count: int, mean: float, spread: float, longest: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(np.log(mean), spread, count), 5, longest).astype(np.int32)


@pytest.mark.parametrize(("count", "mean", "spread", "capacity"), [
    (52_000, 90, 0.7, 2048),  # short instructions
    (10_000, 600, 1.0, 4096),  # chats, some as long as a row
    (3_000, 250, 0.8, 2048),
    (100_000, 1500, 0.9, 8192),
])
def test_rows_of_realistic_lengths_are_99_percent_full(count, mean, spread, capacity):
    sizes_n = lengths(count, mean, spread, capacity)
    rows = len(pack(sizes_n, capacity))
    assert sizes_n.sum(dtype=np.int64) / (rows * capacity) >= 0.99


def test_a_million_examples_take_seconds_at_most_and_other_threads_go_on():
    sizes_n = lengths(1_000_000, 300, 0.9, 4096)
    beats, stop = [], threading.Event()

    def beat() -> None:
        while not stop.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.perf_counter()
    pack(sizes_n, 4096)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    assert seconds < 10  # 0.12 s on an idle core
    assert len([at for at in beats if start < at < start + seconds]) >= 3, "the GIL was held"


@pytest.mark.parametrize("size", [0, -1, 9])
@pytest.mark.parametrize("packing", [True, False])
def test_an_example_that_fits_no_row_is_refused(size, packing):
    with pytest.raises(ValueError, match=str(size)):
        pack(np.array([3, size, 4], np.int32), 8, packing=packing)


def test_orders_that_are_no_permutations_are_refused():
    sizes = np.array([3, 3, 5], np.int32)
    for order in ([0, 1, 7], [0, -1, 1], [2, 2, 2]):
        with pytest.raises((IndexError, ValueError)):
            _index.pack(sizes, np.array(order), 8)
    with pytest.raises(ValueError, match="length"):
        _index.pack(sizes, np.array([0, 1]), 8)
    with pytest.raises(ValueError, match="capacity"):
        _index.pack(sizes, np.arange(3), 0)
    assert [len(part) for part in _index.pack(np.empty(0, np.int32), np.empty(0, np.int64), 8)] == [0, 1]


def test_every_epoch_has_every_example_once_in_another_composition():
    index = RowIndex(lengths(500, 40, 0.8, 256), 256, seed=7)
    epochs = [[tuple(index.examples(epoch * index.rows_per_epoch + row)) for row in range(index.rows_per_epoch)]
              for epoch in range(3)]
    for rows in epochs:
        assert sorted(example for row in rows for example in row) == list(range(500))
    assert set(epochs[0]) & set(epochs[1]) != set(epochs[0]), "rows are never packed anew"
    assert epochs[0] != epochs[1] != epochs[2]
    again = RowIndex(lengths(500, 40, 0.8, 256), 256, seed=7)
    last = 2 * again.rows_per_epoch  # without having seen the epochs before
    assert [tuple(again.examples(last + row)) for row in range(again.rows_per_epoch)] == epochs[2]
    other = RowIndex(index.sizes_n, 256, seed=8)
    assert other.rows_per_epoch == index.rows_per_epoch
    assert other.epoch(0)[0].items_n.tolist() != index.epoch(0)[0].items_n.tolist()
    assert other.epoch(0)[1].tolist() != index.epoch(0)[1].tolist()
    assert index.epoch(1)[1].tolist() != index.epoch(0)[1].tolist()


def test_rows_do_not_come_in_the_order_of_their_lengths():
    index = RowIndex(lengths(2000, 40, 0.8, 256), 256, seed=1)
    longest = [int(index.sizes_n[index.examples(row)].max()) for row in range(index.rows_per_epoch)]
    third = len(longest) // 3
    assert abs(np.mean(longest[:third]) - np.mean(longest[-third:])) < 0.15 * np.mean(longest)


def test_without_packing_an_epoch_is_a_permutation_of_single_examples():
    index = RowIndex(np.full(50, 9, np.int32), 16, seed=3, packing=False)
    rows = [index.examples(row).tolist() for row in range(100)]
    assert all(len(row) == 1 for row in rows)
    first, second = [row[0] for row in rows[:50]], [row[0] for row in rows[50:]]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
