"""Loaders of blends over the life of a run: what they read from step to step, resumed, spread over ranks, refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datafiles import loader_config as config

from engine.data import loader as loader_module
from engine.data.indexed import IndexedDatasetWriter
from engine.errors import UserError

S, VOCAB = 16, 5000
SCHEDULES = {"global_batch_size": 4, "batch_size_schedule": {"start": 2, "every_steps": 3},
             "seq_length_schedule": [{"step": 0, "seq_length": 6}, {"step": 5, "seq_length": S}]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three directories whose tokens say where they are from: 0 to 999, 1000 to 1999, 2000 to 2999."""
    found = []
    for number, tokens in enumerate([700, 400, 900]):
        found.append(tmp_path_factory.mktemp(f"source{number}"))
        rng = np.random.default_rng(number)
        with IndexedDatasetWriter(found[-1] / "train", VOCAB) as writer:
            while tokens > 0:
                size = min(tokens, int(rng.integers(1, 80)))
                writer.add_document(1000 * number + rng.integers(0, 1000, size))
                tokens -= size
    return found


def blend_of(folders, *, limits=(None, None, None), changes=((7, [0, 1, 2]),), **more):
    entries = [(folder, weight, limit) for folder, weight, limit in zip(folders, [3, 1, 1], limits, strict=False)]
    return config(blend=entries, changes=changes, max_steps=20, **SCHEDULES | more)


def step_of(cfg, loader, step):
    """(position after it, the tokens and labels of every row) of a step."""
    train = cfg.train
    length, rows = train.seq_length_at(step, S), train.batch_size_at(step)
    position = train.tokens_before(step, S)
    batches = loader.micro_batches(position, global_batch_size=rows, micro_batch_size=1, seq_length=length)
    return position + rows * length, [(b.tokens_bs.tolist(), b.labels_bs.tolist()) for b in batches]


def run(cfg, first=0, last=20, record=None, **place):
    """[rows of each step], and the record after the last."""
    with loader_module.build(cfg, "train", **{"dp_rank": 0, "dp_size": 1} | place) as loader:
        position = cfg.train.tokens_before(first, S)
        notes = loader.begin(steps=20, step=first, position=position, record=record)
        rows = []
        for step in range(first, last):
            position, read = step_of(cfg, loader, step)
            rows.append(read)
        return rows, json.loads(json.dumps(loader.record(position))), notes, loader.given(position)


def test_a_run_stopped_at_any_step_reads_what_one_that_never_stopped_reads(folders):
    cfg = blend_of(folders, limits=(None, 1.0, None))
    whole, _, _, given = run(cfg)
    used = [{token // 1000 for tokens, _ in rows for row in tokens for token in row} for rows in whole]
    assert 0 in used[0]
    assert all(0 not in names for names in used[8:])  # weight 0 from step 7 on, whose first block begins before
    for stop in (1, 2, 6, 7, 8, 13):
        before, record, _, _ = run(cfg, last=stop)
        after, _, notes, again = run(cfg, first=stop, record=record)
        assert before + after == whole
        assert again == given
        assert len(notes) == (stop == 7)  # where the change is just then
        assert run(cfg, first=stop)[0] == after  # without a record: what the configuration makes of it from the start
    tokens = np.array([token for rows in whole for row, _ in rows for token in row[0]])
    assert [one.tokens for one in given] == [int((tokens // 1000 == number).sum()) for number in range(3)]


def test_ranks_read_one_run(folders):
    cfg = blend_of(folders)
    whole, record, _, given = run(cfg, last=9)
    halves = [run(cfg, last=9, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert [half[1:] for half in halves] == [(record, (), given)] * 2
    for step, rows in enumerate(whole):
        together = [row for pair in zip(halves[0][0][step], halves[1][0][step], strict=True) for row in pair]
        assert together == rows


def test_a_resumed_run_with_other_weights_goes_on_with_each_sources_next_block(folders):
    """Blocks are told by their first tokens: no block of an epoch is read twice before all are."""
    steps = {"global_batch_size": 4, "batch_size_schedule": None, "seq_length_schedule": []}
    first, record, _, before = run(blend_of(folders, changes=(), **steps), last=5)
    other = config(blend=[(folders[2], 5), (folders[1], 1)], max_steps=20, **steps)
    second, record, notes, after = run(other, first=5, last=8, record=record)
    assert notes == (f"the blend changes here, at 320 tokens: {folders[1]} 16.67%, {folders[2]} 83.33%",)
    assert [one.source for one in after] == [str(folder) for folder in folders]
    assert after[0] == before[0]
    third, record, _, last = run(blend_of(folders, changes=(), **steps), first=8, last=12, record=record)
    assert last[0].blocks > before[0].blocks
    assert [segment["start"] for segment in record["segments"]] == [0, 20, 32]
    rows = [tuple(row[0][0]) for step in first + second + third for row in step]
    assert len(rows) == len(set(rows)) == 48
    again, _, _, _ = run(blend_of(folders, changes=(), **steps), first=12, last=13, record=record)
    assert tuple(again[0][0][0][0]) not in rows


def test_a_source_is_known_by_its_tokens_and_not_by_its_files(folders, tmp_path):
    """Documents cut to one length have one index, whatever is in them; shards and one pair have two, of one content."""
    for name in ("here", "there"):
        with IndexedDatasetWriter(tmp_path / name / "train", VOCAB) as writer:
            for number in range(99):
                writer.add_document(np.full(20, number + 99 * (name == "there")))
    steps = {"max_steps": 20, "global_batch_size": 4}
    first, record, _, _ = run(config(tmp_path / "here", **steps), last=5)
    _, _, notes, given = run(config(tmp_path / "there", **steps), first=5, last=6, record=record)
    assert notes[0] == f"{tmp_path / 'there'} is new: it begins with its first block"
    assert [one.blocks for one in given] == [20, 4]

    with IndexedDatasetWriter(tmp_path / "cut" / "train-00001-of-00002", VOCAB) as writer:
        for number in range(99):
            writer.add_document(np.full(20, number))
    IndexedDatasetWriter(tmp_path / "cut" / "train-00000-of-00002", VOCAB).close()
    whole, *_ = run(config(tmp_path / "here", **steps))
    after, _, notes, _ = run(config(tmp_path / "cut", **steps), first=5, record=record)
    assert notes == ()
    assert first + after == whole


def test_a_step_means_the_position_that_the_run_comes_to_it_at(folders):
    """Resumed with other batches, a change still holds from its step on; before anything was read all is new."""
    plain = {"batch_size_schedule": None, "seq_length_schedule": []}
    _, record, _, _ = run(blend_of(folders, changes=(), global_batch_size=4, **plain), last=4)
    changed = blend_of(folders, changes=[(6, [0, 0, 1])], global_batch_size=2, **plain)
    with loader_module.build(changed, "train", dp_rank=0, dp_size=1) as loader:
        loader.begin(steps=20, step=4, position=4 * 4 * S, record=record)
        assert [one.start for one in loader.plan.index.segments] == [0, 20]  # 4 steps of 4 rows, then 2 of 2
        fresh = loader.plan.record(0)
        assert loader.begin(steps=20, record=fresh | {"seed": 5}) == ()
        assert [one.start for one in loader.plan.index.segments] == [0, 12]


def test_sources_that_do_not_last_are_an_error_before_the_first_step(folders):
    cfg = blend_of(folders[1:2], limits=(1.0,), changes=())
    with loader_module.build(cfg, "train", dp_rank=0, dp_size=1) as loader:
        with pytest.raises(UserError, match=r"^data\.blend: its sources are used up \(max_epochs\) after 384 tokens, "
                           r"but 20 steps \(train\.max_steps\) read 1,044\. .*set train\.max_steps to 9$"):
            loader.begin(steps=20)
        loader.begin(steps=9)
        for step in range(9):  # what reader threads look for behind the end is nobody's error
            step_of(cfg, loader, step)
        with pytest.raises(UserError, match="used up after 24 blocks"):
            step_of(cfg, loader, 9)


def test_weights_by_size_give_every_token_as_often(folders):
    cfg = config(blend=[(folder, None) for folder in folders], max_steps=20, global_batch_size=12)
    *_, given = run(cfg)
    assert max(one.epochs for one in given) - min(one.epochs for one in given) < 0.05


def test_tokens_of_different_tokenizers_are_not_blended(folders, tmp_path):
    for number, folder in enumerate(folders[:2]):
        (folder / "manifest.json").write_text(json.dumps({"tokenizer_sha256": f"hash {number}"}))
    try:
        with pytest.raises(UserError, match=rf"^{folders[1]}: was tokenized by another tokenizer than {folders[0]}"):
            run(blend_of(folders))
        run(blend_of(folders[1:], changes=()))  # one without a manifest says nothing
    finally:
        for folder in folders[:2]:
            (folder / "manifest.json").unlink()
