"""Rows of examples and of pairs: every token where it belongs, at any position, on any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from engine.data.examples.loader import ExampleLoader
from engine.data.examples.pair_rows import PairLoader, UnsharedPairLoader
from engine.data.examples.store import Example, Pair, Store
from engine.errors import UserError

S, PAD = 32, 7


def examples(count: int, seed: int = 0, longest: int = S + 1) -> list[Example]:
    """Of 2 to S + 1 tokens, which tell their example: 1000 i + place."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        tokens = 1000 * (i + 1) + np.arange(random.integers(2, longest + 1), dtype=np.int32)
        mask = random.random(len(tokens)) < 0.5
        mask[-1] = True
        made.append(Example(tokens, mask))
    return made


def pairs(count: int, seed: int = 0) -> list[Pair]:
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        p, c, r = random.integers(1, 9, 3)
        run = (1000 * (i + 1) + np.arange(p + c + r)).astype(np.int32)
        made.append(Pair(run[:p], run[p:p + c], run[p + c:]))
    return made


def loader(items, *, kind=ExampleLoader, packed=True, rank=0, size=1, workers=0, seed=5, weights=None):
    stores = [Store.of(f"source {i}", some) for i, some in enumerate(items)]
    return kind(stores, weights or [1.0] * len(stores), seq_length=S, seed=seed, pad_id=PAD, packed=packed,
                dp_rank=rank, dp_size=size, num_workers=workers)


def step(one: ExampleLoader, position: int, rows: int, micro: int = 1):
    return list(one.micro_batches(position, global_batch_size=rows, micro_batch_size=micro, seq_length=S))


def documents(batch, row: int) -> list[slice]:
    assert batch.cu_seqlens_b is not None
    ends = batch.cu_seqlens_b[row].tolist()
    assert (ends[0], ends[-1]) == (0, S)
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def unpacked(batch, items: list[Example]) -> list[int]:
    """Which examples the batch holds; every one of them compared token by token, and all the rest is padding."""
    found = []
    for row in range(len(batch.tokens_bs)):
        for place in documents(batch, row):
            tokens, labels = batch.tokens_bs[row, place], batch.labels_bs[row, place]
            mask, at = batch.loss_mask_bs[row, place], batch.position_ids_bs[row, place]
            assert at.tolist() == list(range(len(tokens)))
            if tokens[0] == PAD:
                assert set(tokens.tolist()) == {PAD}
                assert mask.sum() == 0
                assert place.stop == S, "padding is at the end"
                continue
            number = int(tokens[0]) // 1000 - 1
            expected = items[number]
            assert tokens.tolist() == expected.tokens[:-1].tolist()
            assert labels.tolist() == expected.tokens[1:].tolist()
            assert mask.tolist() == expected.mask[1:].astype(float).tolist()
            found.append(number)
    return found


# ---- supervised examples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_example_once_token_by_token(packed):
    items = examples(40)
    one = loader([items], packed=packed)
    found = [example for batch in step(one, 0, one.rows_per_epoch) for example in unpacked(batch, items)]
    assert sorted(found) == list(range(40))
    assert found != sorted(found)
    assert one.rows_per_epoch == 40 if not packed else one.rows_per_epoch < 30
    assert one.fill == pytest.approx(sum(len(i.tokens) - 1 for i in items) / (one.rows_per_epoch * S))
    second = [example for batch in step(one, one.rows_per_epoch * S, one.rows_per_epoch)
              for example in unpacked(batch, items)]
    assert sorted(second) == list(range(40))
    assert second != found


def rows_of(batches) -> list:
    return [[x[row].tolist() for x in (b.tokens_bs, b.labels_bs, b.loss_mask_bs, b.position_ids_bs, b.cu_seqlens_b)]
            for b in batches for row in range(len(b.tokens_bs))]


@pytest.mark.parametrize(("size", "micro", "workers"), [(1, 4, 0), (2, 2, 1), (4, 1, 3), (2, 4, 2)])
def test_rows_do_not_depend_on_ranks_micro_batches_or_threads(size, micro, workers):
    items = [examples(23, 1), examples(11, 2)]
    expected = rows_of(step(loader(items), 0, 48))
    found: dict[int, list] = {}
    for rank in range(size):
        with loader(items, rank=rank, size=size, workers=workers) as one:
            for start in (0, 16, 32):  # three steps, the second and third read ahead
                for m, batch in enumerate(step(one, start * S, 16, micro)):
                    for k, row in enumerate(rows_of([batch])):
                        found[start + (m * size + rank) * micro + k] = row
    assert [found[j] for j in range(48)] == expected


def test_any_position_is_read_without_those_before():
    items = [examples(30)]
    straight = rows_of(step(loader(items), 0, 200))
    for row in (1, 17, 99, 180):
        assert rows_of(step(loader(items), row * S, 4)) == straight[row:row + 4]


def test_sources_give_rows_by_weight_and_the_ledger_says_so():
    items = [examples(40, 1), examples(10, 2), examples(25, 3)]
    one = loader(items, weights=[6, 3, 1])
    ids = one.sample_ids(0, 1000, S)
    counts = [sum(row.source == source for row in ids) for source in range(3)]
    assert counts == [600, 300, 100]
    ledger = one.ledger(1000)
    assert [share.rows for share in ledger] == counts
    assert [share.source for share in ledger] == ["source 0", "source 1", "source 2"]
    assert ledger[1].epochs == pytest.approx(300 / one.corpus.indices[1].rows_per_epoch)
    for prefix in (10, 100, 333):  # in proportion all along, not in blocks
        shares = np.array([sum(row.source == source for row in ids[:prefix]) for source in range(3)])
        assert np.abs(shares - prefix * np.array([0.6, 0.3, 0.1])).max() < 2
    (batch,) = step(one, 500 * S, 1)
    held = ids[500]
    assert unpacked(batch, items[held.source]) == list(held.examples)
    assert one.sample_ids(500 * S, 1, S) == [held]


def test_evaluation_reads_every_example_once_over_all_ranks():
    items = [examples(23, 1), examples(9, 2)]
    for size, micro in ((1, 1), (2, 3), (3, 4)):
        ranks = [list(loader(items, rank=rank, size=size).evaluation_batches(micro, S)) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1, "a rank would wait for ever"
        supervised = sum(int(batch.loss_mask_bs.sum()) for batches in ranks for batch in batches)
        assert supervised == sum(int(item.mask[1:].sum()) for some in items for item in some)
        assert all(len(batch.tokens_bs) == micro for batches in ranks for batch in batches)
    first = next(loader(items).evaluation_batches(2, S, max_sequences=1))
    assert documents(first, 0)
    assert documents(first, 1) == [slice(0, S)], "the row after the last one is padding"
    assert first.loss_mask_bs[1].sum() == 0


def test_a_loader_of_nothing_has_no_tokens_and_no_batches():
    one = loader([])
    assert one.num_tokens == 0
    assert list(one.evaluation_batches(2, S)) == []


def test_other_lengths_and_batches_that_do_not_divide_are_refused():
    with loader([examples(9)], size=2) as one:
        with pytest.raises(UserError, match=r"train\.seq_length_schedule.*model\.seq_length \(32\), not to 16"):
            one.micro_batches(0, global_batch_size=2, micro_batch_size=1, seq_length=16)
        with pytest.raises(UserError, match="at the beginning of a row"):
            one.micro_batches(5, global_batch_size=2, micro_batch_size=1, seq_length=S)
        with pytest.raises(UserError, match=r"train\.global_batch_size.*multiple of 2"):
            one.micro_batches(0, global_batch_size=3, micro_batch_size=1, seq_length=S)
    with pytest.raises(RuntimeError, match="closed"):
        step(one, 0, 2)


def test_an_example_longer_than_a_row_cannot_come_in():
    with pytest.raises(ValueError, match="33"):
        loader([[Example(np.arange(S + 2, dtype=np.int32), np.ones(S + 2, bool))]])


# ---- pairs ----------------------------------------------------------------------------------------------------------


def branches(batch) -> dict[int, list[tuple[int, int, int, float]]]:
    """By branch: (token, label, position, mask) of its labels, in order."""
    assert batch.pairs is not None
    found: dict[int, list] = {}
    for row in range(len(batch.tokens_bs)):
        for at in range(S):
            if (branch := int(batch.pairs.branch_bs[row, at])) >= 0:
                found.setdefault(branch, []).append(tuple(
                    x[row, at].item() for x in (batch.tokens_bs, batch.labels_bs, batch.position_ids_bs,
                                                batch.loss_mask_bs)))
    return found


@pytest.mark.parametrize("kind", [PairLoader, UnsharedPairLoader])
@pytest.mark.parametrize("packed", [True, False])
def test_every_pair_has_its_two_answers_behind_its_prompt(kind, packed):
    items = [pairs(20, 1), pairs(9, 2)]
    one = loader(items, kind=kind, packed=packed)
    seen = []
    for batch in one.evaluation_batches(3, S):
        found = branches(batch)
        assert sorted(found) == list(range(2 * len(batch.pairs.ids_p)))
        for number, place in enumerate(batch.pairs.ids_p.tolist()):
            seen.append(place)
            pair = (items[0] + items[1])[place]
            for side, answer in enumerate((pair.chosen, pair.rejected)):
                tokens, labels, at, mask = zip(*found[2 * number + side], strict=True)
                assert labels == tuple(answer.tolist())
                assert tokens == (pair.prompt[-1], *answer[:-1].tolist())
                assert at == tuple(range(len(pair.prompt) - 1, len(pair.prompt) - 1 + len(answer)))
                assert set(mask) == {1.0}
        assert batch.loss_mask_bs.sum() == (batch.pairs.branch_bs >= 0).sum()
    assert sorted(seen) == list(range(29))
    assert len(seen) == 29


def test_a_branch_sees_its_own_prompt_and_a_prompt_sees_nothing_else():
    items = pairs(20, 3)
    one = loader([items], kind=PairLoader)
    shared = 0
    for batch in step(one, 0, one.rows_per_epoch):
        assert batch.prefixes_b is not None
        for row, prefixes in enumerate(batch.prefixes_b):
            places = documents(batch, row)
            assert len(prefixes) == len(places)
            for place, prefix in zip(places, prefixes, strict=True):
                branch = int(batch.pairs.branch_bs[row, place][0])
                if branch < 0:
                    assert prefix is None
                    continue
                pair = items[int(batch.pairs.ids_p[branch // 2])]
                assert (prefix is None) == (len(pair.prompt) == 1)
                if prefix is not None:
                    assert batch.tokens_bs[row, slice(*prefix)].tolist() == pair.prompt[:-1].tolist()
                    assert batch.labels_bs[row, slice(*prefix)].tolist() == pair.prompt[1:].tolist()
                    assert batch.position_ids_bs[row, place][0] == prefix[1] - prefix[0]
                    shared += 1
    assert shared > 20


def test_without_sharing_documents_are_whole_and_have_no_prefixes():
    items = pairs(12, 4)
    one = loader([items], kind=UnsharedPairLoader)
    for batch in step(one, 0, one.rows_per_epoch):
        assert batch.prefixes_b is None
        for row in range(len(batch.tokens_bs)):
            for place in documents(batch, row):
                assert batch.position_ids_bs[row, place].tolist() == list(range(place.stop - place.start))
                branch = batch.pairs.branch_bs[row, place]
                if branch.max() >= 0:
                    pair = items[int(batch.pairs.ids_p[branch.max() // 2])]
                    answer = (pair.chosen, pair.rejected)[int(branch.max()) % 2]
                    assert batch.tokens_bs[row, place].tolist() == [*pair.prompt, *answer[:-1]]


def test_batches_carry_the_references_of_their_pairs_once_these_are_known():
    items = [pairs(20, 1), pairs(9, 2)]
    with loader(items, kind=PairLoader, workers=2) as one:
        (before,) = step(one, 0, 4, 4)
        assert before.pairs.reference_p2 is None
        reference_n2 = torch.arange(58, dtype=torch.float64).view(29, 2)
        one.set_reference(reference_n2)
        for start in (0, 4, 8):
            (batch,) = step(one, start * S, 4, 4)
            assert torch.equal(batch.pairs.reference_p2, reference_n2[batch.pairs.ids_p])
        with pytest.raises(ValueError, match="must be"):
            one.set_reference(reference_n2[:5])
