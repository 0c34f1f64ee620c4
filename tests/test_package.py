"""What other teams install: the wheel, its console script and its public Python API, away from the checkout."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
CONFIG = """
device: cpu
output_dir: by_command
data: {path: data}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, seq_length: 16}
train: {max_steps: 3, global_batch_size: 4, micro_batch_size: 2, lr: 5.0e-3, precision: fp32, schedule: constant}
logging: {logging_steps: 1, progress: "off"}
"""
PROGRAM = """
import json, sys
import engine
quick = "torch" not in sys.modules and "pydantic" not in sys.modules
assert {"prepare", "pretrain", "restore", "Config"} <= set(dir(engine))
manifest = engine.prepare(engine.PrepareConfig(input=["files"], output="data", vocab_size=300, validation_fraction=0.1))
cfg = engine.load_config("config.yaml", {"output_dir": "by_program"})
state = engine.pretrain.run(cfg)
try:
    engine.pretrain.run(cfg.with_values({"model.vocab_size": 200}))
except engine.UserError as error:
    refused = str(error)
with engine.restore("by_program") as model:
    text = engine.generate.continuations(model, "def ", max_new_tokens=4, temperature=0.0)[0]
    loss = engine.evaluate.run(model)["loss"]
    same = model.tokenizer.sha256 == engine.load_tokenizer("data/tokenizer").sha256 == manifest["tokenizer_sha256"]
import engine_kernels, engine._dedup, engine._index, engine._text, engine._tokenize, engine_kernels._cpu
print(json.dumps({"quick": quick, "step": state.step, "text": text, "loss": loss, "same": same, "refused": refused,
                  "files": [engine.__file__, engine._index.__file__, engine_kernels._cpu.__file__]}))
"""


def run(*argv: object, cwd: Path) -> str:
    """The standard output of a program that has nothing of the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"}, check=False,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources without what an earlier build left among them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(*PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, cwd=source)
    (built,) = folder.glob("mainspring-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a clean environment with the wheel in it; its other packages are this interpreter's."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    own = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    # Behind the environment's own packages; .pth files in there (an editable install of the checkout) are not read.
    Path(own, "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    run(*PIP, "--python", folder / "bin/python", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "mainspring = engine.cli:main" in entry_points
    assert {name.split("/")[0] for name in names} == {"engine", "engine_kernels",
                                                      next(n for n in names if "dist-info" in n).split("/")[0]}
    wanted = {f"engine/{path.relative_to(ROOT / 'engine')}" for path in (ROOT / "engine").rglob("*.py*")}
    wanted |= {f"engine_kernels/{path.name}" for path in (ROOT / "kernels/engine_kernels").glob("*.py*")}
    assert {name for name in wanted if "__pycache__" not in name} <= set(names)
    assert {"engine/py.typed", "engine_kernels/py.typed"} <= set(names)
    extensions = sorted(name.split(".")[0] for name in names if name.endswith(".so"))
    assert extensions == ["engine/_dedup", "engine/_index", "engine/_text", "engine/_tokenize", "engine_kernels/_cpu"]
    assert not [name for name in names if "test" in name or name.endswith((".cpp", ".hpp", ".h"))]


def test_the_wheel_and_three_steps_from_another_directory(wheel, installed, tmp_path):
    check_contents(wheel)
    (tmp_path / "files").mkdir()
    for path in sorted((ROOT / "engine/data").glob("*.py")):
        shutil.copy(path, tmp_path / "files")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    said = run(installed / "mainspring", "prepare", "--input", "files", "--output", "data", "--vocab_size", 300,
               "--validation_fraction", 0.1, cwd=tmp_path)
    assert "vocabulary 300" in said
    run(installed / "python", "-m", "engine.pretrain", "--config", "config.yaml", cwd=tmp_path)
    found = json.loads(run(installed / "python", "-c", PROGRAM, cwd=tmp_path))

    assert all(Path(file).is_relative_to(installed.parent) for file in found["files"]), found["files"]
    assert found["quick"]
    assert (found["step"], found["same"]) == (3, True)
    assert found["text"]
    assert found["refused"].startswith("model.vocab_size: 200 is fewer than the 300 ")
    runs = {}
    for name in ("by_command", "by_program"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        losses = runs[name] = [row["train/loss"] for row in rows]
        assert losses[2] < losses[0]
        assert losses[0] == pytest.approx(math.log(300), abs=0.2)
        checkpoints = tmp_path / name / "checkpoints"
        assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "3\n"
        assert (checkpoints / "iter_0000003/tokenizer/tokenizer.json").exists()
        assert json.loads((checkpoints / "iter_0000003/state.json").read_text())["train"]["consumed_samples"] == 12
    assert runs["by_command"] == runs["by_program"]
    assert found["loss"] == pytest.approx(rows[-1]["val/loss"], abs=1e-6)
