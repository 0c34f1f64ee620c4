"""`mainspring generate --checkpoint … --prompt …`: text from a checkpoint alone.

A model too large for one processor: `torchrun --nproc-per-node 2 -m engine.generate … --parallel.tensor 2`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from engine import launch
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.checkpoint.restore import Restored
    from engine.config import Config


def main(argv: list[str]) -> int:
    """Prints the prompt with each continuation. Returns the exit code."""
    from engine.config import parse
    from engine.config.inference import GenerateConfig

    options = parse(GenerateConfig, argv, prog="mainspring generate")

    from engine.checkpoint import restore
    from engine.parallel import topology
    from engine.stages.origin import load_base

    plan = restore.plan(options.checkpoint, device=options.device, precision=options.precision,
                        parallel=options.parallel)
    _refuse_copies(plan.cfg, launch.world_size())
    prompt = _read_prompt() if options.prompt is None else options.prompt
    with restore.load(plan, load_base=load_base) as restored:
        prompt = topology.of_main_rank(prompt)
        texts = continuations(
            restored, prompt, num_samples=options.num_samples, max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
        if restored.groups.is_main:
            for i, text in enumerate(texts):
                if len(texts) > 1:
                    print(f"--- sample {i + 1} of {len(texts)}")
                print(prompt + text)
    return 0


def _refuse_copies(cfg: Config, world: int) -> None:
    """Ranks beyond one copy of the model would only repeat its text. Raises ``UserError``."""
    copy = cfg.smallest_world()
    if world > copy:
        raise UserError(f"{world} ranks would hold {world // copy} copies of the model that generate the same text",
                        where="parallel", fix=f"Start {copy}, or share the model over {world} (--parallel.tensor, "
                        "--parallel.pipeline, --parallel.expert)")


def _read_prompt() -> str:
    """Standard input, which torchrun hands to all its ranks: the main rank reads it."""
    try:
        return sys.stdin.read() if launch.rank() == 0 else ""
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason})", where="standard input", fix="Convert it") from error


def continuations(restored: Restored, prompt: str, *, num_samples: int = 1, **sampling: Any) -> list[str]:
    """What the model adds to ``prompt``. ``sampling``: fields of ``engine.evaluation.generation.Sampling``.

    Raises ``UserError`` for a prompt that is empty or fills the model's context.
    """
    from engine.evaluation.generation import Sampling, generate

    if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):  # bytes that Python could not decode
        raise UserError("is not UTF-8 text", where="prompt", fix="Convert it")
    tokenizer = restored.tokenizer
    rows = generate(restored.chunks[0], tokenizer.encode(prompt), Sampling(**sampling), eod_id=tokenizer.eod_id,
                    vocab_size=tokenizer.vocab_size, num_samples=num_samples)
    return [tokenizer.decode(row) for row in rows]


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
