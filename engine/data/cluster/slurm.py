"""The steps of `prepare` on Slurm: a job array for each step, behind the one before, and a last job that publishes.

The scripts lie in the job's folder. An array's job r of w does the tasks r, r + w, … of its step; what is done is
passed over, so the same command submitted again goes on after a failure.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from engine.config.prepare import PrepareConfig
from engine.data.preparing.job import Job
from engine.data.preparing.steps import STEPS, step_named
from engine.errors import UserError

# These have one task, whatever the input.
_SINGLE = ("choose", "tokenizer", "group", "manifest")


def scripts(job: Job) -> list[tuple[str, str]]:
    """(name, text) of each script, in order: to be submitted one behind the other. What they need lies there then."""
    found = []
    for step in STEPS:
        array = 1 if step.name in _SINGLE else min(job.config.cluster.tasks, max(job.units, 1))
        words = [sys.executable, "-P", "-m", "engine.data.cluster.slurm", str(job.folder), step.name]
        found.append((step.name, _script(job, step.name, array, words)))
    publish = [sys.executable, "-P", "-m", "engine.cli", "prepare", "--config", str(_alone(job))]
    return [*found, ("publish", _script(job, "publish", 1, publish))]


def _alone(job: Job) -> Path:
    """The configuration of the last job, which finds all done; and beside it the folder of the logs, without which
    Slurm starts nothing."""
    from engine.config import dump_yaml

    (job.folder / "slurm").mkdir(exist_ok=True)
    path = job.folder / "config.yaml"
    path.write_text(dump_yaml(PrepareConfig.model_validate(job.config.model_dump() | {"executor": "local"})), "utf-8")
    return path


def _script(job: Job, name: str, array: int, words: list[str]) -> str:
    config = job.config.cluster
    lines = [
        "#!/bin/bash", f"#SBATCH --job-name=prepare-{name}", f"#SBATCH --array=0-{array - 1}", "#SBATCH --ntasks=1",
        f"#SBATCH --cpus-per-task={config.cpus}", f"#SBATCH --mem={round(config.memory_gb * 1024)}M",
        f"#SBATCH --time={config.time}", f"#SBATCH --output={job.folder}/slurm/{name}-%A_%a.log",
        *([f"#SBATCH --partition={config.partition}"] if config.partition else []),
        "set -e", *([config.setup] if config.setup else []), f"cd {shlex.quote(str(job.folder_of_command))}",
        f"export PYTHONPATH={shlex.quote(':'.join(path for path in sys.path if path))}",
        f"{shlex.join(words)}{'' if name == 'publish' else f' $SLURM_ARRAY_TASK_ID {array}'}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def submit(job: Job) -> list[str]:
    """Writes the scripts and submits them, each behind the one before; their ids. UserError where sbatch fails."""
    folder = job.folder / "slurm"
    ids: list[str] = []
    for name, text in scripts(job):
        path = folder / f"{name}.sbatch"
        path.write_text(text, encoding="utf-8")
        # One that waits for what has failed would wait for ever.
        after = [f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        ids.append(_sbatch(["sbatch", "--parsable", *after, str(path)]))
    return ids


def _sbatch(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        fix = "Start it on a login node, or look at the scripts with --cluster.print."
        raise UserError("there is no sbatch on this machine", where="executor slurm", fix=fix) from None
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not re.fullmatch(r"\d+", number):
        problem = " ".join((done.stderr or done.stdout).split())[:300]
        raise UserError(f"sbatch refused {words[-1]} ({problem})", where="executor slurm",
                        fix="Mend the cluster options and start it again.")  # fmt: skip
    return number


def main(folder: str, name: str, rank: str, world: str) -> None:
    """What a job of an array does."""
    job, step = Job(Path(folder)), step_named(name)
    for task in range(int(rank), step.tasks(job), int(world)):
        step.run(job, task)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as problem:
        sys.exit(f"error: {problem}")
