"""Launching: the scripts of examples/, two torchrun agents as two nodes, Slurm's variables. Real processes, few."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

import engine.pretrain
from engine.config import dump_yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Runs its command once for each of SLURM_NTASKS tasks, as srun would on as many nodes. Options with a value have "=".
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NODELIST=localhost
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NODEID=$i "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def environment(**more: object) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
                        "PYTHONPATH": os.pathsep.join(sys.path)} | {name: str(v) for name, v in more.items()}


def start(*argv: object, **variables: object) -> subprocess.Popen[str]:
    return subprocess.Popen([*map(str, argv)], env=environment(**variables), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def finish(*processes: subprocess.Popen[str], timeout: float = 240) -> list[tuple[int, str]]:
    """-> (exit code, output) of each; none of their children outlives the call."""
    try:
        deadline = time.monotonic() + timeout
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("one") / "run"
    engine.pretrain.run(tiny.config(corpus, run, train__max_steps=3))
    return losses(run)


@pytest.fixture
def flags(corpus: Path, tmp_path: Path) -> list[str]:
    cfg = tiny.config(corpus, tmp_path / "run", train__max_steps=3)
    (tmp_path / "config.yaml").write_text(dump_yaml(cfg), encoding="utf-8")
    return ["--config", str(tmp_path / "config.yaml")]


def check(run: Path, expected: list[float], *ended: tuple[int, str]) -> None:
    assert [code for code, _ in ended] == [0] * len(ended), "\n".join(output for _, output in ended)
    assert losses(run) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_and_described(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    assert script.name in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_one_node(flags, expected, tmp_path):
    ended = finish(start(EXAMPLES / "one_node.sh", *flags, "--parallel.distributed_optimizer", RANKS=2))
    check(tmp_path / "run", expected, *ended)


def test_two_nodes_of_two_ranks(flags, expected, tmp_path):
    """Tensor ranks within a node, data-parallel ones across."""
    variables = {"NODES": 2, "HEAD": f"127.0.0.1:{tiny.free_port()}", "RANKS": 2, "LOCAL_ADDR": "127.0.0.1"}
    agents = [start(EXAMPLES / "several_nodes.sh", *flags, "--parallel.tensor", 2, **variables) for _ in range(2)]
    check(tmp_path / "run", expected, *finish(*agents))


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, object]:
    """A srun and a scontrol of our own on PATH, and the variables of a job of two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho localhost\necho elsewhere\n")):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": 1000 + os.getpid(), "SLURM_NTASKS": 2,
            "SLURM_JOB_NODELIST": "localhost,elsewhere", "SLURM_JOB_NUM_NODES": 2, "SLURM_SUBMIT_DIR": EXAMPLES.parent}


def test_slurm_with_torchrun(flags, expected, slurm, tmp_path):
    """Two nodes of one rank: tensor ranks across nodes."""
    script = EXAMPLES / "slurm_torchrun.sbatch"
    check(tmp_path / "run", expected, *finish(start(script, *flags, "--parallel.tensor", 2, RANKS=1, **slurm)))


def test_slurm_without_torchrun(flags, expected, slurm, tmp_path):
    ended = finish(start(EXAMPLES / "slurm_srun.sbatch", *flags, "--parallel.pipeline", 2, **slurm))
    check(tmp_path / "run", expected, *ended)


FAILING = """
import os, sys
import engine.pretrain
from engine.runtime import command
from engine.train import step

def run(cfg, *rest, step_run=step.run):
    if os.environ["RANK"] == "1" and rest[-2].step == 1:
        {does}
    return step_run(cfg, *rest)

step.run = run
sys.exit(command(engine.pretrain.main, sys.argv[1:]))
"""


@pytest.mark.parametrize(("does", "expected"), [
    ("raise ZeroDivisionError('a bug of ours')", "error: rank 1: ZeroDivisionError: a bug of ours"),
    ("os.kill(os.getpid(), 9)", r"error: rank 1 \(host .*, process \d+\) ended without a word: it was killed"),
], ids=["bug", "killed"])
def test_a_node_that_fails_ends_the_other(does, expected, flags, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING.format(does=does), encoding="utf-8")
    variables = {"NODES": 2, "HEAD": f"127.0.0.1:{tiny.free_port()}", "RANKS": 1, "LOCAL_ADDR": "127.0.0.1",
                 "STAGE": tmp_path / "failing.py"}
    argv = [EXAMPLES / "several_nodes.sh", *flags, "--train.max_steps", 10**6]
    ended = finish(*[start(*argv, **variables) for _ in range(2)], timeout=120)
    assert [code for code, _ in ended] == [1, 1]
    ours = [line for _, output in ended for line in output.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert len(ours) == 2 - ("killed" in expected), ours  # the error on its node, a word of it on the other
    assert sum(bool(re.match(expected, line)) for line in ours) == 1, ours
