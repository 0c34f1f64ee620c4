"""Where `mainspring prepare` runs its tasks when one machine is not enough."""

from __future__ import annotations

from engine.config.base import Section, option


class ClusterConfig(Section):
    """Of no consequence for what is written. All machines must see input and output under the same paths."""

    tasks: int = option(64, "jobs of a step at once (slurm), processes of a step (datatrove)", "tasks", ge=1, le=10**5)
    cpus: int = option(1, "cores reserved for a task", "cores", ge=1)
    memory_gb: float = option(4, "memory reserved for a task", "GB", gt=0)
    retries: int = option(3, "times that a task is done again whose worker was lost (ray)", ge=0)
    address: str | None = option(None, "a Ray cluster's address (unset: RAY_ADDRESS, else a cluster of this machine)")
    partition: str | None = option(None, "Slurm partition")
    time: str = option("24:00:00", "limit of a job's time (slurm)", "HH:MM:SS", pattern=r"(\d+-)?\d+:\d\d:\d\d")
    setup: str = option("", "line of shell that a Slurm job starts with, such as: source /path/venv/bin/activate")
    print: bool = option(False, "show the Slurm scripts and submit none")
