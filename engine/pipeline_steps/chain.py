"""The stages in order: what is finished and unchanged is kept, the rest is run, and the gates decide who goes on."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from engine.config.pipeline import PipelineConfig, Stage, Step
from engine.errors import UserError
from engine.evaluation import gates
from engine.evaluation.gates import Place
from engine.pipeline_steps import commands, processes, promotions, results
from engine.pipeline_steps.commands import Work
from engine.pipeline_steps.promotions import Promotions, now

_RESUME = "Run the pipeline again to go on from there"


def say(text: str) -> None:
    """A line of the pipeline's own between those of its steps."""
    print(f"[pipeline] {text}", file=sys.stderr, flush=True)


def plan(cfg: PipelineConfig, known: Collection[str]) -> list[tuple[Stage, Step, Work]]:
    """Every step resolved as if all before it were done: what preflight checks. Raises ``UserError``."""
    done: dict[str, str] = {}
    trained: list[str] = []
    found = []
    for stage in cfg.stages:
        for step, name in zip(stage.steps, stage.step_names(), strict=True):
            work = commands.resolve(cfg, step, name, known, done, trained)
            found.append((stage, step, work))
            done[name] = ""
            trained += [name] if work.trains else []
    return found


class Chain:
    """One walk over the stages. ``promotions`` on disk is up to date whenever a step or a gate has ended."""

    def __init__(self, cfg: PipelineConfig, known: Collection[str], manifest: Promotions):
        self.cfg, self.known, self.promotions = cfg, known, manifest
        self.done: dict[str, str] = {}  # step -> hash of what it left
        self.places: dict[str, Place] = {}
        self.trained: list[str] = []
        self.previous: str | None = None

    def run(self) -> None:
        """All stages, up to ``until_stage``. Raises ``UserError`` at the first that fails or is not promoted."""
        names = [stage.name for stage in self.cfg.stages]
        first = names.index(self.cfg.from_stage) if self.cfg.from_stage else 0
        last = names.index(self.cfg.until_stage) if self.cfg.until_stage else len(names) - 1
        if self.cfg.from_stage:
            self._forget(self.cfg.stages[first:])
        for index, stage in enumerate(self.cfg.stages[:last + 1]):
            say(f"{stage.name} ({index + 1} of {len(names)})")
            try:
                self._stage(stage, must_be_done=index < first)
            finally:  # what was promoted on top of another past is no longer, until its own gates have spoken again
                if self.promotions.withdraw(names[index + 1:], self.previous if self._promoted(stage) else None):
                    self.promotions.write()
        say(f"promoted: {', '.join(names[:last + 1])}")

    def _forget(self, stages: list[Stage]) -> None:
        """``from_stage``: the steps from there on are unknown, so that they run again, in empty folders."""
        for stage in stages:
            self.promotions.data["stages"].pop(stage.name, None)
        self.promotions.write()

    def _promoted(self, stage: Stage) -> bool:
        return "sha256" in self.promotions.stage(stage.name)

    def _stage(self, stage: Stage, *, must_be_done: bool) -> None:
        before = dict(self.promotions.data["stages"].get(stage.name, {}))
        entry = self.promotions.reopen(stage.name)
        names = stage.step_names()
        records = {name: self.promotions.step(stage.name, name) for name in names}
        entry["steps"] = {name: record for name, record in records.items() if record is not None}
        try:
            for step, name in zip(stage.steps, names, strict=True):
                self._step(stage, step, name, entry["steps"], must_be_done=must_be_done)
            self._gates(stage, entry)
        except UserError as error:
            if entry["status"] == "running":
                entry |= {"status": "failed", "reason": str(error)}
            raise
        finally:  # Ctrl-C and whatever else ends us: the next start goes on
            if entry["status"] == "running":
                entry["status"] = "interrupted"
            self.promotions.write()
        if entry["sha256"] == before.get("sha256"):
            entry["promoted_at"] = before["promoted_at"]
            self.promotions.write()
        else:
            say(f"{stage.name}: promoted")

    def _step(self, stage: Stage, step: Step, name: str, records: dict[str, Any], *, must_be_done: bool) -> None:
        work = commands.resolve(self.cfg, step, name, self.known, self.done, self.trained)
        record = records.get(name)
        kept = None if work.always else self._kept(work, record)
        if kept is None:
            if must_be_done and not work.always:
                raise UserError(f"step {name} is not finished, or what it is made of has changed",
                                where=f"from_stage {self.cfg.from_stage}: stage {stage.name}",
                                fix="Run without --from_stage: it starts at the first stage that is not promoted")
            kept = self._run(step, work, records)
        else:
            say(f"{name}: unchanged, kept")
        self.done[name] = kept.sha256
        self.places[name] = Place(name, work.folder, kept.step)
        self.trained += [name] if work.trains else []

    def _kept(self, work: Work, record: dict[str, Any] | None) -> results.Result | None:
        """What the step left, where it is finished, made of the same, and still there whole."""
        if record is None or record["status"] != "done" or record["fingerprint"] != work.fingerprint:
            return None
        try:
            found = results.find(work.folder, verify=self.cfg.verify, trains=work.trains)
        except UserError as error:
            say(f"{work.name}: runs again, for what it left is damaged: {error}")
            return None
        if found.as_dict() != record["result"]:
            say(f"{work.name}: runs again, for what it left has changed")
            return None
        return found

    def _run(self, step: Step, work: Work, records: dict[str, Any]) -> results.Result:
        before = records.get(work.name)
        same = before is not None and before["fingerprint"] == work.fingerprint
        checked = before if before is not None and same and work.always and before["status"] == "done" else None
        goes_on = before if before is not None and same and work.goes_on and before["status"] != "done" else None
        log = self.cfg.output_dir / "logs" / f"{work.name}.log"
        if checked is None and goes_on is None:
            set_aside(self.cfg.output_dir, work.folder)
            log.unlink(missing_ok=True)
        earlier = goes_on or {}
        record = records[work.name] = {
            "status": "running", "fingerprint": work.fingerprint, "command": words_for_people(work),
            "config": None if step.config is None else str(step.config), "config_sha256": work.config_sha256,
            "inputs": work.inputs, "processes": step.processes, "log": str(log.relative_to(self.cfg.output_dir)),
            "started": earlier.get("started", now()), "seconds": earlier.get("seconds", 0.0),
            "attempts": earlier.get("attempts", 0)}
        self._attempts(step, work, record, log)
        found = results.find(work.folder, verify=True, trains=work.trains)
        record |= {"status": "done", "finished": now(), "result": found.as_dict(),
                   "data": results.data_hashes(work.folder) if work.trains else {}}
        if checked is not None and checked["result"] == record["result"]:  # the times of the run that made it
            record |= {name: checked[name] for name in ("started", "finished", "seconds", "attempts")}
        self.promotions.write()
        return found

    def _attempts(self, step: Step, work: Work, record: dict[str, Any], log: Path) -> None:
        """Runs the step until it ends well or has failed too often. Raises ``UserError``."""
        for attempt in range(self.cfg.max_restarts + 1):
            record["attempts"] += 1
            self.promotions.write()
            say(f"{work.name}: {record['command']}")
            (work.folder if work.needs_folder else work.folder.parent).mkdir(parents=True, exist_ok=True)
            ended = processes.run(
                work.words, log, environment=work.environment, stdout=work.stdout, grace=self.cfg.grace_seconds,
                timeout=None if step.timeout_minutes is None else 60 * step.timeout_minutes, follow=self.cfg.follow)
            record["seconds"] = round(record["seconds"] + ended.seconds, 1)
            if ended.code == 0:
                return
            record["status"] = "failed"
            if attempt < self.cfg.max_restarts and ended.code != UserError.exit_code:  # a mistake stays one
                say(f"{work.name}: failed (exit code {ended.code}: {ended.said}), restarted")
                record["status"] = "running"
                continue
            raise UserError(f"failed with exit code {ended.code}: {ended.said}", where=f"step {work.name}",
                            fix=f"{log} has all it said. {_RESUME}")

    def _gates(self, stage: Stage, entry: dict[str, Any]) -> None:
        places = [self.places[name] for name in stage.step_names()]
        found = [gates.check(gate, places, self.places) for gate in stage.gates]
        entry["gates"] = [outcome.as_dict() for outcome in found]
        for outcome in found:
            say(f"{stage.name}: gate {'passed' if outcome.passed else 'FAILED'}: {outcome.reason}")
        failed = [outcome.reason for outcome in found if not outcome.passed]
        if failed:
            entry |= {"status": "refused", "reason": "; ".join(failed)}
            raise UserError(f"not promoted: {'; '.join(failed)}", where=f"stage {stage.name}",
                            fix="Change its training or its gate and run the pipeline again; earlier stages are kept")
        self.previous = self.promotions.promote(stage.name, self.previous)
        self.promotions.write()


def words_for_people(work: Work) -> str:
    """The command as one would type it."""
    import shlex

    head = [Path(work.words[0]).name, *work.words[1:len(work.words) - len(work.arguments)]]
    return shlex.join([*head, *work.arguments])


def set_aside(output_dir: Path, folder: Path) -> None:
    """Moves what an earlier, different run left out of the way: training would go on from its checkpoints."""
    if not folder.exists():
        return
    place = output_dir / "set_aside"
    place.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.suffix[1:]) for p in place.glob(f"{folder.name}.*") if p.suffix[1:].isdigit()), default=0)
    target = place / f"{folder.name}.{number}"
    folder.rename(target)
    say(f"{folder.name}: what was there is now in {target}")


__all__ = ["Chain", "plan", "promotions", "say", "set_aside", "words_for_people"]
