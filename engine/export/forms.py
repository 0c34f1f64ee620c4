"""What `mainspring export` writes of a restored model, each form checked before it gets its name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine.checkpoint.manager import agree
from engine.checkpoint.restore import Restored
from engine.config.export import ExportConfig
from engine.errors import UserError
from engine.export import chat, hugging_face
from engine.export.writing import check_finite
from engine.model.whole import global_names


def hugging_face_directory(restored: Restored, options: ExportConfig, directory: Path, dtype: str) -> None:
    """A directory for Transformers. The restored weights (fp32) are rounded to ``dtype``. Collective."""
    agree(restored.groups, lambda: _round(restored, dtype), f"exporting {directory}")

    def check(folder: Path) -> None:
        difference = hugging_face.verify(folder, restored.chunks, restored.groups, restored.tokenizer,
                                         tolerance=options.tolerance)
        if restored.groups.is_main:
            print(f"Transformers computes the same logits to {difference:.1e}", file=sys.stderr)

    hugging_face.save(
        restored.chunks, restored.cfg, restored.groups, restored.path / "tokenizer", directory, dtype=dtype,
        max_shard_gb=options.max_shard_gb, architecture=options.architecture, seq_length=options.seq_length,
        chat=chat.of(restored.cfg, restored.path / "tokenizer"), check=check if options.verify else None)


@torch.no_grad()
def _round(restored: Restored, dtype: str) -> None:
    """So that what is compared is what is written. Raises ``UserError`` for a value that ``dtype`` does not hold."""
    for chunk in restored.chunks:
        for name, parameter in global_names(chunk).items():
            rounded = parameter.to(hugging_face.DTYPES[dtype])
            check_finite(name, parameter, rounded)
            parameter.copy_(rounded)


def gguf_file(restored: Restored, options: ExportConfig, output: Path, dtype: str) -> None:
    """A file for llama.cpp, from a directory for Transformers that goes away; compared with it where llama-cpp-python
    is installed. Collective."""
    from engine.export import gguf, gguf_verify

    kind = {"fp32": "f32", "fp16": "f16"}.get(dtype, dtype)
    with beside(output, restored) as folder:
        directory = folder / output.stem  # names the model in the file
        hugging_face_directory(restored, options, directory, "fp32" if dtype == "q8_0" else dtype)

        def write() -> None:
            file = directory.with_suffix(".gguf")
            written = gguf.write(directory, file, kind)
            for note in written.notes:
                print(f"note: {note}", file=sys.stderr)
            if options.verify and gguf_verify.installed():
                tolerance = options.tolerance if kind == "f32" and written.exact else None
                found = gguf_verify.verify(directory, file, tolerance=tolerance)
                print(f"llama.cpp computes the same logits to {found.logits:.1e}, and the first {found.greedy} of "
                      f"{found.continued} greedy tokens", file=sys.stderr)
            file.rename(output)

        agree(restored.groups, lambda: write() if restored.groups.is_main else None, f"exporting {output}")


@contextmanager
def beside(output: Path, restored: Restored) -> Iterator[Path]:
    """A folder beside the output, where there is room for it, on every rank the same; gone at the end. Collective.

    Raises ``UserError`` when the output exists.
    """
    own: list[TemporaryDirectory] = []

    def begin() -> str:
        if not restored.groups.is_main:
            return ""
        if output.exists():
            raise UserError("exists and is not replaced", where=str(output), fix="Choose another --output")
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        own.append(TemporaryDirectory(prefix=f"{output.name}.", dir=output.absolute().parent))
        return own[0].name

    try:
        yield Path(agree(restored.groups, begin, f"exporting {output}")[0])
    finally:
        for folder in own:
            folder.cleanup()
