"""Metric files after fresh starts, crashes, kills and resumes; what the console shows; W&B offline for real."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.train.console import compact, duration
from engine.train.metrics import MetricLogger, perplexity
from engine.train.sinks import read_rows


def options(**changes):
    defaults = {"tensorboard": False, "wandb": "off", "wandb_project": "tests", "progress": "off"}
    return SimpleNamespace(**defaults | changes)


def logger(directory: Path, start_step: int = 0, **changes) -> MetricLogger:
    return MetricLogger(directory, logging=options(**changes), total_steps=100, start_step=start_step,
                        run_config={"train": {"lr": 3e-4}}, run_name="a-run")


def loss_of(step: int) -> float:
    return 5.0 - math.log(step + 0.1)


def run(directory: Path, first: int, last: int, start_step: int = 0, **changes) -> None:
    with logger(directory, start_step, **changes) as metrics:
        for step in range(first, last + 1):
            metrics.log(step, {"train/loss": loss_of(step)} | ({"val/loss": 9.0} if step % 4 == 0 else {}))


def jsonl(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def csv_rows(directory: Path) -> list[dict]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# --- the files -------------------------------------------------------------------------------------------------------

def test_rows_round_trip_exactly_and_the_csv_header_grows(tmp_path):
    with logger(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 0.1 + 0.2, "train/consumed_tokens": 2**60 + 1})
        metrics.log(2, {"train/loss": torch.tensor(2.5), "val/loss": np.float64(1 / 3)})
        metrics.log(3, {"train/loss": np.float32(0.5), "train/consumed_tokens": np.int64(7)})
    assert jsonl(tmp_path) == [{"step": 1, "train/loss": 0.1 + 0.2, "train/consumed_tokens": 2**60 + 1},
                               {"step": 2, "train/loss": 2.5, "val/loss": 1 / 3},
                               {"step": 3, "train/loss": 0.5, "train/consumed_tokens": 7}]
    rows = csv_rows(tmp_path)
    assert list(rows[0]) == ["step", "train/loss", "train/consumed_tokens", "val/loss"]
    assert [row["val/loss"] for row in rows] == ["", str(1 / 3), ""]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["train/loss"]) == 0.1 + 0.2


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    metrics = logger(tmp_path)
    for step in (1, 2, 3):
        metrics.log(step, {"train/loss": float(step)})
        assert [row["step"] for row in jsonl(tmp_path)] == list(range(1, step + 1))
        assert [row["step"] for row in csv_rows(tmp_path)] == [str(i) for i in range(1, step + 1)]
    metrics.close()


def test_non_finite_values_stay_valid_json(tmp_path):
    with logger(tmp_path) as metrics:
        metrics.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    assert json.loads(line, parse_constant=refuse) == expected
    (row,), unreadable = read_rows(tmp_path / "metrics.jsonl")
    assert unreadable == 0
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.0)
    (row,) = csv_rows(tmp_path)
    assert math.isnan(float(row["a"]))
    assert (float(row["b"]), float(row["c"])) == (math.inf, -math.inf)


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    metrics = MetricLogger(tmp_path / "out", logging=options(tensorboard=True, wandb="offline"), total_steps=10,
                           start_step=0, is_main=False, run_config={})
    metrics.log(1, {"train/loss": 1.0})
    metrics.advance(2)
    metrics.message("hello")
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_module_does_not_import_torch_or_wandb():
    code = ("import sys, engine.train.metrics; "
            "print([m for m in ('torch', 'wandb', 'tensorboard', 'rich') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- resume ----------------------------------------------------------------------------------------------------------

def test_resume_drops_what_the_crashed_run_wrote_beyond_the_checkpoint(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(straight, 1, 12, tensorboard=True)
    run(resumed, 1, 9, tensorboard=True)  # the checkpoint was at step 6
    run(resumed, 7, 12, start_step=6, tensorboard=True)
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    seen = scalars(resumed, "train/loss")
    assert [step for step, _ in seen] == list(range(1, 13))
    assert [loss for _, loss in seen] == pytest.approx([loss_of(step) for step in range(1, 13)], abs=1e-4)
    assert [step for step, _ in scalars(resumed, "val/loss")] == [4, 8, 12]


def test_resume_again_and_again(tmp_path):
    run(tmp_path, 1, 5)
    for start in (3, 3, 7, 6):
        run(tmp_path, start + 1, start + 5, start_step=start)
    assert [row["step"] for row in jsonl(tmp_path)] == list(range(1, 12))
    assert [int(row["step"]) for row in csv_rows(tmp_path)] == list(range(1, 12))


@pytest.mark.parametrize("torn", [b'{"step": 5, "train/lo', b'{"step": 5, "train/loss": 3.1}', b"\xff\xfe"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    run(tmp_path, 1, 4)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"5,3.")
    run(tmp_path, 5, 6, start_step=4)
    assert [row["step"] for row in jsonl(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in csv_rows(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    assert jsonl(tmp_path)[4]["train/loss"] == loss_of(5)


def test_unreadable_lines_in_the_middle_are_dropped_and_told(tmp_path, capsys):
    run(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\n[1, 2]\n{"train/loss": 1.0}\n{"step": 3, "train/loss": 1.0}\n')
    run(tmp_path, 4, 4, start_step=3)
    assert [row["step"] for row in jsonl(tmp_path)] == [1, 2, 3, 4]
    assert "dropped 3 unreadable line(s)" in capsys.readouterr().err


def test_a_fresh_run_in_an_old_directory_starts_clean(tmp_path):
    run(tmp_path, 1, 9, tensorboard=True)
    run(tmp_path, 1, 3, tensorboard=True)
    assert [row["step"] for row in jsonl(tmp_path)] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3]


def test_sigkill_loses_at_most_the_current_line(tmp_path):
    """A child tells each row after log() returned; whatever it told must be in the files after SIGKILL."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_metrics
        metrics = test_metrics.logger(Path({str(tmp_path)!r}))
        for step in range(1, 10**9):
            row = {{"train/loss": test_metrics.loss_of(step)}} | ({{"val/loss": 9.0}} if step > 50 else {{}})
            metrics.log(step, row)
            print(step, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    told = 0
    while told < 200:
        told = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    told = [told, *map(int, child.stdout.read().split())][-1]
    child.wait()
    rows, unreadable = read_rows(tmp_path / "metrics.jsonl")
    assert unreadable == 0
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert told <= len(rows) <= told + 1
    run(tmp_path, told + 1, told + 2, start_step=told)
    assert [row["step"] for row in jsonl(tmp_path)] == list(range(1, told + 3))
    assert [int(row["step"]) for row in csv_rows(tmp_path)] == list(range(1, told + 3))


# --- bad circumstances -----------------------------------------------------------------------------------------------

def test_an_output_directory_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match=r"out: cannot write metrics: .*--output_dir"):
        logger(tmp_path / "out")


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    metrics = logger(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics._sinks[0], "_file", SimpleNamespace(write=len, flush=full))
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot write metrics: No space left on device.* Free some"):
        metrics.log(1, {"train/loss": 1.0})


def test_wandb_missing_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # `import wandb` raises ImportError
    with pytest.raises(UserError, match=r"logging.wandb: .*not installed.*pip install wandb.*off"):
        logger(tmp_path, wandb="offline")


def test_wandb_online_without_a_key_is_one_clear_line(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    with pytest.raises(UserError, match=r"no API key.*wandb login.*offline"):
        logger(tmp_path, wandb="online")


def wait_for(file: Path, texts: list[str]) -> None:
    """W&B's own process may finish its file some moments after the run was finished."""
    deadline = time.monotonic() + 60
    while missing := [text for text in texts if text.encode() not in file.read_bytes()]:
        assert time.monotonic() < deadline, f"{file} lacks {missing}"
        time.sleep(0.1)


def test_wandb_offline_writes_the_rows_and_resumes_the_same_run(tmp_path):
    run(tmp_path, 1, 6, wandb="offline", wandb_project="proof")
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    time.sleep(1.0)  # W&B names an offline run's folder by the second
    run(tmp_path, 5, 8, start_step=4, wandb="offline", wandb_project="proof")
    assert (tmp_path / "wandb_run_id").read_text().strip() == run_id
    files = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    first, second = sorted(files, key=os.path.getmtime)
    wait_for(first, ["train/loss", "val/loss", "a-run", "proof", repr(loss_of(3)), repr(loss_of(6))])
    wait_for(second, [repr(loss_of(8))])
    run(tmp_path, 1, 1, wandb="offline")
    assert (tmp_path / "wandb_run_id").read_text().strip() != run_id  # a fresh run is another run


# --- the console -----------------------------------------------------------------------------------------------------

ROW = {"train/loss": 3.48214, "train/perplexity": 32.5, "train/lr": 3e-4, "train/grad_norm": 0.8213,
       "train/tokens_per_sec": 12345.6, "train/mfu": 0.412, "train/memory_gb": 1.5333}


def test_plain_line_shows_every_field(tmp_path, capsys):
    with logger(tmp_path, start_step=90) as metrics:
        time.sleep(0.11)
        metrics.log(95, ROW | {"val/loss": 3.5})
        metrics.message("saved [iter_0000095]")
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert re.fullmatch(r"step  95/100 \| loss 3\.4821 \| val 3\.5000 \| lr 3\.00e-04 \| grad 0\.821 \| 12\.3k tok/s"
                        r" \| MFU 41\.2% \| 1\.53 GB \| [01]s left", first)
    assert second == "saved [iter_0000095]"


def test_auto_means_plain_lines_where_stderr_is_no_terminal(tmp_path, capsys):
    with logger(tmp_path, progress="auto") as metrics:
        metrics.log(1, ROW)
    assert capsys.readouterr().err.startswith("step   1/100 | loss 3.4821 | lr")


def test_a_terminal_gets_a_bar_in_80_columns(tmp_path):
    """In a child on a real pseudo-terminal: the bar, the last validation loss, messages left as they are."""
    import pty

    code = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_metrics
        with test_metrics.logger(Path({str(tmp_path)!r}), progress="auto") as metrics:
            metrics.message("a message with [brackets]")
            metrics.log(10, test_metrics.ROW | {{"val/loss": 3.5}})
            metrics.advance(15)
            metrics.log(20, test_metrics.ROW)
    """
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux answers EIO once the child is gone
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "a message with [brackets]" in text
    assert "step  10/100 | loss 3.4821 | val 3.5000 |" in text
    last = re.split(r"[\r\n]+", text.strip())[-1]
    assert re.search(r"━+.* 20/100 loss 3\.4821 · val 3\.5000 · 12\.3k tok/s · \d+s left", last)
    assert len(last) <= 80


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (999.6, "1k"), (12345.6, "12.3k"), (3e9, "3G"),
                                             (1.234e6, "1.23M"), (999_900, "1M"), (math.nan, "nan"), (math.inf, "inf")])
def test_compact(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"),
                                               (86400 * 3 + 4 * 3600, "3d04h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_perplexity():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
