"""`mainspring export --checkpoint RUN --output DIR`: a checkpoint for Transformers, PEFT or llama.cpp.

The export gets its name only after Transformers has loaded it and computed the same logits. A model too large for one
process: `torchrun --nproc-per-node 8 -m engine.export_model … --parallel.tensor 8`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
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
    from engine.origin import load_base

    if options.merge and plan.cfg.lora is None:
        raise UserError("is a whole model: there are no adapters to merge", where=str(plan.path),
                        fix="Leave --merge out")
    if options.format == "adapter" and plan.cfg.lora is None:
        raise UserError("is a whole model: there are no adapters", where=str(plan.path), fix="Use --format hf")
    return load_base if options.merge or options.format == "adapter" else None


def run(restored: Restored, options: ExportConfig, dtype: str) -> None:
    """Writes ``options.output``. Collective. Raises ``UserError`` on all ranks and leaves nothing behind."""
    if options.format == "adapter":
        _adapter(restored, options)
        return
    if options.merge:
        from engine.model import lora_merge

        merged = lora_merge.merge(restored.chunks, restored.groups)
        if restored.groups.is_main:
            print(f"merged: {merged.changed} of {merged.total} matrices changed", file=sys.stderr)
    if options.format == "hf":
        _hugging_face(restored, options, options.output, dtype)
        return
    with _beside(options.output, restored) as folder:
        _hugging_face(restored, options, folder / "hf", "fp32" if dtype == "q8_0" else dtype)
        _gguf(restored, folder / "hf", options.output, {"fp32": "f32", "fp16": "f16"}.get(dtype, dtype))


def _hugging_face(restored: Restored, options: ExportConfig, directory: Path, dtype: str) -> None:
    import torch

    from engine.export import chat, hugging_face

    with torch.no_grad():  # so that what is compared is what is written
        for chunk in restored.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.to(hugging_face.DTYPES[dtype]))

    def check(folder: Path) -> None:
        difference = hugging_face.verify(folder, restored.chunks, restored.groups, restored.tokenizer,
                                         tolerance=options.tolerance)
        if restored.groups.is_main:
            print(f"Transformers computes the same logits to {difference:.1e}", file=sys.stderr)

    hugging_face.save(
        restored.chunks, restored.cfg, restored.groups, restored.path / "tokenizer", directory, dtype=dtype,
        max_shard_gb=options.max_shard_gb, architecture=options.architecture, seq_length=options.seq_length,
        chat=chat.of(restored.cfg, restored.path / "tokenizer"), check=check if options.verify else None)


@contextmanager
def _beside(output: Path, restored: Restored) -> Iterator[Path]:
    """A folder beside the output, where there is room for it, on every rank the same; gone at the end."""
    from engine.checkpoint.manager import agree

    if restored.groups.is_main:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{output.name}.", dir=output.absolute().parent) as folder:
            yield Path(agree(restored.groups, lambda: folder, f"exporting {output}")[0])
    else:
        yield Path(agree(restored.groups, lambda: None, f"exporting {output}")[0])


def _gguf(restored: Restored, directory: Path, output: Path, dtype: str) -> None:
    from engine.checkpoint.manager import agree
    from engine.export import gguf

    agree(restored.groups, lambda: gguf.write(directory, output, dtype) if restored.groups.is_main else None,
          f"exporting {output}")


def _adapter(restored: Restored, options: ExportConfig) -> None:
    from engine.export import peft

    base = restored.record["base"]
    peft.save(restored.chunks, restored.cfg, restored.groups, options.output, base=base["path"], record=base)


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
