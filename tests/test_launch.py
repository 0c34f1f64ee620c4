"""Who a process is among the ranks, by torchrun's variables or Slurm's, and what is set for GPUs."""

from __future__ import annotations

import os

import pytest

from engine import UserError, launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS",
         "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
STEP = {"SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[003-004,009],cpu1", "SLURM_NTASKS": "8"}


@pytest.fixture
def environment(monkeypatch):
    """``environment(**variables)``: a launcher's variables and no others."""
    for name in [name for name in os.environ if name in NAMES or name.startswith("SLURM")]:
        monkeypatch.delenv(name)

    def give(**variables: str) -> None:
        for name in NAMES:  # so that what the engine sets is taken back
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


def ranks() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_step_of_several_tasks(environment):
    environment(**STEP)
    launch.adopt()
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu003", "MASTER_PORT": "24243"}
    assert ranks() == expected
    launch.adopt()
    assert ranks() == expected
    assert (launch.rank(), launch.world_size()) == (5, 8)


@pytest.mark.parametrize("change", [
    {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive allocation of many tasks, in which one Python was started
    {"SLURM_STEP_ID": None},  # the batch script itself, outside srun
    {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun inside
])
def test_a_single_python_in_an_allocation_stays_alone(environment, change):
    environment(**{name: value for name, value in (STEP | change).items() if value is not None})
    launch.adopt()
    assert launch.world_size() == 1
    assert "MASTER_ADDR" not in ranks()


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu[003-010,12],cpu1", "gpu003"), ("a,b", "a"), ("node7", "node7"), ("rack[1-2]n.site", "rack1n.site"), ("", ""),
])
def test_first_host(nodes, first):
    assert launch.first_host(nodes) == first


GIVEN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("change", "message"), [
    ({"MASTER_ADDR": None}, r"^MASTER_ADDR: is not set, but RANK is 1\. Start the ranks with torchrun, or set RANK,"),
    ({"RANK": None}, r"^RANK: is not set, but WORLD_SIZE is 2"),
    ({"WORLD_SIZE": None}, r"^WORLD_SIZE: is not set, but RANK is 1"),
    ({"RANK": "2"}, r"^RANK: is 2, but WORLD_SIZE is 2"),
    ({"RANK": "x"}, r"^RANK: is 'x', expected a whole number"),
    ({"MASTER_PORT": "-1"}, r"^MASTER_PORT: is '-1', expected a whole number"),
])
def test_variables_that_contradict_each_other(environment, change, message):
    environment(**{name: value for name, value in (GIVEN | change).items() if value is not None})
    with pytest.raises(UserError, match=message):
        launch.adopt()


@pytest.mark.parametrize(("major", "tensor", "context", "expected"), [
    (9, 2, 1, "1"), (8, 1, 2, "1"), (9, 1, 1, None), (10, 2, 1, "32"), (12, 1, 1, None), (None, 2, 1, "1")])
def test_connections_of_a_gpu(environment, monkeypatch, major, tensor, context, expected):
    environment()
    monkeypatch.setattr(launch, "compute_capability", lambda: major)
    launch.set_gpu_environment(tensor=tensor, context=context, device="cuda")
    wanted = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert ranks() == (wanted | {"CUDA_DEVICE_MAX_CONNECTIONS": expected} if expected else wanted)


def test_what_the_user_set_stays(environment):
    mine = {"CUDA_DEVICE_MAX_CONNECTIONS": "4", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    environment(**mine)
    launch.set_gpu_environment(tensor=2, context=1, device="auto")
    assert ranks() == mine
    environment()
    launch.set_gpu_environment(tensor=2, context=1, device="cpu")
    assert ranks() == {}
