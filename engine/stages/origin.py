"""Where a run's initial weights come from: another run's checkpoint, or a Hugging Face directory.

``settle`` completes a configuration from it before anything is started: the model's shape, vocabulary and tokenizer.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import disk
from engine.config import STAGES, Config, load_yaml
from engine.errors import UserError
from engine.parallel.topology import Groups

_FIX = "Name a checkpoint, a run's folder or a Hugging Face directory with --init_from"


@dataclass(frozen=True)
class Origin:
    """``path``: a checkpoint (iter_NNNNNNN), or a directory with a Hugging Face config.json."""

    path: Path
    hugging_face: bool

    @property
    def tokenizer(self) -> Path:
        return self.path if self.hugging_face else self.path / "tokenizer"

    def model_section(self) -> dict[str, Any]:
        """The values of the configuration's section ``model``. Raises ``UserError``."""
        if self.hugging_face:
            from engine.export import hugging_face

            return hugging_face.model_section(self.path)
        from engine.checkpoint.manager import read_state

        record = read_state(self.path)
        if "base" in record:
            raise UserError("holds adapters, not a model", where=str(self.path),
                            fix="Merge them into their base first: mainspring export --merge")
        section = load_yaml(self.path / "config.yaml").get("model") or {}
        return section | {"vocab_size": section.get("vocab_size") or record["vocab_size"]}

    def fingerprint(self) -> str:
        """A hash of the weights' files: of a checkpoint's manifest, which holds theirs, or of the files themselves."""
        if not self.hugging_face:
            return disk.sha256(self.path / "manifest.json")
        names = sorted(p.name for p in self.path.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
        text = "".join(f"{name} {disk.sha256(self.path / name)}\n" for name in names)
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self, chunks: list[Any], cfg: Config, groups: Groups) -> None:
        """Fills this rank's bare chunks. Collective. Raises ``UserError`` on all ranks where the weights do not fit."""
        from engine.model import lora

        self.model_section()  # adapters are no model to start from
        if self.hugging_face:
            from engine.export import hugging_face

            with lora.detached(chunks):
                hugging_face.load(self.path, chunks, cfg, groups)
            return
        from engine.checkpoint import layout, sharded
        from engine.checkpoint.manager import agree, check_model

        agree(groups, lambda: groups.is_main and layout.verify(self.path), f"loading {self.path}")
        check_model(self.path, cfg)
        sharded.load(self.path / "sharded", chunks, None, groups)


def find(path: str | Path) -> Origin:
    """What a user's ``path`` means. Raises ``UserError`` where it holds no model."""
    from engine.checkpoint import layout

    path = Path(path)
    if (path / "config.json").is_file():
        return Origin(path, hugging_face=True)
    return Origin(layout.find(path), hugging_face=False)


def load_base(path: Path, sha256: str, chunks: list[Any], cfg: Config, groups: Groups) -> None:
    """Fills the frozen weights of chunks with adapters, for ``engine.checkpoint.restore``.

    Collective. Raises ``UserError`` on all ranks where the base is not the one that the adapters were trained beside.
    """
    from engine.checkpoint.manager import agree

    origin = find(path)

    def check() -> None:
        if groups.is_main and origin.fingerprint() != sha256:
            raise UserError("is not the base that these adapters were trained beside (its content hash differs)",
                            where=str(origin.path), fix="Put that model back")

    agree(groups, check, f"loading {path}")
    origin.load(chunks, cfg, groups)


def newest(cfg: Config) -> Origin:
    """The newest checkpoint of an earlier stage among the runs beside ``output_dir``. Raises ``UserError``."""
    from engine.checkpoint import layout

    earlier = STAGES[: STAGES.index(cfg.stage)]
    found = []
    for run in sorted(cfg.output_dir.absolute().parent.glob("*/checkpoints")):
        if run.parent == cfg.output_dir.absolute() or not (run / layout.POINTER).is_file():
            continue
        checkpoint = layout.find(run)
        saved = load_yaml(checkpoint / "config.yaml")
        if saved.get("stage", "pretrain") in earlier and not saved.get("lora"):
            found.append((os.stat(run / layout.POINTER).st_mtime_ns, checkpoint))
    if not found:
        raise UserError(f"there is no checkpoint of an earlier stage ({', '.join(earlier)}) beside {cfg.output_dir}",
                        where="init_from", fix=_FIX)
    return Origin(max(found)[1], hugging_face=False)


def _before(cfg: Config) -> Origin | None:
    """What a run that is resumed, and is not told another origin, started from: "auto" and the folder of a run may mean
    a newer checkpoint by now."""
    from engine.checkpoint import layout

    named = None if cfg.init_from in (None, "auto") else Path(cfg.init_from).absolute()
    if cfg.resume_from_checkpoint == "none":
        return None
    resumed = cfg.resume_from_checkpoint
    checkpoint = layout.latest(layout.root(cfg.output_dir)) if resumed == "auto" else layout.find(resumed, newest=True)
    saved = None if checkpoint is None else load_yaml(checkpoint / "config.yaml").get("init_from")
    if saved in (None, "none") or (named is not None and not Path(saved).is_relative_to(named)):
        return None
    return find(saved)


def settle(cfg: Config) -> tuple[Config, Origin | None]:
    """The configuration with the model's unset fields as those of ``init_from``, checked again; and that origin.

    None where the run starts from random weights (pretraining, ``init_from: none``). Raises ``UserError``.
    """
    if cfg.stage == "pretrain":
        return cfg, None
    if cfg.init_from == "none":
        if cfg.awaits_model():
            raise UserError("starts from random weights, but the section model names no shape", where="init_from",
                            fix="Set model.preset or model.num_layers and its other fields")
        return cfg, None
    origin = _before(cfg) or (newest(cfg) if cfg.init_from in (None, "auto") else find(cfg.init_from))
    own = cfg.model.model_dump(exclude_unset=True)
    preset = own.pop("preset", None)
    inherited = {name: value for name, value in origin.model_section().items() if name != "preset"}
    if preset is not None:  # a shape that the user insists on: compared with the weights' when they are loaded
        inherited = {"vocab_size": inherited["vocab_size"]} | cfg.model.model_dump(exclude={"vocab_size"})
    data = cfg.model_dump(exclude_unset=True) | {"model": inherited | own, "init_from": str(origin.path.absolute())}
    return Config.model_validate(data), origin
