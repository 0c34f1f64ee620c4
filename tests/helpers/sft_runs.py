"""Supervised examples of random tokens, runs that learn from them, and what three steps leave: for tests and ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from engine.config import Config

SEQ = 48
MODEL = {"model__seq_length": SEQ, "train__global_batch_size": 8, "train__eps": 1e-5, "train__clip_grad": 0.5}


def examples(count: int, seed: int = 0) -> list[Any]:
    """A prompt, an answer, now and then a second turn; some answers short ones that a model soon gets right."""
    from engine.data.examples.store import Example

    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        tokens, mask = [], []
        for _ in range(1 + (i % 4 == 0)):
            prompt, answer = rng.integers(3, tiny.VOCAB, rng.integers(1, 9)), rng.integers(3, 9, rng.integers(0, 8))
            answer = [3, 1] if i % 3 == 0 else [*answer, 1]
            tokens += [*prompt, *answer]
            mask += [False] * len(prompt) + [True] * len(answer)
        found.append(Example(np.array(tokens, np.int32), np.array(mask)))
    return found


def loader(cfg: Config, groups: Any, *, count: int = 90, packed: bool | None = None) -> Any:
    """As ``engine.data.examples.build`` makes it of two sources."""
    from engine.data.examples.loader import ExampleLoader
    from engine.data.examples.store import Store

    found = examples(count)
    return ExampleLoader([Store.of("first", found[: count // 3]), Store.of("second", found[count // 3 :])], [1.0, 2.0],
                         seq_length=cfg.model.seq_length, seed=cfg.seed, pad_id=0,
                         packed=cfg.examples.packing if packed is None else packed, dp_rank=groups.data_parallel_rank,
                         dp_size=groups.data_parallel_size, num_workers=0)


@dataclass
class Run(tiny.Run):
    objective: Any = None

    def step(self) -> Any:
        from engine.train import step

        return step.run(self.cfg, self.chunks, self.optimizer, self.data, self.groups, self.state, self.objective)

    def evaluate(self) -> dict[str, float]:
        from engine.evaluation.perplexity import evaluate

        return evaluate(self.chunks, self.data, self.groups, micro_batch_size=self.cfg.train.micro_batch_size,
                        seq_length=self.cfg.model.seq_length, objective=self.objective)


def start(cfg: Config) -> Run:
    from engine.model.answers import ANSWERS

    run = tiny.start(cfg)
    run.data.close()
    return Run(cfg, run.groups, loader(cfg, run.groups), run.chunks, run.optimizer, run.state, ANSWERS)


def three_steps(cfg: Config) -> dict[str, Any]:
    """Losses, accuracies, counts and norms of each step; the first's gradients; weights afterwards; what evaluation
    says then. All of the unsplit model, on every rank."""
    run = start(cfg)
    found: dict[str, Any] = {"initial": tiny.whole_weights(run), "gradients": None}
    results = []
    for _ in range(3):
        results.append(run.step())
        if found["gradients"] is None and not cfg.parallel.distributed_optimizer:  # which keeps a part on each rank
            found["gradients"] = tiny.whole_weights(run, lambda p: p.main_grad)
    scores = run.evaluate()
    sums = [r.sums for r in results]
    return found | {
        "losses": [s.loss for s in sums] + [scores["loss"]], "norms": [r.grad_norm for r in results],
        "counts": [(s.tokens, s.correct, *sorted(s.extra.items())) for s in sums]
        + [(scores["tokens"], scores["accuracy"], scores["sequence_accuracy"])],
        "weights": tiny.whole_weights(run)}


def write_jsonl(path: Path, rows: int = 60) -> Path:
    """Instructions as a user has them, of the tiny corpus's words; the answer follows from the last word."""
    words = tiny._WORDS
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            asked = [words[(i * k + k) % len(words)] for k in range(1, 4 + i % 5)]
            file.write(json.dumps({"instruction": f"{' '.join(asked)} {i}", "output": f"the {asked[-1]}"}) + "\n")
    return path
