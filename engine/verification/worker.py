"""What a rank does: each job's model trained as the drivers train it, and everything to compare written to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.model import build, whole
from engine.parallel import topology, wrap
from engine.train import optimizer, step
from engine.train.state import TrainState
from engine.verification.data import SyntheticData
from engine.verification.jobs import STEPS, Job, vocabulary

CURRENT = "current"  # file: the job that the ranks are at


def run(jobs: Iterable[tuple[str, Job]], folder: Path) -> None:
    """Every job in turn, in this process, a rank of all of them; writes ``folder/<name>/<rank>.pt``."""
    rank = int(os.environ.get("RANK", "0"))
    for name, job in jobs:
        (folder / f"{rank}.{CURRENT}").write_text(name)
        topology.forget()
        with planted(job.plant):
            found = measure(job)
        (folder / name).mkdir(exist_ok=True)
        torch.save(found, folder / name / f"{rank}.pt")
    topology.shutdown()


def planted(plant: str | None) -> contextlib.AbstractContextManager:
    """The context manager that "file.py:function" makes; one that does nothing for None."""
    if plant is None:
        return contextlib.nullcontext()
    path, _, function = plant.rpartition(":")
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None, plant
    assert spec.loader is not None, plant
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)()


def measure(job: Job) -> dict[str, Any]:
    """Three steps of a job on this rank.

    -> ``steps``: loss, tokens, correct, grad_norm and router statistics of each; ``initial``, ``gradients`` (of the
    first step: reduced, normalised, unclipped) and ``weights`` (after the last): this rank's part of each tensor.
    """
    cfg, words = job.cfg, vocabulary(job.cfg)
    groups = topology.build(cfg)
    data = SyntheticData(words, cfg.seed, dp_rank=groups.data_parallel_rank, dp_size=groups.data_parallel_size,
                         packed=job.packed)
    chunks = wrap.apply(build.model(cfg, groups, words), cfg, groups)
    update = optimizer.build(chunks, cfg, groups)
    step.prepare(chunks, cfg, groups)
    found: dict[str, Any] = {"initial": _parts(chunks), "steps": []}
    _keep_gradients(chunks, found)
    state = TrainState()
    for _ in range(STEPS):
        result = step.run(cfg, chunks, update, data, groups, state)
        found["steps"].append({
            "loss": result.sums.loss, "tokens": result.sums.tokens, "correct": result.sums.correct,
            "grad_norm": result.grad_norm, "router": router_statistics(result.sums)})
    wrap.gather_parameters(chunks)
    found["weights"] = _parts(chunks, buffers=True)
    return found


def _keep_gradients(chunks: list[Any], found: dict[str, Any]) -> None:
    """Has the first step leave its gradients in ``found``, between their reduction and the update."""
    settings = chunks[0].config
    finalize = settings.finalize_model_grads_func

    def finalize_and_keep(*args, **kwargs):
        finalize(*args, **kwargs)
        if "gradients" not in found:
            wrap.gather_gradients(chunks)
            found["gradients"] = _parts(chunks, lambda p: p.main_grad)

    settings.finalize_model_grads_func = finalize_and_keep


Part = tuple[tuple[int, int, int, int], torch.Tensor]  # the fields of ``whole.Split``; the values


def _parts(chunks: list[Any], value=lambda p: p, *, buffers: bool = False) -> dict[str, Part]:
    """This rank's part of every parameter by its name in the unsplit model; ``buffers``: the routers' biases too."""
    found = {name: (dataclasses.astuple(split), values) for name, (split, values) in whole.parts(chunks, value).items()}
    if buffers:
        for chunk in chunks:
            bare = wrap.unwrap(chunk)
            for layer in bare.decoder.layers:
                bias_e = getattr(getattr(layer.mlp, "router", None), "expert_bias", None)
                if bias_e is not None:
                    name = f"decoder.layers.{layer.layer_number - 1}.mlp.router.expert_bias"
                    found[name] = (dataclasses.astuple(whole.Split()), bias_e.detach().clone())
    return found


def router_statistics(sums: Any) -> dict[str, Any] | None:
    """The routers' statistics of a global batch as plain numbers and lists; None for a dense model."""
    router = getattr(sums, "router", None)
    if router is None:
        return None
    plain = {f.name: getattr(router, f.name) for f in dataclasses.fields(router)}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
