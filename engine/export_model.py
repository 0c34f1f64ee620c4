"""`mainspring export --checkpoint RUN --output DIR`: a checkpoint for Transformers, PEFT or llama.cpp.

The export gets its name only after Transformers has loaded it and computed the same logits. A model too large for one
process: `torchrun --nproc-per-node 8 -m engine.export_model … --parallel.tensor 8`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.checkpoint.restore import Plan, Restored
    from engine.config.export import ExportConfig


def main(argv: list[str]) -> int:
    """Writes the export and prints its path. Returns the exit code."""
    from engine.config import parse
    from engine.config.export import ExportConfig

    options = parse(ExportConfig, argv, prog="mainspring export")

    from engine.checkpoint import restore

    plan, dtype = planned(options)
    with restore.load(plan, load_base=_load_base(options, plan)) as restored:
        run(restored, options, dtype)
        if restored.groups.is_main:
            print(options.output)
    return 0


def planned(options: ExportConfig) -> tuple[Plan, str]:
    """What to restore, in fp32, and the type to write: the one that the model was trained in, unless another is asked
    for. Raises ``UserError``."""
    from engine.checkpoint import restore
    from engine.config import load_config
    from engine.model.config import resolve_precision
    from engine.parallel import topology

    plan = restore.plan(options.checkpoint, device=options.device, precision="fp32", parallel=options.parallel)
    dtype: str = options.dtype
    if dtype == "auto":
        dtype = load_config(plan.path / "config.yaml").train.precision
        if dtype == "auto":
            names = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
            dtype = names[str(resolve_precision("auto", topology.resolve_device(options.device)))]
    if plan.cfg.model.backend == "te":  # the same weights, by other names
        model = plan.cfg.model.model_copy(update={"backend": "engine"})
        plan = replace(plan, cfg=plan.cfg.model_copy(update={"model": model}))
    return plan, dtype


def _load_base(options: ExportConfig, plan: Plan) -> Any:
    """How the base of a checkpoint of adapters is loaded. Raises ``UserError`` when nobody said what to do with them.
    """
    from engine.stages.origin import load_base

    if options.merge and plan.cfg.lora is None:
        raise UserError("is a whole model: there are no adapters to merge", where=str(plan.path),
                        fix="Leave --merge out")
    if options.format == "adapter" and plan.cfg.lora is None:
        raise UserError("is a whole model: there are no adapters", where=str(plan.path), fix="Use --format hf")
    return load_base if options.merge or options.format == "adapter" else None


def run(restored: Restored, options: ExportConfig, dtype: str) -> None:
    """Writes ``options.output``. Collective. Raises ``UserError`` on all ranks and leaves nothing behind."""
    from engine.export import forms

    if options.format == "adapter":
        _adapter(restored, options)
        return
    if options.merge:
        from engine.model import lora_merge

        merged = lora_merge.merge(restored.chunks, restored.groups)
        if restored.groups.is_main:
            print(f"merged: {merged.changed} of {merged.total} matrices changed", file=sys.stderr)
    write = forms.hugging_face_directory if options.format == "hf" else forms.gguf_file
    write(restored, options, options.output, dtype)


def _adapter(restored: Restored, options: ExportConfig) -> None:
    from engine.export import forms, peft_verify

    peft_verify.export(restored, options, forms.beside)


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
