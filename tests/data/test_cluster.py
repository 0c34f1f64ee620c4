"""`prepare` by other executors: the same bytes from datatrove, Slurm and Ray, and after the loss of a worker."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from engine import disk
from engine.config.cluster import ClusterConfig
from engine.config.prepare import PrepareConfig
from engine.data import staging
from engine.data.cluster import executors, on_ray, slurm
from engine.data.prepare import begin, prepare
from engine.data.preparing.job import Job
from engine.errors import UserError

pytest.importorskip("datatrove")
ray = pytest.importorskip("ray")

COLLECTOR = """
import os, signal
from pathlib import Path
from engine.data.collectors import Collector

class Four(Collector):
    def parts(self):
        return [str(part) for part in range(4)]

    def documents_of(self, part):
        flag = Path(__file__).with_name("flag")
        for number in range(20):
            if (part, number) == ("2", 10) and flag.exists():
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"Document {number} of part {part}, " + " ".join(f"word{(number + 1) * word}" for word in range(50))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(COLLECTOR)
    return tmp_path


def config(folder: Path, output: str, executor: str = "local", **changes) -> PrepareConfig:
    given = {"vocab_size": 300, "validation_fraction": 0.2, "workers": 1, "cluster": {"tasks": 2, "memory_gb": 0.1}}
    return PrepareConfig(input=[Path(f"python:{folder}/mine.py:Four")], output=folder / output, executor=executor,
                         **given | changes)  # fmt: skip


def same(folder: Path, one: str, other: str) -> bool:
    found = [{path.relative_to(folder / name): disk.sha256(path) for path in (folder / name).rglob("*")
              if path.is_file()} for name in (one, other)]  # fmt: skip
    return len(found[0]) > 5 and found[0] == found[1]


@pytest.mark.parametrize("executor", ["datatrove", "ray"])
def test_other_executors_write_the_same_bytes(folder, monkeypatch, executor):
    """Ray with two workers, one of which is lost in the middle of a unit."""
    prepare(config(folder, "plain"))
    given = config(folder, "out", executor)
    if executor == "ray":
        (folder / "flag").touch()
        paths = {"PYTHONPATH": os.environ.get("PYTHONPATH", "") + os.pathsep + str(Path(slurm.__file__).parents[3])}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
                 runtime_env={"env_vars": paths})  # fmt: skip
    try:
        prepare(given, execute=executors.executor(given))
    finally:
        ray.shutdown()
    assert not (folder / "flag").exists()
    assert same(folder, "plain", "out")
    assert not staging.folder_of(folder / "out").exists()


def fake_sbatch(folder: Path, monkeypatch, answer: str) -> None:
    program = folder / "bin/sbatch"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/bash\necho "$*" >> {folder}/submitted\n{answer}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_slurm_jobs_wait_for_each_other_and_write_the_same_bytes(folder, monkeypatch, capsys):
    fake_sbatch(folder, monkeypatch, f"wc -l < {folder}/submitted")
    assert executors.on_slurm(config(folder, "out", "slurm"), print) == 0
    submitted = (folder / "submitted").read_text().splitlines()
    assert f"{len(submitted)} jobs submitted, the last is {len(submitted)}" in capsys.readouterr().out
    scripts = [Path(line.split()[-1]) for line in submitted]
    assert [path.stem for path in scripts][:2] + [path.stem for path in scripts][-2:] == [
        "read", "exact", "manifest", "publish"]  # fmt: skip
    for number, line in enumerate(submitted):
        assert (f"--dependency=afterok:{number} --kill-on-invalid-dep=yes" in line) == (number > 0)
    for path in scripts[:-1]:
        text = path.read_text()
        array = int(text.split("--array=0-")[1].split()[0]) + 1
        *_, job, step, rank, world = shlex.split(text.splitlines()[-1])
        assert (step, rank, int(world)) == (path.stem, "$SLURM_ARRAY_TASK_ID", array)
        for task in range(array):
            if step == "read":  # the others in this process: a script takes half a second
                subprocess.run(["bash", path], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}, check=True)
            else:
                slurm.main(job, step, str(task), str(array))
    done = subprocess.run(["bash", scripts[-1]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prepare(config(folder, "plain"))
    assert same(folder, "plain", "out")


def test_scripts_that_are_shown_can_be_submitted_by_hand(folder, capsys):
    given = config(folder, "out", "slurm", cluster={"print": True, "partition": "long", "setup": "module load python"})
    assert executors.on_slurm(given, print) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("#!/bin/bash") == shown.count("#SBATCH --partition=long\n") == shown.count("\nmodule load python")
    )
    place = staging.folder_of(folder / "out")
    assert f"prepare --config {place}/config.yaml" in shown
    assert (place / "config.yaml").is_file()
    assert f"--output={place}/slurm/read-%A_%a.log" in shown
    assert (place / "slurm").is_dir()


@pytest.mark.parametrize(
    ("answer", "said"),
    [("echo no such partition >&2; exit 1", r"sbatch refused .*read\.sbatch \(no such partition\)"),
     ("echo thanks", r"sbatch refused .*read\.sbatch \(thanks\)"),
     (None, "there is no sbatch on this machine")],
)  # fmt: skip
def test_slurm_that_does_not_take_them(folder, monkeypatch, answer, said):
    job = begin(config(folder, "out", "slurm"))
    assert isinstance(job, Job)
    if answer:
        fake_sbatch(folder, monkeypatch, answer)
    else:
        monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match=said):
        slurm.submit(job)
    assert json.loads((job.folder / "plan.json").read_text())["units"] == 4


def test_a_missing_package_is_named(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        for executor in ("ray", "datatrove"):
            with pytest.raises(
                UserError, match=rf'{executor} needs the package {executor}\. pip install "mainspring\['
            ):
                executors.executor(config(folder, "out", executor))
    assert executors.executor(config(folder, "out")) is None


def test_tasks_that_no_machine_can_hold_are_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = [{"Resources": {"CPU": 2.0, "memory": 3e9}}, {"Resources": {"CPU": 1.0, "memory": 9e9}}]
    for fits in ({"cpus": 2, "memory_gb": 3}, {"cpus": 1, "memory_gb": 9}, {"memory_gb": 99, "address": "ray://there"}):
        on_ray._check_size(nodes, ClusterConfig(**fits))
    for too_much in ({"cpus": 2, "memory_gb": 4}, {"cpus": 3, "memory_gb": 1}):
        with pytest.raises(UserError, match=r"no machine has .* Lower --cluster\.cpus"):
            on_ray._check_size(nodes, ClusterConfig(**too_much))
