"""One stage of the engine on synthetic data for bench_stages: pretraining, packed SFT, packed DPO, LoRA or QLoRA."""

from __future__ import annotations

from typing import Any

from benchmarks.workers.engine_worker import ArrayLoader, engine_config, initialise_in_place, training
from benchmarks.workers.protocol import Step, serve


def build(config: dict) -> tuple[Step, dict]:
    """``config``: bench_train's ``worker_config`` with ``kind``, ``lengths`` and ``rank``."""
    import torch

    torch.set_num_threads(config["threads"])
    from engine.config import Config
    from engine.model import build as model_build
    from engine.parallel import topology

    kind = config["kind"]
    cfg = Config.model_validate(engine_config(config) | _stage(kind, config))
    groups = topology.build(cfg)
    if config["weights"] == "own":
        initialise_in_place()
    chunks = model_build.model(cfg, groups, config["shape"]["vocab_size"])
    if kind == "qlora":
        _fill_quantised(chunks)
    data: Any = ArrayLoader(config["tokens"]) if kind == "pretrain" else _examples(config, cfg, pairs=kind == "dpo")
    objective = _objective(kind, cfg, data)
    step, wrapped = training(cfg, chunks, groups, data, objective)
    trained = sum(p.numel() for chunk in wrapped for p in chunk.parameters() if p.requires_grad)
    return step, {"parameters": trained, "fill": getattr(data, "fill", 1.0)}


def _stage(kind: str, config: dict) -> dict[str, Any]:
    if kind == "pretrain":
        return {"stage": "pretrain"}
    adapters = {"lora": {"rank": config["rank"], "base": "nf4" if kind == "qlora" else "none"}}
    return {"stage": "dpo" if kind == "dpo" else "sft", "init_from": "none",
            **(adapters if kind in ("lora", "qlora") else {})}


def _fill_quantised(chunks: list) -> None:
    """Random frozen weights, one after the other: they are not drawn, since a run reads them from its origin."""
    import torch

    from engine.model import quantized

    for chunk in chunks:
        for holder in quantized.weights(chunk).values():
            holder.copy_(torch.randn(holder.shape) * 0.02)


def _objective(kind: str, cfg: Any, data: Any) -> Any:
    import torch

    from engine.model.answers import ANSWERS
    from engine.model.objective import NEXT_TOKEN
    from engine.model.preference import Preference

    if kind == "dpo":
        data.set_reference(torch.zeros(data.num_examples, 2, dtype=torch.float64))
        return Preference(cfg.dpo)
    return NEXT_TOKEN if kind == "pretrain" else ANSWERS


def _examples(config: dict, cfg: Any, *, pairs: bool) -> Any:
    """Packed rows of random tokens; of each example two thirds are its answer."""
    import numpy as np

    from engine.data.examples.loader import ExampleLoader
    from engine.data.examples.pair_rows import PairLoader
    from engine.data.examples.store import Example, Pair, Store

    rng = np.random.default_rng(config["seed"])
    items: list[Any] = []
    for length in config["lengths"]:
        tokens = rng.integers(0, config["shape"]["vocab_size"], length + length // 2, dtype=np.int32)
        first = length // 3
        if pairs:  # an answer, and another of the same length, to one prompt
            second = length // 2
            items.append(Pair(tokens[:first], tokens[first:second], tokens[second:2 * second - first]))
        else:
            items.append(Example(tokens[:length], np.arange(length) >= first))
    kind = PairLoader if pairs else ExampleLoader
    return kind([Store.of("synthetic", items)], [1.0], seq_length=cfg.model.seq_length, seed=config["seed"], pad_id=0,
                packed=True, dp_rank=0, dp_size=1, num_workers=1)


if __name__ == "__main__":
    serve(build)
