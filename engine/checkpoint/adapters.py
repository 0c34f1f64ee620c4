"""What a checkpoint of adapters says of the model that they are beside: its path and the hash of its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config, load_yaml
from engine.errors import UserError

# What the shape and the meaning of the factors follow from; learning rate and dropout may change.
_SAME = ("rank", "alpha", "rslora", "target_modules", "base", "double_quant")


@dataclass(frozen=True)
class Base:
    """``path``: a checkpoint or a Hugging Face directory. ``sha256``: ``engine.stages.origin.Origin.fingerprint``."""

    path: Path
    sha256: str

    def record(self, output_dir: Path) -> dict[str, str]:
        """For state.json; the relative path finds the base where both were moved together."""
        relative = os.path.relpath(self.path.absolute(), output_dir.absolute())
        return {"path": str(self.path.absolute()), "relative_to_run": relative, "sha256": self.sha256}


def base_of(checkpoint: Path, record: dict) -> Base:
    """The base that a checkpoint's ``record`` (its state.json) names. Raises ``UserError`` when it is gone."""
    saved = record.get("base")
    if saved is None:
        raise UserError("does not say beside which model its adapters were trained", where=str(checkpoint),
                        fix="Use a checkpoint that a stage with lora saved")
    run = checkpoint.absolute().parent.parent
    for path in (Path(saved["path"]), Path(os.path.normpath(run / saved["relative_to_run"]))):
        if path.is_dir():
            return Base(path, saved["sha256"])
    raise UserError("the model beside which these adapters were trained is gone", where=saved["path"],
                    fix="Put it back there; the adapters alone are no model")


def check(checkpoint: Path, record: dict, cfg: Config, base: Base | None) -> None:
    """Refuses to resume adapters beside another base, or other ones than ``cfg.lora`` says. Raises ``UserError``."""
    saved, other = record.get("base"), "Choose another --output_dir for the new adapters"
    if (saved is None) != (cfg.lora is None):
        raise UserError("is a checkpoint of a whole model (here lora is set)" if saved is None else
                        "is a checkpoint of adapters (here lora is null)", where=str(checkpoint), fix=other)
    if saved is None or cfg.lora is None:
        return
    if base is not None and saved["sha256"] != base.sha256:
        raise UserError(f"is an adapter for another base: {saved['path']} as it was then (here {base.path})",
                        where=str(checkpoint), fix=f"Start from its own base with --init_from. {other}")
    before, here = load_yaml(checkpoint / "config.yaml").get("lora") or {}, cfg.lora.model_dump(mode="json")
    changed = [name for name in _SAME if name in before and before[name] != here[name]]
    if changed:
        differences = ", ".join(f"lora.{name} {before[name]} (here {here[name]})" for name in changed)
        raise UserError(f"is a checkpoint of other adapters: {differences}", where=str(checkpoint),
                        fix=f"Set these as they were. {other}")
