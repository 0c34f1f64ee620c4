"""The training step of the engine beside that of Hugging Face Transformers: same model, initial weights and tokens.

Each side is a process that is idle unless it is its turn; rounds of a few steps go round among them, so that the
machine's noise hits all alike. A ratio is the median of the rounds' own ratios.

Sides, at each precision: ``engine``; ``eager`` and ``compile`` (torch.compile) are Transformers. In bf16 these two keep
fp32 weights and run under autocast, as Trainer's bf16=True does, and as the engine keeps fp32 master weights.
``eager-pure`` and ``compile-pure`` hold weights and optimizer state in bf16, which is faster and loses small updates.

All sides stay in memory at once. On one GPU, five sides of the 1b model do not fit: name two or three with ``--sides``.

MFU: model FLOPs (engine/train/flops.py: matrix products forward and backward, the causal half of attention, no
embedding look-up), over the best rate of a large matrix product in that precision measured on this CPU just before, or
over a GPU's dense bf16 peak from its data sheet. ``memory`` is the peak after warm-up: resident set on a CPU, allocated
on a GPU. ``start-up`` lasts from the process's start until it is ready to train; ``first step`` comes on top
(compilation included). ``CPU s/step`` is processor time of all threads, which a busy machine disturbs less than the
clock. ``idle CPU`` is what a side used while the others ran: far from 0, the result is worthless.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, median_ratio
from benchmarks.workers.protocol import Worker, interleave
from engine.errors import UserError

SIDES = {"fp32": ("engine", "eager", "compile"), "bf16": ("engine", "eager", "compile", "eager-pure", "compile-pure")}
WARMUP_STEPS = 2  # after the first one, which is timed by itself

# seq_length, global_batch_size and micro_batch_size are defaults of the options of those names.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64,
             "vocab_size": 128, "seq_length": 16, "global_batch_size": 4, "micro_batch_size": 2},
    "demo": {"config": ROOT / "configs/pretrain/demo_cpu.yaml", "vocab_size": 4096},  # the rest is in that file
    "125m": {"preset": "large", "vocab_size": 50304, "seq_length": 1024, "global_batch_size": 64,
             "micro_batch_size": 16},
    "1b": {"preset": "1b", "vocab_size": 50304, "seq_length": 4096, "global_batch_size": 8, "micro_batch_size": 2},
}


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--precision", choices=["fp32", "bf16", "all"], default="all",
                        help="all: both in one interleaved run")
    parser.add_argument("--sides", help="some of engine,eager,compile,eager-pure,compile-pure (all that apply)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-round", type=int, default=3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in ("seq-length", "global-batch-size", "micro-batch-size"):
        parser.add_argument(f"--{name}", type=int, default=None, help="the model's own")


def run(options: argparse.Namespace) -> list[Row]:
    """Trains all sides and returns a row for each. Raises UserError for options that do not go together."""
    plan = worker_config(options)
    sides = _sides(options)
    with tempfile.TemporaryDirectory(prefix="bench_train_") as folder, contextlib.ExitStack() as stack:
        plan["tokens"] = str(_write_tokens(Path(folder) / "tokens.npy", plan))
        plan["load_weights"] = str(_write_weights(Path(folder) / "weights.safetensors", plan))
        peaks = _peaks(plan)
        workers, first_steps = [], {}
        for name, module, changes in sides:  # one after the other: start-up is measured too
            worker = Worker(name, module, plan | changes, threads=plan["threads"])
            stack.callback(worker.close)
            workers.append(worker)
            first_steps[name] = worker.run(1)
            worker.run(WARMUP_STEPS)
            worker.reset_memory()
        answers, idle = interleave(workers, options.rounds, options.steps_per_round)
    return [_row(worker, plan, answers, first_steps[worker.name], idle[worker.name], peaks) for worker in workers]


# --- what is run -----------------------------------------------------------------------------------------------------

def worker_config(options: argparse.Namespace) -> dict[str, Any]:
    """What every worker gets: shape, batches, hyper-parameters, threads, device, paths. A side changes some of it."""
    from engine.config.model import ModelConfig

    model = _model(options.model)
    batch = {name: model.pop(name) for name in ("seq_length", "global_batch_size", "micro_batch_size")}
    batch |= {name: getattr(options, name) for name in batch if getattr(options, name) is not None}
    if batch["global_batch_size"] % batch["micro_batch_size"]:
        raise UserError(f"{batch['global_batch_size']} sequences do not divide into micro-batches of "
                        f"{batch['micro_batch_size']}", where="--micro-batch-size", fix="Choose a divisor")
    filled = ModelConfig(**model, seq_length=batch["seq_length"])
    shape = {name: getattr(filled, name) for name in (
        "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size",
        "vocab_size", "tie_embeddings", "rotary_base")}
    steps = 1 + WARMUP_STEPS + options.rounds * options.steps_per_round
    return {"model": options.model, "shape": shape, **batch, "seed": 1234, "lr": 3e-4, "weight_decay": 0.1,
            "clip_grad": 1.0, "threads": options.threads or _cores(), "device": _device(options.device),
            "max_steps": steps, "precision": "fp32", "compile": False, "save_weights": None, "load_weights": None}


def _model(name: str) -> dict[str, Any]:
    """The entry of MODELS; of a configuration file the shape and batches, where the entry does not say otherwise."""
    model = dict(MODELS[name])
    if "config" in model:
        from engine.config import load_yaml

        content = load_yaml(model.pop("config"))
        train = {field: content["train"][field] for field in ("global_batch_size", "micro_batch_size")}
        model = content["model"] | train | model
    return model


def _sides(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, worker module, changes to worker_config) of every side that is asked for."""
    precisions = ("fp32", "bf16") if options.precision == "all" else (options.precision,)
    known = {side for precision in precisions for side in SIDES[precision]}
    wanted = set(options.sides.split(",")) if options.sides else known
    if wanted - known:
        raise UserError(f"no side {sorted(wanted - known)[0]!r} at precision {options.precision}", where="--sides",
                        fix=f"There are: {', '.join(sorted(known))}")
    found = []
    for precision in precisions:
        for side in SIDES[precision]:
            if side not in wanted:
                continue
            if side == "engine":
                found.append((f"{precision} engine", "benchmarks.workers.engine_worker", {"precision": precision}))
            else:
                mode = "fp32" if precision == "fp32" else "pure" if side.endswith("-pure") else "autocast"
                name = f"{precision} transformers {side.removesuffix('-pure')}"
                found.append((name if mode == "fp32" else f"{name} ({mode})", "benchmarks.workers.transformers_worker",
                              {"precision": mode, "compile": side.startswith("compile")}))
    return found


def _write_tokens(path: Path, plan: dict[str, Any]) -> Path:
    """The global batches [step, sequence, token], Zipf-distributed so that there is something to learn."""
    import numpy as np

    rng = np.random.default_rng(plan["seed"])
    vocab_size = plan["shape"]["vocab_size"]
    prob_v = 1.0 / np.arange(1, vocab_size + 1)
    size = (plan["max_steps"], plan["global_batch_size"], plan["seq_length"] + 1)
    np.save(path, rng.choice(vocab_size, size=size, p=prob_v / prob_v.sum()).astype(np.int32))
    return path


def _write_weights(path: Path, plan: dict[str, Any]) -> Path:
    """The initial weights of all sides: Transformers' own, from the seed that its workers use."""
    worker = Worker("initial weights", "benchmarks.workers.transformers_worker",
                    plan | {"save_weights": str(path), "device": "cpu"}, threads=plan["threads"])
    worker.close()
    return path


def _peaks(plan: dict[str, Any]) -> dict[str, float | None]:
    """FLOP/s that MFU refers to, by precision."""
    if plan["device"] == "cuda":
        import torch

        from engine.train.flops import peak_flops

        return {"fp32": None, "bf16": peak_flops(torch.device("cuda"), torch.bfloat16)}
    sizes, repeats = ([64], 2) if plan["model"] == "tiny" else ([1024, 2048], 8)
    worker = Worker("peak", "benchmarks.workers.peak_worker", {"threads": plan["threads"], "sizes": sizes,
                                                              "repeats": repeats}, threads=plan["threads"])
    worker.close()
    return {name: worker.facts[name] for name in ("fp32", "bf16")}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- what came of it -------------------------------------------------------------------------------------------------

def _row(worker: Worker, plan: dict[str, Any], answers: dict[str, list[dict]], first: dict, idle: float,
         peaks: dict[str, float | None]) -> Row:
    """One line of the table. Ratios are with eager and compiled Transformers at the same precision."""
    precision = worker.name.split()[0]
    mine = answers[worker.name]
    tokens = plan["global_batch_size"] * plan["seq_length"]
    rate = statistics.median(len(answer["losses"]) * tokens / answer["seconds"] for answer in mine)
    values: dict[str, Any] = {"tokens/s": rate}
    for kind in ("eager", "compile"):
        other = _reference(answers, precision, kind)
        values[f"x {kind}"] = median_ratio(_seconds(other), _seconds(mine)) if other else None
    peak = peaks[precision]
    steps = sum(len(answer["losses"]) for answer in mine)
    values |= {"CPU s/step": sum(answer["cpu_seconds"] for answer in mine) / steps,
               "MFU %": 100 * rate * _flops_per_token(plan) / peak if peak else None,
               "peak TFLOP/s": peak / 1e12 if peak else None,
               "memory GB": max(answer["memory_gb"] for answer in mine),
               "first loss": first["losses"][0], "last loss": mine[-1]["losses"][-1],
               "start-up s": worker.startup_seconds, "first step s": first["seconds"], "idle CPU %": 100 * idle,
               "M parameters": worker.facts["parameters"] / 1e6}
    return Row(f"{plan['model']} {worker.name}", values, compare="tokens/s")


def _reference(answers: dict[str, list[dict]], precision: str, kind: str) -> list[dict] | None:
    """Transformers' rounds at this precision, in bf16 those under autocast; None where it did not run."""
    names = [name for name in answers if name.startswith(f"{precision} transformers {kind}") and "pure" not in name]
    return answers[names[0]] if names else None


def _seconds(rounds: list[dict]) -> list[float]:
    return [answer["seconds"] for answer in rounds]


def _flops_per_token(plan: dict[str, Any]) -> float:
    from engine.config.model import ModelConfig
    from engine.train.flops import flops_per_token

    return flops_per_token(ModelConfig(**plan["shape"]), plan["seq_length"], plan["shape"]["vocab_size"])
