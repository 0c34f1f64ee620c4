"""From a step's configuration to the words of its processes, and the fingerprint of everything that they depend on."""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import load_yaml
from engine.config.pipeline import PipelineConfig, Step
from engine.errors import UserError
from engine.pipeline_steps import results

# Stages that go on from their own newest checkpoint, and the field that names their folder.
TRAINS = ("pretrain", "midtrain", "sft", "dpo", "lora")
_OUTPUT = {**dict.fromkeys(TRAINS, "output_dir"), **dict.fromkeys(("prepare", "code-tasks"), "output"),
           **dict.fromkeys(("import", "export", "answer"), "output")}
_OUTPUT_FILE = {"evaluate": ("output", "result.json")}
_PRINTS = {"generate": "generated.txt"}  # what the command prints is its result
# These look at what is there themselves, and use it or say what changed.
_REUSES = ("prepare", "code-tasks")
_PLACE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Work:
    """A step, resolved: ``words`` start it, ``inputs`` are the steps that it reads (name -> what they left)."""

    name: str
    folder: Path
    arguments: list[str]  # of the command or the script, for people and for preflight
    words: list[str]
    environment: dict[str, str]
    stdout: Path | None
    inputs: dict[str, str]
    config_sha256: str
    fingerprint: str
    command: str | None
    always: bool

    @property
    def trains(self) -> bool:
        return self.command in TRAINS

    @property
    def needs_folder(self) -> bool:
        """Whether its folder has to be there before it starts: others make theirs, all at once."""
        return self.command is None or self.command in _OUTPUT_FILE

    @property
    def goes_on(self) -> bool:
        """Whether a run that was interrupted is continued in its folder."""
        return self.trains or self.command in _REUSES


def resolve(cfg: PipelineConfig, step: Step, name: str, known: Collection[str], done: Mapping[str, str],
            trained_before: list[str]) -> Work:
    """``known``: the commands there are; ``done``: what earlier steps left, by name, in order.

    ``trained_before``: earlier steps that trained; a stage that does not say what it starts from takes the newest.
    Raises ``UserError`` for a placeholder or a command that does not exist.
    """
    folder, used = cfg.output_dir / name, set[str]()
    where = f"step {name}"
    places = {"here": str(folder), "output_dir": str(cfg.output_dir), "stdlib": sysconfig.get_path("stdlib"),
              **{earlier: str(cfg.output_dir / earlier) for earlier in done}}

    def fill(text: str) -> str:
        def place(match: re.Match[str]) -> str:
            if match[1] not in places:
                raise UserError(f"{match[0]} names no step before it", where=where,
                                fix=f"There are {', '.join('${' + known + '}' for known in places)}")
            used.add(match[1])
            return places[match[1]]

        return _PLACE.sub(place, text)

    overrides = {field: _map(value, fill) for field, value in flatten(step.overrides).items()}
    script = [fill(str(word)) for word in step.script]
    environment = {variable: fill(str(value)) for variable, value in step.environment.items()}
    config = {} if step.config is None else load_yaml(step.config)
    init = overrides.get("init_from", config.get("init_from"))
    if step.command in TRAINS[1:] and trained_before and init in (None, "auto"):
        used.add(trained_before[-1])
    inputs = {earlier: sha256 for earlier, sha256 in done.items() if earlier in used}
    files = results.outside(Path(script[0])) if script else None
    read = {text: found for text in sorted(_texts([config, overrides]))
            if not _inside(text, cfg.output_dir) and (found := results.outside(Path(text))) is not None}
    # What is hashed has placeholders, not paths: a pipeline's folder may be moved.
    depends = {"command": step.command, "script": step.script, "file": files, "config": config, "read": read,
               "overrides": flatten(step.overrides), "environment": step.environment, "inputs": inputs}
    arguments = script[1:] if script else [
        *([] if step.config is None else ["--config", str(step.config)]),
        *_folder_words(step, folder, overrides), *_flags(overrides)]
    return Work(
        name, folder, arguments, [*_start(step, script, known, where), *arguments], environment,
        folder / _PRINTS[step.command] if step.command in _PRINTS else None, inputs, results.digest(config),
        results.digest(depends), step.command,
        step.rerun == "always" or (step.rerun == "auto" and step.command in _REUSES))


def _start(step: Step, script: list[str], known: Collection[str], where: str) -> list[str]:
    """The words before the command's own arguments: Python or torchrun, and what it runs."""
    if script:
        if not Path(script[0]).is_file():
            raise UserError("no such file", where=f"{where}: script: {script[0]}", fix="Check its name")
        target = [script[0]]
    elif step.command not in known:
        raise UserError(f"there is no command {step.command!r}", where=where, fix=f"There are {', '.join(known)}")
    else:
        target = ["-m", "engine.cli", str(step.command)]
    if step.processes == 1 and not step.torchrun:
        return [sys.executable, *target]
    # --standalone finds a free port; several machines bring words of their own for where they meet.
    words = [str(word) for word in step.torchrun]
    elsewhere = any(word.startswith(("--rdzv", "--master", "--nnodes", "--standalone")) for word in words)
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(step.processes),
            *([] if elsewhere else ["--standalone"]), *words, *target]


def _folder_words(step: Step, folder: Path, overrides: dict[str, Any]) -> list[str]:
    """The flag that puts the command's result into the step's folder, unless the overrides say where."""
    assert step.command is not None
    if step.command in _OUTPUT_FILE:
        field, name = _OUTPUT_FILE[step.command]
        target = folder / name
    elif step.command in _OUTPUT:
        field, target = _OUTPUT[step.command], folder
    else:
        return []
    return [] if field in overrides else [f"--{field}", str(target)]


def flatten(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted path: ``{train: {lr: 1}}`` and ``{train.lr: 1}`` are the same."""
    found: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _flags(overrides: dict[str, Any]) -> list[str]:
    """``--field=value`` each: a value may itself begin with dashes."""
    return [f"--{field}={_word(value)}" for field, value in overrides.items()]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _map(value: Any, fill: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map(inner, fill) for key, inner in value.items()}
    if isinstance(value, list):
        return [_map(inner, fill) for inner in value]
    return fill(value) if isinstance(value, str) else value


def _texts(value: Any) -> set[str]:
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return {text for item in inner for text in _texts(item)}
    return {value} if isinstance(value, str) and value and "\n" not in value and len(value) < 4096 else set()


def _inside(text: str, folder: Path) -> bool:
    path = Path(os.path.abspath(text)) if "\0" not in text else Path()
    return path.is_relative_to(os.path.abspath(folder))
