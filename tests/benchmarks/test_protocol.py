"""Workers over pipes: order, timing, death, idleness."""

from __future__ import annotations

import pytest

from benchmarks.workers.protocol import Worker, WorkerError, interleave

MODULE = "tests.benchmarks.fake_worker"


@pytest.fixture
def start():
    workers = []

    def start(name="fake", **config) -> Worker:
        workers.append(Worker(name, MODULE, config, threads=1))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_steps_are_counted_across_runs_and_stdout_noise_does_no_harm(start):
    worker = start(seed=7, seconds=0.02)
    assert worker.facts == {"ready": True, "seed": 7}
    assert worker.startup_seconds > 0
    assert worker.run(2)["losses"] == [10.0, 9.0]
    answer = worker.run(3)
    assert answer["losses"] == [8.0, 7.0, 6.0]
    assert 0.06 <= answer["seconds"] < 2
    assert answer["cpu_seconds"] < 0.05  # it slept


def test_the_memory_peak_can_be_forgotten(start):
    worker = start(allocate_at=1)
    before = worker.run(1)["memory_gb"]
    assert worker.run(1)["memory_gb"] > before + 0.25
    worker.reset_memory()
    assert worker.run(1)["memory_gb"] < before + 0.1


def test_a_worker_that_cannot_build_says_why():
    with pytest.raises(WorkerError, match=r"(?s)broken ended with exit code 1:.*ValueError: no such thing"):
        Worker("broken", MODULE, {"fail": True}, threads=1)


def test_a_worker_that_dies_in_a_step_says_why(start):
    worker = start("mortal", die_at=3)
    worker.run(3)
    with pytest.raises(WorkerError, match=r"(?s)mortal ended with exit code 1:.*died in step 3"):
        worker.run(1)


def test_rounds_go_round_and_only_a_spinning_worker_is_not_idle(start):
    workers = [start("quiet", seconds=0.1), start("spinning", seconds=0.1, spin=True)]
    answers, idle = interleave(workers, rounds=3, steps=2)
    assert [answer["losses"] for answer in answers["quiet"]] == [[10.0, 9.0], [8.0, 7.0], [6.0, 5.0]]
    assert [len(answers[name]) for name in answers] == [3, 3]
    assert idle["quiet"] < 0.05
    assert idle["spinning"] > 0.1  # a whole core, on a machine that has one to spare
