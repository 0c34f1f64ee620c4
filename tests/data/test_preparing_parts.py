"""The parts that the steps of `prepare` stand on: job folders, the spool, the rule of the splits, progress."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.prepare import PrepareConfig
from engine.data import spool as spools
from engine.data.dedup import content_digest
from engine.data.prepare import begin
from engine.data.preparing import local, splits, tokens
from engine.data.preparing.context import Context
from engine.data.preparing.job import Job
from engine.data.preparing.steps import Step, step_named
from engine.data.spool import Spool, SpoolWriter, split_key, split_texts
from engine.errors import UserError


@pytest.fixture
def job(tmp_path) -> Job:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / f"in/{number}.txt").write_text(f"text number {number}, " * 20)
    made = begin(PrepareConfig(input=[tmp_path / "in"], output=tmp_path / "out", unit_mb=0.0005))
    assert isinstance(made, Job)
    return made


def test_a_job_is_what_was_planned(job):
    assert job.units == 6
    assert [job.unit(number).unit.slices[0].file.name for number in (5, 0, 3)] == ["5.txt", "0.txt", "3.txt"]
    assert job.size == sum(job.unit(number).size for number in range(6)) == 6 * 300
    again = Job(job.folder)
    assert (again.config, again.settings, again.units) == (job.config, job.settings, job.units)


def test_no_job_and_a_damaged_one(tmp_path, job):
    with pytest.raises(UserError, match=r"plan\.json: no job of `mainspring prepare`"):
        Job(tmp_path)
    (job.folder / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: cannot be read \(Expecting"):
        Job(job.folder)


def test_a_result_is_there_whole_or_not_at_all(job):
    with pytest.raises(NotADirectoryError), job.result("read", 3) as folder:
        (folder / "half").write_text("x") and os.listdir(folder / "half")
    assert not job.done("read", 3)
    assert list((job.folder / "read").iterdir()) == []
    with job.result("read", 3) as folder:
        (folder / "one").write_text("first")
        os.rename(folder, hidden := folder.with_name("hidden"))  # another machine, with a folder of its own
        with job.result("read", 3) as other:
            (other / "one").write_text("second")
        os.rename(hidden, folder)
    assert job.done("read", 3)
    assert (job.place("read", 3) / "one").read_text() == "second"
    assert [path.name for path in (job.folder / "read").iterdir()] == ["00003"]


def test_a_task_that_another_process_finished_meanwhile_is_no_error(job):
    def work(job: Job, task: int, folder: Path, context: Context) -> None:
        if task:
            job.place("slow", task).mkdir(parents=True)
        (job.folder / "spent").read_text()

    step = Step("slow", lambda job: 2, work)
    step.run(job, 1)
    with pytest.raises(FileNotFoundError):
        step.run(job, 0)
    assert step.open_tasks(job) == [0]


def test_halves_of_dead_processes_are_removed(job):
    dead, alive, elsewhere = (
        job.folder / "read" / f"00001.tmp-{host}-{pid}"
        for host, pid in ((socket.gethostname(), 2**22 + 1), (socket.gethostname(), os.getpid()), ("x", 2**22 + 1))
    )
    for folder in (dead, alive, elsewhere):
        folder.mkdir(parents=True)
    begin(job.config)
    assert [folder.exists() for folder in (dead, alive, elsewhere)] == [False, True, True]


def test_tasks_find_relative_inputs_wherever_they_run(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("some text that is long enough")
    monkeypatch.chdir(tmp_path)
    made = begin(PrepareConfig(input=["in"], output="out"))
    assert isinstance(made, Job)
    monkeypatch.chdir("/")
    step_named("read").run(Job(made.folder), 0)
    assert Path.cwd() == Path("/")
    assert json.loads((made.place("read", 0) / "report.json").read_text())["read"] == 1


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=30), data=st.data())
def test_spool_gives_back_what_was_picked(tmp_path_factory, texts, data):
    folder = tmp_path_factory.mktemp("spool")
    raws = [text.encode() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spools, "_BATCH_BYTES", data.draw(st.integers(1, 200)))
        patch.setattr(spools, "_BATCH_DOCUMENTS", data.draw(st.integers(1, 8)))
        patch.setattr(spools, "_FLUSH_RECORDS", data.draw(st.integers(1, 8)))
        with SpoolWriter(folder) as writer:
            for number, raw in enumerate(raws):
                digest = content_digest(raw)
                writer.append(raw, digest, split_key(digest, 7), number // 3, None if number % 2 else number)
        assert (writer.count, writer.size) == (len(raws), sum(map(len, raws)))
        spool = Spool(folder)
        assert len(spool) == len(raws)
        picked = np.array(data.draw(st.lists(st.booleans(), min_size=len(raws), max_size=len(raws))), bool)
        found, numbers = [], []
        for some, text, lengths in spool.batches(picked):
            assert 0 < len(some) <= spools._BATCH_DOCUMENTS
            assert len(text) - lengths[-1] < spools._BATCH_BYTES
            numbers += some.tolist()
            found += split_texts(text, lengths)
        assert numbers == np.flatnonzero(picked).tolist()
        assert found == [raw for raw, chosen in zip(raws, picked, strict=True) if chosen]
    for number, (raw, record) in enumerate(zip(raws, spool.records, strict=True)):
        digest = content_digest(raw)
        assert (record["length"], record["digest"].tobytes(), record["key"]) == (len(raw), digest, split_key(digest, 7))
        assert (record["slice"], record["row"]) == (number // 3, spools.NO_ROW if number % 2 else number)


def test_a_damaged_spool_is_named(tmp_path):
    with SpoolWriter(tmp_path) as writer:
        writer.append(b"text", content_digest(b"text"), 1, 0, None)
    os.truncate(tmp_path / "text", 3)
    with pytest.raises(UserError, match=r"/text: damaged: shorter than its records say"):
        list(Spool(tmp_path).batches(np.ones(1, bool)))
    os.truncate(tmp_path / "documents", 3)
    with pytest.raises(UserError, match=r"/documents: damaged: cut within a record"):
        Spool(tmp_path)


def naive_splits(keys: list[int], validation: float, test: float) -> list[int]:
    """The rule in words, over all keys at once."""
    low, high = int(validation * 2**64), int(validation * 2**64) + int(test * 2**64)
    found = [splits.VALIDATION if key < low else splits.TEST if key < high else splits.TRAIN for key in keys]
    order = sorted(range(len(keys)), key=lambda at: (keys[at], at))

    def give(split, least, wanted, givers, order):
        if not wanted or len(keys) < least or split in found:
            return
        for giver in givers:
            if found.count(giver) > (1 if giver < split else 0):
                found[next(at for at in order if found[at] == giver)] = split
                return

    give(splits.TRAIN, 1, True, (splits.TEST, splits.VALIDATION), order[::-1])
    give(splits.VALIDATION, 2, validation > 0, (splits.TRAIN, splits.TEST), order)
    give(splits.TEST, 3, test > 0, (splits.TRAIN, splits.VALIDATION), order)
    return found


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=9), st.sampled_from([0, 1e-9, 0.1, 0.5]),
    st.sampled_from([0, 1e-9, 0.2, 0.49]), st.integers(1, 4),
)  # fmt: skip
def test_no_split_is_empty_where_there_are_documents(keys, validation, test, units):
    options = PrepareConfig(input=["x"], output="y", validation_fraction=validation, test_fraction=test)
    thresholds = splits.Thresholds.of(options)
    parts = [np.array([at for at in range(len(keys)) if at * units // len(keys) == unit]) for unit in range(units)]
    extremes = splits.Extremes.merged(
        splits.Extremes.from_json(json.loads(json.dumps(splits.Extremes.of(
            unit, np.array([keys[at] for at in part], np.uint64), part, thresholds).as_json())))
        for unit, part in enumerate(parts)
    )  # fmt: skip
    found = thresholds.splits(np.array(keys, np.uint64)).tolist()
    for (_, document), split in splits.forced(extremes, options).items():
        found[document] = split
    assert found == naive_splits(keys, validation, test)
    if keys:
        assert splits.TRAIN in found
        assert (splits.VALIDATION in found) == (validation > 0 and len(keys) > 1) or validation == 0
        assert (splits.TEST in found) or test == 0 or len(keys) < 3


def test_progress_says_speed_and_time_left(job):
    said: list[str] = []
    meter = local.Meter(step_named("read"), job, job.units, said.append)
    meter.add(job.size // 4, 3)
    assert meter.line(2.0) == "read: 0 of 0 MB, 0 MB/s, 0:06 left"
    assert len(said) == 1
    assert local.Meter(step_named("read"), job, 2, said.append)._total == job.size // 3
    meter._total = 40_000_000_000
    meter._bytes = 10_000_000_000
    assert meter.line(1000) == "read: 10,000 of 40,000 MB, 10 MB/s, 50:00 left"
    meter._bytes = 1_000_000_000
    assert meter.line(1000).endswith("1 MB/s, 10:50:00 left")
    told: list[int] = []
    context = Context(report=told.append)
    for done in range(0, 1_000_001, 100_000):
        context.progress(done)
    context.finished(1_050_000)
    context.progress(300_000)
    assert told == [300_000, 300_000, 300_000, 150_000, 300_000]


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8))
def test_documents_that_spell_out_their_end_are_counted(documents):
    ids = np.array([token for document in documents for token in [*document, 0]], np.int32)
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    assert tokens._documents_with(ids, lengths, 0) == sum(0 in document for document in documents)
