"""Examples tokenized by several processes: the same bytes as by one, and one line where a process dies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny

from engine.data.examples import build, parallel
from engine.errors import UserError


def sources(folder: Path, pairs: bool) -> list[dict]:
    """Two files; rows that are refused in reading (not JSON), and in encoding, between good ones and at both ends."""
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        lines = ["{oops"]
        for number in range(150):
            row = {"prompt": f"the hand {name} {number}", "chosen": "the spring " * (number % 5 + 1), "rejected": "no"}
            if not pairs:
                row = {"instruction": f"the hand {name} {number}", "output": "the spring " * (number % 5 + 1)}
            lines.append(json.dumps(row))
            if number % 17 == 3:
                lines += ["[1, 2", json.dumps({"prompt": "the hand", "instruction": "the hand"})]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, "{}", "{oops"]) + "\n")
    return [{"path": str(folder)}]


def made(corpus: Path, folder: Path, pairs: bool, workers: int) -> dict[str, bytes]:
    """The entry's files."""
    examples = {"train": sources(folder.parent / "rows", pairs), "template": "alpaca",
                "tokenizer": corpus / "tokenizer",
                "cache_dir": folder / "cache", "max_bad_fraction": 0.5, "validation_fraction": 0.2,
                "workers": workers}  # fmt: skip
    cfg = tiny.config(corpus, folder / "run", model__seq_length=192,
                      **{f"examples__{name}": value for name, value in examples.items()})  # fmt: skip
    (entry,) = build.build_entries(cfg, corpus / "tokenizer", "train", pairs=pairs)
    assert entry.manifest["rows"] == 2 * (150 + 2 * 9 + 3)
    assert sum(split["examples"] for split in entry.manifest["splits"].values()) == 300
    return {path.name: path.read_bytes() for path in entry.folder.iterdir()}


@pytest.mark.parametrize("pairs", [False, True])
def test_any_number_of_processes_writes_the_same_bytes(corpus, tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(parallel, "BATCH_ROWS", 7)
    started: list[list[str]] = []
    command = parallel.command
    monkeypatch.setattr(parallel, "command", lambda: started.append(command()) or started[-1])
    tmp = {name: tmp_path / name for name in ("one", "two", "alone")}
    for folder in tmp.values():
        folder.mkdir()
    one = made(corpus, tmp["one"], pairs, workers=1)
    assert not started
    monkeypatch.setattr(parallel, "ALONE_BATCHES", 3)
    assert made(corpus, tmp["two"], pairs, workers=2) == one
    assert len(started) == 2
    monkeypatch.setattr(parallel, "ALONE_BATCHES", 10**6)  # rows that are few
    assert made(corpus, tmp["alone"], pairs, workers=0) == one
    assert len(started) == 2


@pytest.mark.parametrize(("program", "how"), [
    ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, as the system does when memory is short"),
    ("import sys; sys.stdin.buffer.read(1000); sys.exit(3)", "exit code 3"),
])  # fmt: skip
def test_a_process_that_dies_is_one_line_and_leaves_nothing(corpus, tmp_path, program, how, monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_BATCHES", 0)
    monkeypatch.setattr(parallel, "command", lambda: [sys.executable, "-c", program])
    with pytest.raises(UserError) as caught:
        made(corpus, tmp_path / "own", pairs=False, workers=2)
    assert str(caught.value) == (f"examples: a process that tokenizes examples died ({how}). "
                                 "Start it again; less memory "
                                 "is needed with fewer examples.workers")  # fmt: skip
    assert [path.suffix for path in (tmp_path / "own/cache").iterdir()] == [".lock"]
