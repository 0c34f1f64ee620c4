"""A rank that fails, dies or is stuck ends all ranks, its own error first and alone; ranks that are done end nothing.

No torchrun here: nobody but the engine ends the ranks. tests/cli has those under torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

KILLED = "ended without a word: it was killed (out of memory?) or crashed in native code"
LINE = "error: rank 1: /local/cache: its disk is gone. Leave this machine out"
# case: (exit codes, what its output is: whole, or for a traceback the first and the last line)
CASES = {
    "user error": ([2, 2, 2], [LINE]),
    "user error of all": ([2, 2, 2], [LINE.replace("rank 1: ", "")]),
    "bug": ([1, 1, 1], ["Traceback (most recent call last):", "error: rank 2: ZeroDivisionError: a bug of ours"]),
    "bug of rank 0": ([1, 1, 1], ["Traceback (most recent call last):", "error: ZeroDivisionError: a bug of ours"]),
    "interrupted": ([130] * 3, ["interrupted; what was finished before, checkpoints included, is intact"]),
    "killed": ([1, -9, 1], [f"error: rank 1 (host HOST, process N) {KILLED}; its machine's kernel log may say more"]),
    "rank 0 killed": ([-9, 1, 1], [f"error: rank 0 {KILLED}"]),
    "rank 0 ends first": ([0, 0, 0], []),
    "rank 0 ends last": ([0, 0, 0], []),
    "idle": ([0, 0, 0], []),
    "early user error": ([2, 2, 2], [LINE]),
    "early user error of rank 0": ([2, 2, 2], [LINE.replace("rank 1: ", "")]),
    "early user error of all": ([2, 2, 2], [LINE.replace("rank 1: ", "")]),
    "early bug": ([1, 1, 1], ["Traceback (most recent call last):", "error: rank 1: ZeroDivisionError: a bug of ours"]),
}
WAITED = "waited for the other ranks at tests/parallel/failing_ranks.py:N (wait_for_others): RuntimeError: Timed out"
TIMEOUTS = {  # what the one line says; which of the waiting ranks says it is chance
    "stuck": ([1, 1, 1], ["error: ", "rank 1 (host HOST, process N) is at tests/parallel/failing_ranks.py:N (stuck); ",
                          WAITED]),
    "stopped": ([1, -9, 1], ["error: ", "rank 1 (host HOST, process N) does not answer; ", WAITED]),
    "never came": ([2, 0, 2], ["error: ", "of 3 ranks, 1 did not come within 0.05 minutes"]),
}


def plain(text: str) -> str:
    """Without what differs between runs: this host's name, process numbers, line numbers."""
    import re
    import socket

    text = text.replace(socket.gethostname(), "HOST")
    return re.sub(r"(?<=process )\d+|(?<=ranks\.py:)\d+", "N", text)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    script = Path(__file__).with_name("failing_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tiny.HERE), *sys.path])}
    done = subprocess.run([sys.executable, str(script), "3"], env=environment, text=True, capture_output=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == CASES.keys() | TIMEOUTS.keys()
    return found


@pytest.mark.parametrize("case", CASES)
def test_one_error_and_all_ranks_end(case, outcomes):
    found, (codes, expected) = outcomes[case], CASES[case]
    lines = plain(found["output"]).splitlines()
    assert found["codes"] == codes, found
    assert (lines[:1] + lines[-1:] if len(expected) == 2 else lines) == expected
    assert found["output"].count("Traceback") == (len(expected) == 2)
    assert found["seconds"] < 30


@pytest.mark.parametrize("case", TIMEOUTS)
def test_the_rank_that_does_not_come_is_named(case, outcomes):
    found, (codes, expected) = outcomes[case], TIMEOUTS[case]
    assert found["codes"] == codes, found
    said = plain(found["output"])
    assert said.count("\n") == 1
    assert all(part in said for part in expected), said
    assert found["seconds"] < 30
