"""`mainspring verify-layout` as its users meet it: verdicts, exit codes, one-line refusals, ranks that fail."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine import verify_layout
from engine.config import Config, load_config
from engine.errors import UserError
from engine.stages import origin
from engine.verification import jobs

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults.py")
DEMO = ROOT / "configs" / "pretrain" / "demo_cpu.yaml"
COMMAND = [sys.executable, "-m", "engine.cli", "verify-layout", "--config", str(DEMO), "--shrink"]


def mine() -> list[psutil.Process]:
    """The living processes under this one: not those of other test workers."""
    return [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def strictly(text: str) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_stages_after_pretraining(tmp_path, monkeypatch):
    """Their model comes from where they start, and is not the defaults; frozen weights have no gradients to compare."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of an earlier stage"):
        verify_layout.verify(load_config(ROOT / "configs/sft/demo_cpu.yaml"))
    cfg = Config().with_values({"stage": "lora", "model.num_layers": 2, "parallel.tensor": 2, "lora.rank": 4})
    fitted, ranks = jobs.fit(cfg, shrink=True)
    assert (fitted.lora, ranks) == (None, 2)
    assert any("lora left out" in line for line in jobs.notes(fitted, cfg))
    monkeypatch.setattr(jobs, "fit", lambda cfg, **_: pytest.fail(f"{cfg.model.num_layers} layers"))
    whole = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 64}
    monkeypatch.setattr(origin, "settle", lambda cfg: (cfg.with_values({"model": whole}), None))
    with pytest.raises(pytest.fail.Exception, match="3 layers"):
        verify_layout.verify(Config().with_values({"stage": "sft"}))


def test_a_layout_that_is_right(tmp_path, capsys):
    argv = ["--config", str(DEMO), "--shrink", "--parallel.tensor", "2", "--json", str(tmp_path / "new" / "found.json")]
    assert verify_layout.main(argv) == 0
    text = capsys.readouterr().out
    assert "TP2 DP1, 2 ranks, against one rank, fp32, tolerance 1e-05" in text
    assert "verdict: EQUAL to one rank within 1e-05; worst " in text
    assert f"mainspring verify-layout --config {DEMO} --shrink --parallel.tensor 2" in text
    assert "train.eps 1e-05 for 1e-08 on both sides" in text
    found = strictly((tmp_path / "new" / "found.json").read_text())
    for name, version in found["versions"].items():
        assert f"{name} {version}" in text
    assert found["passed"]
    assert found["report"] in text
    assert found["config"]["parallel"]["tensor"] == 2
    assert found["requested_config"]["model"]["hidden_size"] == 256
    assert len(found["steps"]) == 3
    for group in ("embedding", "norms", "attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"):
        assert f"\n{group} " in text
        assert 0.0 < found["groups"][group]["weights"] < 1e-5
    layers = {tensor["name"] for tensor in found["tensors"]}
    assert {"decoder.layers.1.mlp.linear_fc2.weight", "embedding.word_embeddings.weight"} <= layers


def test_a_layout_that_is_wrong(tmp_path, capsys, monkeypatch):
    planted = functools.partial(verify_layout.verify, plant=f"{FAULTS}:sequence_parallel_not_reduced")
    monkeypatch.setattr(verify_layout, "verify", planted)
    layout = ["--parallel.tensor", "2", "--parallel.sequence_parallel"]
    assert verify_layout.main(["--config", str(DEMO), "--shrink", *layout, "--json", str(tmp_path / "x.json")]) == 1
    text = capsys.readouterr().out
    assert "verdict: DIFFERENT from one rank (loss, grad norm, gradients, weights, copies past 1e-05)" in text
    worst = text[text.index("verdict"):]
    assert "worst gradient decoder.layers." in worst
    assert "layernorm.weight (norms)" in worst
    assert not strictly((tmp_path / "x.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parallel.tensor", "3"], "parallel.tensor: 3 does not divide model.num_attention_heads (4)"),
        (["--parallel.tensor", "2", "--ranks", "3"], "3 ranks do not fit tensor 2, which takes a multiple of 2"),
        (["--parallel.sequence_parallel"], "shares sequences over tensor ranks, but parallel.tensor is 1"),
        (["--tolerance", "0"], "tolerance: got 0, expected"),
        (["--shrnk"], "--shrnk: unknown option. Did you mean --shrink?"),
    ],
)
def test_what_is_impossible_is_one_line_before_any_rank_starts(words, said):
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_a_model_that_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(verify_layout.UserError, match=r"GiB of memory.*Add --shrink"):
        verify_layout.verify(load_config(ROOT / "configs/pretrain/70b_64gpu.yaml"))


@pytest.mark.parametrize(("fault", "said"), [
    ("second_rank_raises", "RuntimeError: planted: the second rank's own error"),
    ("second_rank_is_killed", "was ended by SIGKILL"),
])
def test_a_rank_that_fails_ends_the_command_with_its_own_error(fault, said):
    before = set(mine())  # an earlier test may have left a library's own service running here (W&B's core)
    found = verify_layout.verify(load_config(DEMO, {"parallel.tensor": 2}), shrink=True, plant=f"{FAULTS}:{fault}")
    assert not found["passed"]
    assert found["failure"]["rank"] == 1
    assert said in found["report"]
    assert "rank 1 failed:" in found["report"]
    assert "verdict: FAILED, the layout did not run" in found["report"]
    assert "rank 0" not in found["report"]
    assert found["failure"]["seconds"] < 20
    assert not set(mine()) - before


def test_nothing_outlives_a_command_that_is_killed():
    command = subprocess.Popen([*COMMAND, "--parallel.tensor", "2"], stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    family: list[psutil.Process] = []

    def ranks_run() -> bool:
        family[:] = psutil.Process(command.pid).children(recursive=True)
        return len(family) >= 2

    assert wait_for(ranks_run, 120)
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 10)
