"""`mainspring pipeline --config configs/pipeline.yaml`: the whole chain, stage by stage, with gates between.

Each step runs in processes of its own; this one holds no model. Run it again after a failure or an interruption, and it
goes on where it ended: what is finished and made of the same is kept, training resumes from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys

from engine.config.pipeline import PipelineConfig
from engine.errors import UserError


def main(argv: list[str]) -> int:
    """Runs the chain. Returns the exit code: 0 when every stage was promoted; ``UserError`` (2) otherwise."""
    from engine.config import parse

    run(parse(PipelineConfig, argv, prog="mainspring pipeline"))
    return 0


def run(cfg: PipelineConfig) -> None:
    """Raises ``UserError`` with the reason where a step fails or a gate refuses; the report is written in any case."""
    from engine.evaluation import run_report
    from engine.pipeline_steps import chain, processes, promotions

    modules = commands()
    plan = chain.plan(cfg, modules)
    if cfg.preflight:
        for stage, _, work in plan:
            if work.command is not None:
                preflight(stage.name, work.name, modules[work.command], work.arguments)
    with promotions.locked(cfg.output_dir), processes.interruptible():
        manifest = promotions.Promotions(cfg.output_dir, cfg.title)
        try:
            chain.Chain(cfg, modules, manifest).run()
        finally:
            place = run_report.write(cfg.output_dir, manifest.data, [stage.name for stage in cfg.stages])
            chain.say(f"report: {place}")


def commands() -> dict[str, str]:
    """The Python module of every command but this one."""
    from engine.cli import COMMANDS

    return {name: module for name, (module, _) in COMMANDS.items() if name != "pipeline"}


def preflight(stage: str, step: str, module: str, arguments: list[str]) -> None:
    """A step's configuration, read as its command will read it: a mistake in the last stage is found before the first.

    What only exists later (checkpoints, data) is not looked at. Raises ``UserError`` that names the step.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # as --print-config ends
            importlib.import_module(module).main([*arguments, "--print-config"])
    except UserError as error:
        raise UserError(str(error), where=f"stage {stage}, step {step}") from error


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
