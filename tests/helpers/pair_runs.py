"""Preference pairs of random tokens, runs that learn from them, and what three steps leave behind: for tests and ranks.

The pairs have prompts of one token and more, answers of one token and more, and a beginning in common now and then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from engine.config import Config

SEQ = 48
MODEL = {"model__seq_length": SEQ, "train__global_batch_size": 8, "train__eps": 1e-5, "train__clip_grad": 0.5}


def examples(pairs: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of every pair."""
    rng, found = np.random.default_rng(seed), []
    for i in range(pairs):
        prompt, *answers = (rng.integers(3, tiny.VOCAB, size).tolist()
                            for size in (1 if i % 7 == 0 else rng.integers(2, 12), rng.integers(1, 9),
                                         rng.integers(1, 9)))
        if i % 3 == 0:
            answers[1] = [answers[0][0], *answers[1], 5]
        found.append((prompt, answers[0], answers[1]))
    return found


def store(items: Sequence[tuple[list[int], list[int], list[int]]], source: str = "pairs") -> Any:
    from engine.data.examples.store import Store

    lengths = np.array([[len(part) for part in item] for item in items], np.int32).reshape(-1, 3)
    tokens = np.array([token for item in items for part in item for token in part], np.int32)
    ends = lengths.sum(1, dtype=np.int64).cumsum()
    return Store(source, lengths, tokens, ends - lengths.sum(1))


def loader(cfg: Config, groups: Any, *, pairs: int = 60, seed: int = 0) -> Any:
    """As ``engine.data.examples.build`` makes it of two sources."""
    from engine.data.examples.pair_rows import PairLoader, UnsharedPairLoader

    kind = PairLoader if cfg.examples.prefix_sharing else UnsharedPairLoader
    found = examples(pairs, seed)
    made = kind([store(found[: pairs // 3], "first"), store(found[pairs // 3 :], "second")], [1.0, 2.0],
                seq_length=cfg.model.seq_length, seed=cfg.seed, pad_id=0, packed=cfg.examples.packing,
                dp_rank=groups.data_parallel_rank, dp_size=groups.data_parallel_size, num_workers=0)
    made.fingerprint = f"{pairs} pairs of {seed}"
    return made


@dataclass
class Run(tiny.Run):
    objective: Any = None

    def step(self) -> Any:
        from engine.train import step

        return step.run(self.cfg, self.chunks, self.optimizer, self.data, self.groups, self.state, self.objective)


def reference_log_probs(run: tiny.Run, data: Any) -> torch.Tensor:
    from engine.train import reference

    return reference.score(run.chunks, data, run.groups, micro_batch_size=run.cfg.train.micro_batch_size,
                           seq_length=run.cfg.model.seq_length)


def start(cfg: Config, *, apart: float = 0.5) -> Run:
    """A run before its first step. Its reference is its own initial weights, shifted by up to ``apart`` nats for each
    pair and answer: else every margin would begin at 0 and no two losses could be told apart."""
    from engine.model.preference import Preference

    run = tiny.start(cfg)
    run.data.close()
    data = loader(cfg, run.groups)
    own = reference_log_probs(run, data)
    shift = torch.tensor([[math.sin(3 * i), math.cos(5 * i)] for i in range(len(own))], dtype=torch.float64)
    data.set_reference(own + apart * shift)
    return Run(cfg, run.groups, data, run.chunks, run.optimizer, run.state, Preference(cfg.dpo))


def three_steps(cfg: Config) -> dict[str, Any]:
    """The reference's log-probabilities; losses, metrics, counts and norms of each step; the first's gradients; weights
    afterwards; what evaluation says then. All of the unsplit model, on every rank."""
    from engine.evaluation.perplexity import evaluate

    run = start(cfg)
    found: dict[str, Any] = {"reference": run.data.corpus.reference_n2, "initial": tiny.whole_weights(run),
                             "gradients": None}
    results = []
    for _ in range(3):
        results.append(run.step())
        if found["gradients"] is None and not cfg.parallel.distributed_optimizer:  # which keeps a part on each rank
            found["gradients"] = tiny.whole_weights(run, lambda p: p.main_grad)
    scores = evaluate(run.chunks, run.data, run.groups, micro_batch_size=cfg.train.micro_batch_size,
                      seq_length=cfg.model.seq_length, objective=run.objective)
    run.data.close()
    sums = [r.sums for r in results]
    return found | {
        "losses": [s.loss for s in sums] + [scores["loss"]], "norms": [r.grad_norm for r in results],
        "metrics": [run.objective.metrics(s) for s in sums] + [
            {name: scores[name] for name in run.objective.metrics(sums[0])}],
        "counts": [(s.tokens, s.correct) for s in sums] + [scores["tokens"]], "weights": tiny.whole_weights(run)}


def differences(found: dict, expected: dict, bound: float) -> list[str]:
    """What is not equal: initial weights and counts exactly, the rest by more than ``bound``."""
    import context_runs

    wrong = context_runs.differences(found, expected, bound)
    off = (found["reference"] - expected["reference"]).abs().max().item()
    if not off <= bound * expected["reference"].abs().max().item():
        wrong.append(f"reference is off by {off:.1e}")
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        wrong += [f"{name} {ours[name]} for {value}" for name, value in theirs.items()
                  if not abs(ours[name] - value) <= 10 * bound * max(1.0, abs(value))]
    return wrong


def write_jsonl(path: Path, rows: int = 40) -> Path:
    """Preference rows as a user has them, of the tiny corpus's words."""
    import json

    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            words = [tiny._WORDS[(i * k + k) % len(tiny._WORDS)] for k in range(1, 4 + i % 5)]
            row = {"prompt": " ".join(words), "chosen": f"the spring {words[0]} {i}", "rejected": f"no {words[-1]}"}
            file.write(json.dumps(row) + "\n")
    return path
