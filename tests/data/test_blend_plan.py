"""Plans of blends, over changes, last epochs and resumes, against a simulation that goes block by block."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import ledger
from engine.data.blend import integer_weights
from engine.data.blend_plan import BlendPlan, Change, Source, token_weights
from engine.data.ledger import Given
from engine.errors import UserError

S = 8


def source(name, blocks=10, max_epochs=None, path=None):
    return Source(path or f"data/{name}", f"hash of {name}", blocks * S + 1, 3 * blocks, blocks, max_epochs)


@dataclass
class Start:
    """What the configuration of one start says; ``until`` is the position (tokens) at which it is stopped."""

    sources: list[Source]
    changes: list[Change]
    until: int


def plan_of(start, tokens_of_step, position=0, record=None):
    """The plan of a run whose every step reads as many tokens, which it began with."""
    return BlendPlan(start.sources, start.changes, seq_length=S, seed=1, step=position // tokens_of_step,
                     position=position, record=record, position_of=lambda step: step * tokens_of_step)


class Simulation:
    """One block after the other: who may give, has anything changed, whose time is next."""

    def __init__(self):
        self.numbers = {}  # of sources, by fingerprint, as they have come
        self.given = {}
        self.segment = None  # (shares by number, [(time, number)] of their next blocks)
        self.blocks = []  # (fingerprint, its block)

    def run(self, start, tokens_of_step, first, last):
        """Blocks first to last; False where the sources end before."""
        for one in start.sources:
            if one.fingerprint not in self.numbers:
                self.numbers[one.fingerprint] = len(self.numbers)
                self.given[one.fingerprint] = 0
        for block in range(first, last):
            held = [change for change in start.changes if change.step * tokens_of_step <= block * S]
            if not self.step(start, held[-1].weights):
                return False
        return True

    def step(self, start, weights):
        names, floats = [], []
        for one in start.sources:
            weight = weights[start.sources.index(one)]
            most = None if one.max_epochs is None else round(one.max_epochs * one.blocks, 6) // 1
            if weight > 0 and (most is None or self.given[one.fingerprint] < most):
                names.append(one.fingerprint)
                floats.append(weight)
        if not names:
            return False
        shares = dict(zip(names, integer_weights(floats).tolist(), strict=True))
        if self.segment is None or self.segment[0] != shares:
            steps = {name: (2 * 2**40 * sum(shares.values()) + share) // (2 * share) for name, share in shares.items()}
            self.segment = shares, steps, {name: step // 2 for name, step in steps.items()}
        _, steps, due = self.segment
        chosen = min(due, key=lambda name: (due[name], self.numbers[name]))
        due[chosen] += steps[chosen]
        self.blocks.append((chosen, self.given[chosen]))
        self.given[chosen] += 1
        return True


def read(plan, start, first, last):
    """Blocks first to last as the loader would read them: the configuration's sources by their places."""
    if last <= first:
        return []
    place, own = plan.index.locate(np.arange(first, last))
    return [(start.sources[p].fingerprint, int(o)) for p, o in zip(place, own, strict=True)]


@st.composite
def starts(draw):
    """A run of up to four starts, each with other weights, changes, caps, sources; stopped between or within blocks."""
    tokens_of_step = draw(st.sampled_from([4, 8, 12, 32, 100]))
    found, until = [], 0
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True))
        sources = [source(name, blocks=ord(name) - 90,
                          max_epochs=draw(st.sampled_from([None, None, 0.29, 1.0, 2.5])),
                          path=draw(st.sampled_from([None, f"moved/{name}"]))) for name in names]
        weight = st.sampled_from([0.0, 1.0, 1.0, 2.0, 0.1, 7.5])
        weights = [draw(st.lists(weight, min_size=len(names), max_size=len(names)).filter(any))
                   for _ in range(draw(st.integers(1, 3)))]
        later = draw(st.lists(st.integers(1, 60), min_size=len(weights) - 1, max_size=len(weights) - 1, unique=True))
        changes = [Change(step, tuple(w)) for step, w in zip([0, *sorted(later)], weights, strict=True)]
        until += draw(st.integers(0, 15)) * tokens_of_step
        found.append(Start(sources, changes, until))
    return tokens_of_step, found


@settings(max_examples=150, deadline=None)
@given(starts())
def test_a_run_of_many_starts_reads_what_the_simulation_says(run):
    """No block twice, none left out, whatever the configuration becomes; a start that changes nothing is as none."""
    tokens_of_step, all_starts = run
    simulation, position, record = Simulation(), 0, None
    for start in all_starts:
        there = [one.fingerprint for one in start.sources]
        if position % S and simulation.blocks[-1][0] not in there:
            with pytest.raises(UserError, match="has left the blend"):
                plan_of(start, tokens_of_step, position, record)
            return
        plan = plan_of(start, tokens_of_step, position, record)
        begun, last = -(-position // S), -(-start.until // S)
        lasted = simulation.run(start, tokens_of_step, begun, last)
        assert lasted == (plan.end is None or plan.end >= last * S)
        if not lasted:
            assert plan.end == len(simulation.blocks) * S
            last = len(simulation.blocks)
        assert read(plan, start, begun, last) == simulation.blocks[begun:]
        if position % S:
            assert read(plan, start, begun - 1, begun) == simulation.blocks[begun - 1 : begun]
        given_by = {one.fingerprint: count for one, count in
                    zip(plan.sources, plan.index.counts(last).tolist(), strict=True)}
        assert given_by == {name: simulation.given.get(name, 0) for name in given_by}
        for name, count in given_by.items():  # every block of a source once, in its order
            assert [own for who, own in simulation.blocks if who == name] == list(range(count))
        if not lasted:
            return
        record = json.loads(json.dumps(plan.record(start.until)))
        if start.until:
            again = plan_of(start, tokens_of_step, start.until, record)
            assert again.index.segments == plan.index.segments
            # News is only what begins just here, which the first of the two had planned.
            assert again.notes == [] or last in [segment.start for segment in plan.index.segments]
        position = start.until


def test_a_change_begins_with_the_next_whole_block():
    one = Start([source("a"), source("b")], [Change(0, (1, 0)), Change(3, (0, 1))], 0)
    plan = plan_of(one, 12)  # step 3 begins at token 36, in block 4
    assert [name[-1] for name, _ in read(plan, one, 0, 8)] == list("aaaaabbb")
    assert [segment.start for segment in plan.index.segments] == [0, 5]


def test_a_source_leaves_with_its_last_block_and_the_others_share_on():
    one = Start([source("a", 4, 1.5), source("b", 100), source("c", 100)], [Change(0, (4, 1, 1))], 0)
    names = [name[-1] for name, _ in read(plan_of(one, 8), one, 0, 30)]
    assert names.count("a") == 6
    last = max(place for place, name in enumerate(names) if name == "a")
    assert names[last + 1 :] == (["b", "c"] * 30)[: 29 - last]


def test_when_no_source_is_left_it_says_after_how_many_tokens():
    one = Start([source("a", 4, 1.0), source("b", 10, 0.29)], [Change(0, (1, 1))], 0)
    plan = plan_of(one, 12)
    assert plan.end == (4 + 2) * S  # 0.29 epochs of 10 blocks are 2 whole ones
    plan.check_enough(4)
    with pytest.raises(UserError, match=r"used up \(max_epochs\) after 48 tokens, but 5 steps \(train\.max_steps\) "
                       r"read 60\. Raise max_epochs, add a source, or set train\.max_steps to 4$"):
        plan.check_enough(5)
    assert Source("a", "", 0, 0, 100, 0.29).limit() == 29
    nothing = plan_of(Start([source("a", 2, 0.1)], [Change(0, (1,))], 0), 8)
    assert nothing.end == 0
    with pytest.raises(UserError, match=r"after 0 tokens.*add a source$"):
        nothing.check_enough(1)


def test_weights_of_documents_and_of_sizes():
    long, short = Source("long", "1", 9000, 10, 90), Source("short", "2", 1000, 100, 10)
    assert token_weights([long, short], [1, 1], "tokens") == (1, 1)
    assert token_weights([long, short], [1, 2], "documents") == (900, 20)
    assert token_weights([long, short], None, "documents") == (90, 10)
    assert token_weights([long, short], [None, None], "tokens") == (90, 10)
    plan = BlendPlan([long, short], [Change(0, token_weights([long, short], [1, 1], "documents"))], seq_length=100,
                     seed=1, position_of=lambda step: step)
    first, second = plan.given(9100 * 100)
    assert first.documents / second.documents == pytest.approx(1, rel=0.05)  # the shares asked for


def test_what_a_resumed_run_is_told_of():
    before = Start([source("a"), source("b")], [Change(0, (1, 1))], 80)
    record = plan_of(before, 8).record(80)

    def notes(sources, weights):
        return plan_of(Start(sources, [Change(0, weights)], 0), 8, 80, record).notes

    assert notes([source("b"), source("a", path="moved/a")], (2, 2)) == []
    assert notes([source("a"), source("b")], (3, 1)) == [
        "the blend changes here, at 80 tokens: data/a 75.00%, data/b 25.00%"]
    assert notes([source("a"), source("c")], (1, 1)) == [
        "data/c is new: it begins with its first block",
        "the blend changes here, at 80 tokens: data/a 50.00%, data/c 50.00%"]
    assert notes([source("a"), source("other", path="data/b")], (1, 1))[0] == (
        "data/b holds other data than before: it begins with its first block")


def test_a_source_that_returns_goes_on_where_it_stopped_and_copies_keep_apart():
    both = Start([source("a"), source("b")], [Change(0, (1, 1))], 0)
    record = plan_of(both, 8).record(80)
    alone = Start([source("a")], [Change(0, (1.0,))], 0)
    record = plan_of(alone, 8, 80, record).record(160)
    plan = plan_of(both, 8, 160, record)
    assert read(plan, both, 20, 24) == [("hash of a", 15), ("hash of b", 5), ("hash of a", 16), ("hash of b", 6)]
    twins = [source("a"), dataclasses.replace(source("a"), path="copy")]
    record = plan_of(Start(twins, [Change(0, (3, 1))], 0), 8).record(80)
    again = plan_of(Start(twins[::-1], [Change(0, (1, 3))], 0), 8, 80, record)
    assert again.notes == []
    assert [one.path for one in again.sources] == ["data/a", "copy"]
    moved = [twins[0], dataclasses.replace(twins[1], path="elsewhere")]
    again = plan_of(Start(moved, [Change(0, (3, 1))], 0), 8, 80, record)
    assert again.notes == []
    assert [one.path for one in again.sources] == ["data/a", "elsewhere"]


def test_other_blocks_are_refused_with_the_way_out():
    start = Start([source("a")], [Change(0, (1,))], 0)
    record = plan_of(start, 8).record(80)
    with pytest.raises(UserError, match=r"^data\.shuffle_seed: is 1, but the checkpoint's samples are those of 2.*Set "
                       r"it to 2, or start a new stage"):
        plan_of(start, 8, 80, record | {"seed": 2})
    with pytest.raises(UserError, match=r"^model\.seq_length: is 8, but the checkpoint's samples are those of 16"):
        plan_of(start, 8, 80, record | {"seq_length": 16})
    with pytest.raises(UserError, match=r"^data/a: has left the blend, but 4 tokens of its next block are read\. Keep "
                       r"it in data\.blend with weight 0"):
        plan_of(Start([source("b")], [Change(0, (1,))], 0), 4, 84, record)
    kept = Start([source("b"), source("a")], [Change(0, (1, 0))], 0)
    assert read(plan_of(kept, 4, 84, record), kept, 10, 12) == [("hash of a", 10), ("hash of b", 0)]


def test_the_ledger_is_exact_within_a_block():
    one = Start([source("a", 10), source("b", 5, 2.0)], [Change(0, (3, 1))], 0)
    plan = plan_of(one, 8)
    blocks = read(plan, one, 0, 60)
    for position in range(0, 400, 7):
        tokens = {"hash of a": 0, "hash of b": 0}
        for token in range(position):
            tokens[blocks[token // S][0]] += 1
        found = plan.given(position)
        assert [given.tokens for given in found] == list(tokens.values())
        assert [given.blocks for given in found] == [
            sum(name == key for name, _ in blocks[: position // S]) for key in tokens]
        assert [given.epochs for given in found] == [tokens["hash of a"] / 80, tokens["hash of b"] / 40]
        assert [given.documents for given in found] == [found[0].epochs * 30, found[1].epochs * 15]


def test_the_ledger_for_people_and_programs(tmp_path):
    given = [Given("x/a", 3, 24, 0.5, 10.0), Given("x/b/", 1, 8, 2.0, 30.0), Given("y/a", 0, 0, 0.0, 0.0)]
    ledger.write(tmp_path / ledger.FILE, given, step=4, tokens=32)
    found = json.loads((tmp_path / ledger.FILE).read_text())
    assert (found["step"], found["tokens"], [p.name for p in tmp_path.iterdir()]) == (4, 32, [ledger.FILE])
    assert found["sources"][1] == {"source": "x/b/", "blocks": 1, "tokens": 8, "share": 0.25, "epochs": 2.0,
                                   "documents": 30.0, "share_of_documents": 0.75}
    assert ledger.line(given) == ("data: x/a 24 tokens (75.0%, 0.50 epochs); b 8 tokens (25.0%, 2.00 epochs); "
                                  "y/a 0 tokens (0.0%, 0.00 epochs)")
    assert ledger.metrics(given) == {
        "data/x/a/tokens": 24, "data/x/a/epochs": 0.5, "data/b/tokens": 8, "data/b/epochs": 2.0,
        "data/y/a/tokens": 0, "data/y/a/epochs": 0.0}
    assert ledger.metrics(given[:1]) == {"data/epochs": 0.5}
    assert ledger.as_json(given[2:], step=0, tokens=0)["sources"][0]["share"] == 0.0
    assert ledger.line([Given(f"n{i}", 0, i, 0.0, 0.0) for i in range(40)]).endswith("; and 8 more sources")
