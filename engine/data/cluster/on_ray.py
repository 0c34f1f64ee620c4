"""The steps of `prepare` on a Ray cluster: a Ray task for each task of a step, done again where its worker is lost.

Not datatrove's own Ray executor: that one runs a rank in a pool of processes inside of an actor, and such a pool waits
for ever for a process that was killed. Here the lost worker is Ray's own, and Ray starts the task anew.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from engine.config.cluster import ClusterConfig
from engine.data.preparing.job import Job
from engine.data.preparing.steps import STEPS, step_named
from engine.errors import Interrupted, UserError


def work(folder: str, step: str, task: int) -> tuple[str, Any] | None:
    """A task, in a worker of the cluster. Returns what the user can mend instead of raising it: Ray would wrap it."""
    try:
        step_named(step).run(Job(Path(folder)), task)
    except UserError as error:
        return "user_error", (str(error), isinstance(error, Interrupted))
    except OSError as error:
        return "os_error", (error.errno, error.strerror or str(error), os.fspath(error.filename or ""))
    return None


def run(job: Job) -> None:
    """All steps that are not done. Joins the cluster at ``cluster.address`` unless this process has joined one."""
    import ray

    config = job.config.cluster
    started = not ray.is_initialized()
    if started:
        address = config.address or os.environ.get("RAY_ADDRESS")
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
        try:
            ray.init(address=address, runtime_env=environment, include_dashboard=False, log_to_driver=False,
                     logging_level=logging.ERROR)  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster there ({' '.join(str(error).split())[:200]})", where="cluster.address",
                            fix="Start one with `ray start --head`.") from error  # fmt: skip
    try:
        _check_size(ray.nodes(), config)
        remote = ray.remote(num_cpus=config.cpus, memory=int(config.memory_gb * 1e9), max_retries=config.retries)(work)
        for step in STEPS:
            _finish(ray, step.name, [remote.remote(str(job.folder), step.name, task) for task in step.open_tasks(job)])
    finally:
        if started:
            ray.shutdown()


def _check_size(nodes: list[dict[str, Any]], config: ClusterConfig) -> None:
    """Ray waits in silence for a machine that could hold a task. A cluster that is named may still grow one."""
    if config.address or os.environ.get("RAY_ADDRESS"):
        return
    wanted = {"CPU": config.cpus, "memory": config.memory_gb * 1e9}
    if not any(all(node["Resources"].get(name, 0) >= least for name, least in wanted.items()) for node in nodes):
        raise UserError(f"no machine has {config.cpus} free cores and {config.memory_gb:g} GB for a task",
                        where="executor ray", fix="Lower --cluster.cpus or --cluster.memory_gb.")  # fmt: skip


def _finish(ray: Any, step: str, waiting: list[Any]) -> None:
    while waiting:
        finished, waiting = ray.wait(waiting)
        try:
            (bad,) = ray.get(finished)
        except (
            ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError
        ) as error:  # fmt: skip
            problem = " ".join(str(error).split())[:200]
            raise Interrupted(f"a worker was lost in step {step}, again and again ({problem})", where="cluster.retries",
                              fix="Start it again: it goes on where it stopped.") from error  # fmt: skip
        if bad is not None:
            kind, content = bad
            if kind == "os_error":
                raise OSError(*content)
            raise (Interrupted if content[1] else UserError)(content[0])
