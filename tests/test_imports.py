"""The one-way rule of the house: who may import whom, how long a file may be, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"pretrain", "midtrain", "sft", "dpo", "lora"}
COMMANDS = {"evaluate", "generate", "report", "verify_layout", "import_model", "export_model", "pipeline",
            "answer"}
LEVELS = [
    {"errors", "disk", "_index", "_tokenize", "_text", "_dedup", "engine_kernels"},
    {"config", "launch"},
    {"data", "losses", "parallel"},
    {"model"},
    {"train", "checkpoint", "evaluation"},
    {"verification", "export"},
    {"stages", "pipeline_steps"},
    {*STAGES, *COMMANDS, "runtime", "cli", "__init__"},
]
FILES = [*sorted((ROOT / "engine").rglob("*.py")), *sorted((ROOT / "kernels/engine_kernels").rglob("*.py"))]


def room(path: Path) -> str:
    inside = path.relative_to(ROOT).parts
    return inside[1] if inside[0] == "kernels" else Path(inside[1]).stem


def imported(path: Path) -> Iterator[str]:
    """Dotted names of every import in a file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if name in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = room(path)
    for name in imported(path):
        first, _, rest = name.partition(".")
        there = {"engine": rest.split(".")[0] or "__init__", "engine_kernels": "engine_kernels"}.get(first, here)
        if there in (here, "__version__"):
            continue
        driver_to_driver = here in LEVELS[-1] and there in LEVELS[-1]
        assert level(there) < level(here) or driver_to_driver, f"engine.{here} must not import {name}"
        assert here != "engine_kernels", f"a kernel imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "engine_kernels"], ids=lambda path: path.stem)
def test_kernels_know_no_process_groups(path):
    names = {*imported(path), *(ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                                if isinstance(node, ast.Attribute))}
    assert not [name for name in names if name.startswith(("torch.distributed", "megatron", "engine."))]


def test_files_are_read_in_one_sitting():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    drivers = {ROOT / "engine" / f"{name}.py" for name in STAGES | COMMANDS}
    assert drivers <= set(FILES)
    too_long = [str(path) for path, count in lines.items() if count > (149 if path in drivers else 500)]
    assert not too_long


def test_configuration_starts_without_torch_and_data_without_megatron():
    script = """
import sys
import engine, engine.cli, engine.runtime, engine.errors, engine.config, engine.config.inference, engine.config.prepare
loaded = set(sys.modules)
assert not loaded & {"torch", "megatron", "transformers", "tokenizers", "numpy"}, "configuration"
import importlib, pkgutil, engine.data
for module in pkgutil.iter_modules(engine.data.__path__, "engine.data."):
    importlib.import_module(module.name)
assert "engine.data.loader" in sys.modules
assert not set(sys.modules) & {"megatron", "transformers"}, "data"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
