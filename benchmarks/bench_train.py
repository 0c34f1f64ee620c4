"""The training step of the engine beside Transformers' and stock megatron-core's: same model, weights and tokens.

Each side is a process that is idle unless it is its turn; rounds of a few steps go round among them, so that the
machine's noise hits all alike. A ratio is the median of the rounds' own ratios.

Sides, at each precision: ``engine``; ``eager`` and ``compile`` (torch.compile) are Transformers. In bf16 these two keep
fp32 weights and run under autocast, as Trainer's bf16=True does, and as the engine keeps fp32 master weights.
``eager-pure`` and ``compile-pure`` hold weights and optimizer state in bf16, which is faster and loses small updates.
Only where they are named: ``liger`` and ``liger-pure``, Transformers with Liger's kernels under torch.compile;
``mcore``, megatron-core as it comes (benchmarks/workers/megatron_worker.py). Precision fp8 has ``engine`` and, where
Transformer Engine is installed, ``mcore``; its ``x bf16`` is over the engine's bf16.

All sides stay in memory at once, which large models on a GPU do not allow: ``--one-at-a-time`` measures a side after
the other, and then ``engine x`` is the engine's rate over that side's. A side that fails is a row that says why; if it
is the engine, the run fails. Models of more than half a billion parameters begin with weights of their own on a GPU
(``--weights``): it takes minutes to write shared ones.

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
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, median_ratio
from benchmarks.workers.protocol import Worker, WorkerError, interleave
from engine.errors import UserError

SIDES = {"fp32": ("engine", "eager", "compile", "mcore"),
         "bf16": ("engine", "eager", "compile", "eager-pure", "compile-pure", "liger", "liger-pure", "mcore"),
         "fp8": ("engine", "mcore")}
ON_REQUEST = {"liger", "liger-pure", "mcore"}
WARMUP_STEPS = 2  # after the first one, which is timed by itself

# seq_length, global_batch_size and micro_batch_size are defaults of the options of those names. "engine": what only the
# engine's configuration gets, by section; a row's note says so.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64,
             "vocab_size": 128, "seq_length": 16, "global_batch_size": 4, "micro_batch_size": 2},
    "demo": {"config": ROOT / "configs/pretrain/demo_cpu.yaml", "vocab_size": 4096},  # the rest is in that file
    "125m": {"preset": "large", "vocab_size": 50304, "seq_length": 1024, "global_batch_size": 64,
             "micro_batch_size": 16},
    "1b": {"preset": "1b", "vocab_size": 50304, "seq_length": 4096, "global_batch_size": 16, "micro_batch_size": 4},
    "3b": {"preset": "3b", "vocab_size": 50304, "seq_length": 4096, "global_batch_size": 8, "micro_batch_size": 2},
    # fp32 masters, moments and gradients beside bf16 weights would be 145 GB: what the engine's section says takes 96.
    "8b": {"preset": "8b", "seq_length": 4096, "global_batch_size": 8, "micro_batch_size": 1, "vocab_size": 128256,
           "engine": {"train": {"adamw": {"moments": "bf16", "master": "remainder"}}}},
}


@dataclass(frozen=True)
class Side:
    """One of those that are compared: its worker, and what it changes of ``worker_config``."""

    name: str
    kind: str
    precision: str
    module: str
    changes: dict[str, Any]

    @property
    def missing(self) -> str:
        """Why it cannot start; known before it takes the time."""
        needs = {"liger": "liger_kernel", "liger-pure": "liger_kernel"}.get(self.kind, "")
        if self.kind == "mcore" and self.precision == "fp8":
            needs = "transformer_engine"
        return f"{needs} is not installed" if needs and importlib.util.find_spec(needs) is None else ""


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--precision", default="all", help="one or more of fp32,bf16,fp8; all: fp32,bf16, in one "
                        "interleaved run")
    parser.add_argument("--sides", help="some of engine,eager,compile,eager-pure,compile-pure (all of these that apply)"
                        f" and {','.join(sorted(ON_REQUEST))}")
    parser.add_argument("--one-at-a-time", action="store_true", help="a side after the other, not interleaved")
    parser.add_argument("--weights", choices=["auto", "shared", "own"], default="auto", help="whether all sides begin "
                        "with the same weights")
    parser.add_argument("--side-seconds", type=float, default=None, help="after which a side's start, first step or "
                        "round is given up")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-round", type=int, default=3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in ("seq-length", "global-batch-size", "micro-batch-size"):
        parser.add_argument(f"--{name}", type=int, default=None, help="the model's own")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Trains all sides and yields a row for each. Raises UserError at once for options that do not go together."""
    plan, sides = worker_config(options), _sides(options)
    return _one_at_a_time(options, plan, sides) if options.one_at_a_time else _together(options, plan, sides)


def _together(options: argparse.Namespace, plan: dict[str, Any], sides: Sequence[Side]) -> Iterator[Row]:
    with _prepared(plan) as peaks, contextlib.ExitStack() as stack:
        workers, first_steps = [], {}
        for side in sides:  # one after the other: start-up is measured too
            try:
                worker, first_steps[side.name] = _start(side, plan, options.side_seconds, stack)
            except WorkerError as error:
                yield _failed(side, plan, error)
            else:
                workers.append(worker)
        if not workers:
            return
        answers, idle = interleave(workers, options.rounds, options.steps_per_round)
    for worker in workers:
        yield _row(worker, plan, answers, first_steps[worker.name], idle[worker.name], peaks)


def _one_at_a_time(options: argparse.Namespace, plan: dict[str, Any], sides: Sequence[Side]) -> Iterator[Row]:
    answers: dict[str, list[dict]] = {}
    with _prepared(plan) as peaks:
        for side in sides:
            with contextlib.ExitStack() as stack:
                try:
                    worker, first = _start(side, plan, options.side_seconds, stack)
                    answers[side.name] = [worker.run(options.steps_per_round, options.side_seconds)
                                          for _ in range(options.rounds)]
                except WorkerError as error:
                    yield _failed(side, plan, error)
                    continue
            row = _row(worker, plan, answers, first, 0.0, peaks)
            if (engine := answers.get(f"{side.precision} engine")) and side.kind != "engine":
                row.values["engine x"] = median_ratio(_seconds(answers[side.name]), _seconds(engine))
            print(f"{row.name}: {row.values['tokens/s']:,.0f} tokens/s, {row.values['memory GB']:.1f} GB", flush=True)
            yield row


@contextlib.contextmanager
def _prepared(plan: dict[str, Any]) -> Iterator[dict[str, float | None]]:
    """Writes tokens and weights for the workers. -> the peaks of MFU."""
    with tempfile.TemporaryDirectory(prefix="bench_train_") as folder:
        plan["tokens"] = str(_write_tokens(Path(folder) / "tokens.npy", plan))
        if plan["weights"] == "shared":
            plan["load_weights"] = str(_write_weights(Path(folder) / "weights.safetensors", plan))
        yield _peaks(plan)


def _start(side: Side, plan: dict[str, Any], seconds: float | None, stack: contextlib.ExitStack
           ) -> tuple[Worker, dict]:
    """A worker that has warmed up, and what its first step said."""
    if side.missing:
        raise WorkerError(side.missing)
    worker = Worker(side.name, side.module, plan | side.changes, threads=plan["threads"], seconds=seconds)
    stack.callback(worker.close)
    first = worker.run(1, seconds)
    worker.run(WARMUP_STEPS, seconds)
    worker.reset_memory()
    return worker, first


def _failed(side: Side, plan: dict[str, Any], error: WorkerError) -> Row:
    """The last line of what the worker said is the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(dict.fromkeys([lines[0], lines[-1]]))[:600]
    print(f"{side.name}: {reason}", flush=True)
    return Row(f"{plan['model']} {side.name}", {"note": reason},
               failed=str(error)[-3000:] if side.kind == "engine" else "")


# --- what is run -----------------------------------------------------------------------------------------------------

def worker_config(options: argparse.Namespace) -> dict[str, Any]:
    """What every worker gets: shape, batches, hyper-parameters, threads, device, paths. A side changes some of it."""
    from engine.config import parameters
    from engine.config.model import ModelConfig

    model = _model(options.model)
    engine = model.pop("engine", {})
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
    count, device = parameters.count(filled), _device(options.device)
    own = options.weights == "own" or (options.weights == "auto" and device == "cuda" and count > 5e8)
    return {"model": options.model, "parameters": count, "weights": "own" if own else "shared", "engine": engine,
            "shape": shape, **batch, "seed": 1234, "lr": 3e-4, "weight_decay": 0.1,
            "clip_grad": 1.0, "threads": options.threads or _cores(), "device": device,
            "max_steps": steps, "precision": "fp32", "compile": False, "liger": False, "save_weights": None,
            "load_weights": None}


def _model(name: str) -> dict[str, Any]:
    """The entry of MODELS; of a configuration file the shape and batches, where the entry does not say otherwise."""
    model = dict(MODELS[name])
    if "config" in model:
        from engine.config import load_yaml

        content = load_yaml(model.pop("config"))
        train = {field: content["train"][field] for field in ("global_batch_size", "micro_batch_size")}
        model = content["model"] | train | model
    return model


def _sides(options: argparse.Namespace) -> list[Side]:
    """Every side that is asked for."""
    precisions = ("fp32", "bf16") if options.precision == "all" else tuple(options.precision.split(","))
    if unknown := set(precisions) - set(SIDES):
        raise UserError(f"no precision {sorted(unknown)[0]!r}", where="--precision",
                        fix=f"There are: {', '.join(SIDES)}, and all for fp32,bf16")
    known = {side for precision in precisions for side in SIDES[precision]}
    wanted = set(options.sides.split(",")) if options.sides else known - ON_REQUEST
    if wanted - known:
        raise UserError(f"no side {sorted(wanted - known)[0]!r} at precision {options.precision}", where="--sides",
                        fix=f"There are: {', '.join(sorted(known))}")
    sides = [_side(precision, kind) for precision in precisions for kind in SIDES[precision] if kind in wanted]
    return sorted(sides, key=lambda side: side.kind != "engine")  # if time is short, ours is measured


def _side(precision: str, kind: str) -> Side:
    if kind == "engine":
        return Side(f"{precision} engine", kind, precision, "benchmarks.workers.engine_worker",
                    {"precision": precision})
    if kind == "mcore":
        return Side(f"{precision} megatron-core", kind, precision, "benchmarks.workers.megatron_worker",
                    {"precision": precision})
    mode = "fp32" if precision == "fp32" else "pure" if kind.endswith("-pure") else "autocast"
    plain = kind.removesuffix("-pure")
    name = f"{precision} transformers+liger compile" if plain == "liger" else f"{precision} transformers {plain}"
    return Side(name if mode == "fp32" else f"{name} ({mode})", kind, precision,
                "benchmarks.workers.transformers_worker",
                {"precision": mode, "compile": plain != "eager", "liger": plain == "liger"})


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

        bf16 = peak_flops(torch.device("cuda"), torch.bfloat16)
        return {"fp32": None, "bf16": bf16, "fp8": bf16}  # over the same peak, so that the two compare
    sizes, repeats = ([64], 2) if plan["model"] == "tiny" else ([1024, 2048], 8)
    worker = Worker("peak", "benchmarks.workers.peak_worker", {"threads": plan["threads"], "sizes": sizes,
                                                              "repeats": repeats}, threads=plan["threads"])
    worker.close()
    return {"fp32": worker.facts["fp32"], "bf16": worker.facts["bf16"], "fp8": worker.facts["bf16"]}


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
    for column, name in (("x mcore", f"{precision} megatron-core"), ("x bf16", "bf16 engine"),
                         ("x liger", f"{precision} transformers+liger compile (autocast)")):
        if name in answers and name != worker.name and (column != "x bf16" or worker.name == "fp8 engine"):
            values[column] = median_ratio(_seconds(answers[name]), _seconds(mine))
    peak = peaks[precision]
    steps = sum(len(answer["losses"]) for answer in mine)
    values |= {"CPU s/step": sum(answer["cpu_seconds"] for answer in mine) / steps,
               "MFU %": 100 * rate * _flops_per_token(plan) / peak if peak else None,
               "peak TFLOP/s": peak / 1e12 if peak else None,
               "memory GB": max(answer["memory_gb"] for answer in mine),
               "first loss": first["losses"][0], "last loss": mine[-1]["losses"][-1],
               "start-up s": worker.startup_seconds, "first step s": first["seconds"], "idle CPU %": 100 * idle,
               "M parameters": worker.facts["parameters"] / 1e6}
    if note := worker.facts.get("note"):
        values["note"] = note
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
