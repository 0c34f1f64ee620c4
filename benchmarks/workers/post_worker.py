"""The engine's side of bench_post: the steps that ``engine/sft.py`` and ``engine/dpo.py`` run."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.workers.engine_worker import training
from benchmarks.workers.protocol import Step, serve


def build(config: dict) -> tuple[Step, dict]:
    """``config``: see bench_post.worker_config."""
    import torch

    torch.set_num_threads(config["threads"])
    from engine.config import Config
    from engine.data.examples import build as examples
    from engine.model import build as model_build
    from engine.model.answers import ANSWERS
    from engine.parallel import topology
    from engine.stages import origin

    cfg, found = origin.settle(Config.model_validate(engine_config(config)))
    assert found is not None
    pairs = config["task"] == "dpo"
    groups = topology.build(cfg)
    data = examples.build(cfg, found.tokenizer, "train", pairs=pairs, dp_rank=0, dp_size=1)
    chunks = model_build.model(cfg, groups, cfg.model.vocab_size or 0)
    found.load(chunks, cfg, groups)
    objective: Any = ANSWERS
    facts: dict[str, Any] = {}
    if pairs:
        objective, seconds = _reference(cfg, chunks, data, groups)
        facts["reference_seconds_per_example"] = seconds / data.num_examples
    step, wrapped = training(cfg, chunks, groups, data, objective)
    rows, per_epoch = cfg.train.global_batch_size, data.rows_per_epoch
    return step, facts | {
        "parameters": sum(p.numel() for chunk in wrapped for p in chunk.parameters()), "fill": data.fill,
        # Rows are shuffled, so the mean over an epoch is what steps see.
        "examples_per_step": rows * data.num_examples / per_epoch,
        "tokens_per_step": rows * data.num_tokens / per_epoch}


def _reference(cfg: Any, chunks: list, data: Any, groups: Any) -> tuple[Any, float]:
    """The objective of DPO, and the seconds that scoring the whole dataset with the reference took."""
    from engine.model.preference import Preference
    from engine.train import reference

    started = time.perf_counter()
    data.set_reference(reference.score(chunks, data, groups, micro_batch_size=cfg.train.micro_batch_size,
                                       seq_length=cfg.model.seq_length))
    return Preference(cfg.dpo), time.perf_counter() - started


def engine_config(config: dict) -> dict[str, Any]:
    """The engine's configuration of a run like the trainer's."""
    rows = config["batch_size"] if not config["packing"] else config["rows"]
    return {
        "stage": config["task"], "init_from": config["model_dir"], "output_dir": config["scratch"],
        "seed": config["seed"], "device": config["device"], "model": {"seq_length": config["seq_length"]},
        "examples": {"train": [{"path": config["data"], "format": config["format"]}], "packing": config["packing"],
                     "audit": False},
        "train": {"max_steps": config["max_steps"], "global_batch_size": rows, "micro_batch_size": 1,
                  "lr": config["lr"], "schedule": "constant", "weight_decay": config["weight_decay"],
                  "clip_grad": config["clip_grad"], "beta2": 0.999,
                  "precision": "bf16" if config["precision"] == "autocast" else "fp32"},
        "dpo": {"beta": config["beta"]},
    }


if __name__ == "__main__":
    serve(build)
