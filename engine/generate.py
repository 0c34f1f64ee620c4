"""`mainspring generate --checkpoint … --prompt …`: text from a checkpoint alone."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    """Prints the prompt with each continuation. Returns the exit code."""
    from engine.config import parse
    from engine.config.inference import GenerateConfig

    options = parse(GenerateConfig, argv, prog="mainspring generate")

    from engine.checkpoint import restore
    from engine.evaluation.generation import Sampling
    from engine.parallel import topology

    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    restored = restore.model(options.checkpoint, device=options.device, precision=options.precision)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    texts = continuations(restored, prompt, sampling, options.num_samples)
    if restored.groups.is_main:
        for i, text in enumerate(texts):
            if len(texts) > 1:
                print(f"--- sample {i + 1} of {len(texts)}")
            print(prompt + text)
    topology.shutdown()
    return 0


def continuations(restored, prompt: str, sampling, num_samples: int = 1) -> list[str]:
    """What the model adds to ``prompt``."""
    from engine.evaluation.generation import generate

    tokenizer = restored.tokenizer
    rows = generate(restored.chunks[0], tokenizer.encode(prompt), sampling, eod_id=tokenizer.eod_id, num_samples=num_samples)
    return [tokenizer.decode(row) for row in rows]
