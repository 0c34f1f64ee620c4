"""`mainspring import --from DIR --output RUN`: a Hugging Face model as a checkpoint that every stage can start from, or
adapters that PEFT wrote as a checkpoint beside their base (`--base`), to generate with or to merge.

A model too large for one process: `torchrun --nproc-per-node 8 -m engine.import_model … --parallel.tensor 8`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import launch

if TYPE_CHECKING:
    from engine.config import Config
    from engine.config.export import ImportConfig


def main(argv: list[str]) -> int:
    """Writes the checkpoint and prints its path. Returns the exit code."""
    from engine.config import parse
    from engine.config.export import ImportConfig

    options = parse(ImportConfig, argv, prog="mainspring import")
    launch.adopt()

    from engine.parallel import topology

    of_adapters = (options.source / "adapter_config.json").is_file()
    cfg = adapters_configuration(options) if of_adapters else configuration(options)
    with topology.groups(cfg) as groups:
        path = adapters(cfg, groups, options) if of_adapters else run(cfg, groups, options)
        if groups.is_main:
            print(path)
    return 0


def configuration(options: ImportConfig) -> Config:
    """The configuration under which the model is read. Raises ``UserError``."""
    from engine.checkpoint import restore
    from engine.config import Config, ParallelConfig
    from engine.export import hugging_face

    section: dict[str, Any] = hugging_face.model_section(options.source)
    if options.seq_length is not None:
        section["seq_length"] = options.seq_length
    precision = _stored_precision(options.source) if options.precision == "auto" else options.precision
    cfg = Config.model_validate({"output_dir": options.output, "device": options.device, "model": section,
                                 "train": {"precision": precision}})
    cfg = cfg.model_copy(update={"parallel": ParallelConfig(**options.parallel.model_dump())})
    restore.check_layout(cfg)
    return cfg


def adapters_configuration(options: ImportConfig) -> Config:
    """As a run of the stage lora would have it. Raises ``UserError``."""
    from engine.checkpoint import restore
    from engine.config import Config, ParallelConfig
    from engine.errors import UserError
    from engine.export import peft
    from engine.stages import origin

    if options.base is None:
        raise UserError("holds adapters, which are no model without their base", where=str(options.source),
                        fix="Name it with --base")
    base = origin.find(options.base)
    precision = "fp32" if options.precision == "auto" else options.precision
    cfg = Config.model_validate({
        "stage": "lora", "init_from": str(base.path.absolute()), "output_dir": options.output, "device": options.device,
        "model": base.model_section(), "lora": peft.section(options.source), "train": {"precision": precision}})
    cfg = cfg.model_copy(update={"parallel": ParallelConfig(**options.parallel.model_dump())})
    restore.check_layout(cfg)
    return cfg


def adapters(cfg: Config, groups: Any, options: ImportConfig) -> Path:
    """Reads adapters and saves them, naming their base. -> the checkpoint. Collective."""
    from engine.checkpoint.adapters import Base
    from engine.checkpoint.manager import Checkpointer
    from engine.config import ParallelConfig, vocabulary
    from engine.data.tokenizer import load_tokenizer
    from engine.export import peft
    from engine.model import build
    from engine.stages import origin
    from engine.train.state import TrainState

    base = origin.find(str(cfg.init_from))
    folder = options.tokenizer or base.tokenizer
    tokenizer, sha256 = load_tokenizer(folder), base.fingerprint()
    vocab_size = vocabulary(cfg.model, tokenizer.vocab_size)
    chunks = build.model(cfg, groups, vocab_size)
    peft.load(options.source, chunks, cfg, groups, base_sha256=sha256)
    kept = cfg.model_copy(update={"parallel": ParallelConfig()})
    saved = Checkpointer(kept, groups, tokenizer=folder, tokenizer_sha256=tokenizer.sha256, vocab_size=vocab_size,
                         base=Base(base.path.absolute(), sha256))
    return saved.save(chunks, None, TrainState().to_dict())


def _stored_precision(directory: Path) -> str:
    """bf16 where config.json says so and no tensor holds more; fp32 has all values of fp16, too."""
    from engine.export.files import Files
    from engine.export.names import IGNORED

    config = json.loads((directory / "config.json").read_bytes())
    if config.get("torch_dtype", config.get("dtype")) != "bfloat16":
        return "fp32"
    with Files(directory) as files:
        wider = any(files.dtype(name) in ("F16", "F32", "F64") for name in files.names() if not IGNORED.search(name))
    return "fp32" if wider else "bf16"


def run(cfg: Config, groups: Any, options: ImportConfig) -> Path:
    """Reads the weights under ``cfg.parallel`` and saves them. -> the checkpoint. Collective."""
    from engine.checkpoint.manager import Checkpointer
    from engine.config import ParallelConfig, vocabulary
    from engine.data.tokenizer import load_tokenizer
    from engine.export import hugging_face
    from engine.model import build
    from engine.train.state import TrainState

    folder = options.tokenizer or options.source
    tokenizer = load_tokenizer(folder)
    vocab_size = vocabulary(cfg.model, tokenizer.vocab_size)
    chunks = build.model(cfg, groups, vocab_size)
    hugging_face.load(options.source, chunks, cfg, groups)
    if options.verify:
        difference = hugging_face.verify(options.source, chunks, groups, tokenizer)
        if groups.is_main:
            print(f"the logits are those of Transformers to {difference:.1e}", file=sys.stderr)
    # Whatever layout read it: the checkpoint's configuration is that of a model, not of this command.
    kept = cfg.model_copy(update={"parallel": ParallelConfig()})
    saved = Checkpointer(kept, groups, tokenizer=folder, tokenizer_sha256=tokenizer.sha256, vocab_size=vocab_size)
    return saved.save(chunks, None, TrainState().to_dict())


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
