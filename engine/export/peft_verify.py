"""An adapter's export is done when PEFT, loading it beside its base, computes the engine's logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint import adapters
from engine.checkpoint.manager import agree
from engine.errors import UserError
from engine.export import hugging_face, peft
from engine.export.verify import TOLERANCE, logits
from engine.model import lora
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap

if TYPE_CHECKING:
    from engine.checkpoint.restore import Restored
    from engine.config.export import ExportConfig


def verify(directory: Path, base: Path, chunks: list[Any], groups: Groups, *, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the logits of this model with its adapters and PEFT's, in fp32.

    ``base``: a Hugging Face directory with the frozen weights. Collective. Raises ``UserError`` on all ranks for a
    difference above ``tolerance``, or where PEFT is not installed.
    """
    model = unwrap(chunks[0])
    length = min(model.max_sequence_length, 96)
    tokens_bs = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ours_bsv = logits(model, tokens_bs.to(groups.device))
    found = agree(groups, lambda: _compare(directory, base, tokens_bs, ours_bsv, tolerance) if groups.is_main else None,
                  f"verifying {directory}")
    return found[0]


@torch.no_grad()
def _compare(directory: Path, base: Path, tokens_bs: torch.Tensor, ours_bsv: torch.Tensor, tolerance: float) -> float:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError("the export is compared with PEFT's logits, and PEFT is not installed", where="verify",
                        fix="pip install peft, or --verify false") from error
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, attn_implementation="eager")
    theirs_bsv = PeftModel.from_pretrained(plain, str(directory)).eval()(tokens_bs).logits
    difference = float((theirs_bsv[..., : ours_bsv.shape[-1]] - ours_bsv).abs().max())
    if not difference <= tolerance:  # NaN as well
        raise UserError(f"PEFT's logits differ from the engine's by {difference:.3g} (at most {tolerance:.3g})",
                        where=str(directory), fix="Report it with the run's config.yaml")
    return difference


def export(restored: Restored, options: ExportConfig, beside: Callable) -> None:
    """A run's adapters as ``options.output``, compared with PEFT's logits on their base: as it lies there, or, where
    that is a checkpoint of the engine's, exported for it to ``beside(output, restored)``, a folder that goes away.

    Collective. Raises ``UserError`` on all ranks and leaves nothing behind.
    """
    cfg, groups, chunks = restored.cfg, restored.groups, restored.chunks
    assert cfg.lora is not None
    base = adapters.base_of(restored.path, restored.record)
    theirs = base.path if hugging_face.is_directory(base.path) else None
    quantised = cfg.lora.base != "none"

    def compare(folder: Path, model: Path) -> None:
        difference = verify(folder, model, chunks, groups, tolerance=options.tolerance)
        if groups.is_main:
            print(f"PEFT computes the same logits to {difference:.1e}", file=sys.stderr)

    def check(folder: Path) -> None:
        if quantised or not options.verify:
            if options.verify and groups.is_main:
                print("not compared with PEFT's logits: the base is quantised here", file=sys.stderr)
            return
        if theirs is not None:
            compare(folder, theirs)
            return
        with beside(options.output, restored) as place:
            with lora.detached(chunks):
                hugging_face.save(chunks, cfg, groups, restored.path / "tokenizer", place / "base", dtype="fp32",
                                  max_shard_gb=options.max_shard_gb, architecture=options.architecture,
                                  seq_length=options.seq_length)
            compare(folder, place / "base")

    peft.save(chunks, cfg, groups, options.output, base=None if theirs is None else str(theirs),
              record={"path": str(base.path), "sha256": base.sha256}, check=check)
