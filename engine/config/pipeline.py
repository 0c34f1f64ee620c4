"""What `mainspring pipeline` can be told: stages in order, the commands of each, and the gates between them.

Values of ``overrides``, ``environment`` and ``script`` may name folders: ``${NAME}`` is what the step of that name
left, ``${here}`` this step's own folder, ``${output_dir}`` the pipeline's, ``${stdlib}`` Python's standard library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from engine.config.base import Problem, Section, option

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
# Names that mean something else: placeholders, and what the pipeline keeps in its folder itself.
RESERVED = ("here", "output_dir", "stdlib", "logs", "set_aside", "report.html", "promotions.json")
BOUNDS = ("at_least", "at_most", "above", "below")


class Gate(Section):
    """One threshold that a stage has to pass before the next begins. Several bounds hold together."""

    metric: str = option(..., "a name in the file: val/perplexity, refusal_rate, held_out.loss", min_length=1)
    step: str | None = option(None, "step of this stage that it is read from (null: the last that left the file)")
    file: str = option("metrics.jsonl", "file in the step's folder: .jsonl by row, .json by dotted name", min_length=1)
    take: Literal["promoted", "last", "best", "lowest", "highest", "mean"] = option(
        "promoted", "which row of a .jsonl: the newest at or before the promoted checkpoint, the newest of all, the "
        "best by the bounds, the lowest, the highest, or the mean of all")
    at_least: float | None = option(None, "smallest value that passes")
    at_most: float | None = option(None, "largest value that passes")
    above: float | None = option(None, "what the value must be larger than")
    below: float | None = option(None, "what the value must be smaller than")
    relative_to: str | None = option(
        None, "step whose value of the same metric the bounds are multiplied by (at_most 1.1: 10% more at most)")
    required: bool = option(True, "a metric that is missing fails the gate (false: it is only reported)")

    def problems(self) -> Iterator[Problem]:
        if not self.bounds():
            yield Problem("metric", f"{self.metric} has no bound", f"Set one of {', '.join(BOUNDS)}")
        low = max((b for n, b in self.bounds().items() if n in ("at_least", "above")), default=None)
        high = min((b for n, b in self.bounds().items() if n in ("at_most", "below")), default=None)
        strict = self.above is not None or self.below is not None
        if low is not None and high is not None and (low > high or (low == high and strict)):
            yield Problem("metric", f"no value of {self.metric} is both over {low:g} and under {high:g}", "Swap them")
        if self.take == "best" and low is not None and high is not None:
            yield Problem("take", "best is the highest or the lowest, but there are bounds on both sides",
                          "Make two gates of it")
        if Path(self.file).is_absolute() or ".." in Path(self.file).parts:
            yield Problem("file", f"{self.file} is outside of the step's folder", "Name a file in it")

    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        found = {name: getattr(self, name) for name in BOUNDS}
        return {name: value for name, value in found.items() if value is not None}


class Step(Section):
    """One command, in processes of its own."""

    name: str | None = option(None, "its folder in output_dir, and what ${NAME} means (null: the stage's name)")
    command: str | None = option(None, "a command of mainspring: prepare, sft, export …", min_length=1)
    script: list[str | int | float] = option(list, "instead of a command: a Python file and its arguments")
    config: Path | None = option(None, "its configuration file")
    overrides: dict[str, Any] = option(dict, "fields over those of config, nested or by dotted path")
    processes: int = option(1, "started together by torchrun, on this machine", "ranks", ge=1, le=4096)
    torchrun: list[str | int | float] = option(list, "further words for torchrun: [--nnodes, 2, --rdzv-endpoint, …]")
    environment: dict[str, str | int | float] = option(dict, "variables of its environment")
    rerun: Literal["auto", "changed", "always"] = option(
        "auto", "always, or when it or what it reads has changed; auto: prepare and code-tasks always, for they reuse "
        "what is there themselves")
    timeout_minutes: float | None = option(None, "it is ended after so long", "minutes", gt=0)

    def problems(self) -> Iterator[Problem]:
        if (self.command is None) == (not self.script):
            both = "both set" if self.script else "both missing"
            yield Problem("command", f"command and script are {both}", "Set one of them")
        if self.script and (self.config or self.overrides):
            yield Problem("script", "takes neither config nor overrides", "Write its arguments behind it")
        if self.name is not None and (not NAME.match(self.name) or self.name in RESERVED):
            yield Problem("name", f"{self.name!r} cannot be a folder's name here",
                          f"Use letters, digits, - and _; taken are {', '.join(RESERVED)}")


class Stage(Section):
    """Steps in order, and the gates that their results have to pass."""

    name: str = option(..., "what messages and the report call it", min_length=1)
    steps: list[Step] = option(..., "what is run, in order", min_length=1)
    gates: list[Gate] = option(list, "what its results must pass before the next stage begins")

    def problems(self) -> Iterator[Problem]:
        if not NAME.match(self.name) or self.name in RESERVED:
            yield Problem("name", f"{self.name!r} cannot be a folder's name here",
                          f"Use letters, digits, - and _; taken are {', '.join(RESERVED)}")
        names = self.step_names()
        for i, gate in enumerate(self.gates):
            if gate.step is not None and gate.step not in names:
                yield Problem(f"gates.{i}.step", f"{self.name} has no step {gate.step!r}",
                              f"It has {', '.join(names)}")

    def step_names(self) -> list[str]:
        """Folder names of the steps."""
        return [step.name or self.name for step in self.steps]


class PipelineConfig(Section):
    """A chain of stages with promotion gates between them, resumable at any of them."""

    output_dir: Path = option(Path("runs/pipeline"), "every step has a folder in it")
    title: str = option("Training chain", "heading of the report", min_length=1)
    stages: list[Stage] = option(..., "what is run, in order", min_length=1)
    from_stage: str | None = option(None, "run this stage and those after it again; earlier ones must be promoted")
    until_stage: str | None = option(None, "stop after this stage (null: the last)")
    preflight: bool = option(True, "check every step's configuration before the first starts")
    verify: bool = option(True, "read every byte of what finished stages left before building on it")
    max_restarts: int = option(0, "of a step that fails; training goes on from its newest checkpoint", "restarts",
                               ge=0, le=1000)
    grace_seconds: float = option(60, "time that an interrupted pipeline gives a step to end", "s", ge=0, le=3600)
    follow: bool = option(True, "show what the steps print; it is in logs/ in any case")

    def problems(self) -> Iterator[Problem]:
        names = [stage.name for stage in self.stages]
        earlier: list[str] = []
        for i, stage in enumerate(self.stages):
            if stage.name in names[:i]:
                yield Problem(f"stages.{i}.name", f"there are two stages {stage.name!r}", "Rename one")
            for j, name in enumerate(stage.step_names()):
                if name in earlier:
                    yield Problem(f"stages.{i}.steps.{j}.name", f"there are two steps {name!r}", "Rename one")
                earlier.append(name)
            for j, gate in enumerate(stage.gates):
                if gate.relative_to is not None and gate.relative_to not in earlier:
                    yield Problem(f"stages.{i}.gates.{j}.relative_to", f"{gate.relative_to!r} is no step before this "
                                  "gate", f"There are {', '.join(earlier)}")
        for field in ("from_stage", "until_stage"):
            name = getattr(self, field)
            if name is not None and name not in names:
                yield Problem(field, f"there is no stage {name!r}", f"There are {', '.join(names)}")
        if self.from_stage in names and self.until_stage in names and (
                names.index(self.from_stage) > names.index(self.until_stage)):
            yield Problem("until_stage", f"{self.until_stage} comes before from_stage {self.from_stage}", "Swap them")
