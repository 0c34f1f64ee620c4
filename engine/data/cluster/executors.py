"""`--executor`: which way the steps of a job are done."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from engine.config.prepare import PrepareConfig
from engine.data import prepare as preparing
from engine.data.preparing.job import Job
from engine.errors import UserError


def executor(config: PrepareConfig) -> Callable[[Job], None] | None:
    """For `prepare`'s ``execute``; None for this machine's own pool. UserError where a package is missing."""
    if config.executor == "ray":
        _need("ray", config.executor)
        from engine.data.cluster import on_ray

        return on_ray.run
    if config.executor == "datatrove":
        _need("datatrove", config.executor)
        from engine.data.cluster import blocks

        return blocks.run
    return None


def _need(package: str, executor: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{executor} needs the package {package}", where="executor",
                        fix='pip install "mainspring[cluster]"')  # fmt: skip


def on_slurm(config: PrepareConfig, log: Callable[[str], None]) -> int:
    """Plans the job, and submits it or (``cluster.print``) shows the scripts. Returns the exit code."""
    from engine.data.cluster import slurm

    job = preparing.begin(config, log=log)
    if isinstance(job, dict):
        return 0
    if config.cluster.print:
        for name, text in slurm.scripts(job):
            print(f"# {name}.sbatch\n{text}")
        return 0
    ids = slurm.submit(job)
    print(f"{len(ids)} jobs submitted, the last is {ids[-1]}; scripts and logs are in {job.folder / 'slurm'}")
    return 0
