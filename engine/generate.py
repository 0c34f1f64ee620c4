"""`mainspring generate --checkpoint … --prompt …`: text from a checkpoint alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.checkpoint.restore import Restored


def main(argv: list[str]) -> int:
    """Prints the prompt with each continuation. Returns the exit code."""
    from engine.config import parse
    from engine.config.inference import GenerateConfig

    options = parse(GenerateConfig, argv, prog="mainspring generate")

    from engine.checkpoint import restore

    prompt = _read_prompt() if options.prompt is None else options.prompt
    with restore.model(options.checkpoint, device=options.device, precision=options.precision) as restored:
        texts = continuations(
            restored, prompt, num_samples=options.num_samples, max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
        if restored.groups.is_main:
            for i, text in enumerate(texts):
                if len(texts) > 1:
                    print(f"--- sample {i + 1} of {len(texts)}")
                print(prompt + text)
    return 0


def _read_prompt() -> str:
    try:
        return sys.stdin.read()
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
