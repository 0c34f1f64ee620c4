"""bench_layers in one process: the engine's step and the layers called directly, compared, then timed in turns."""

from __future__ import annotations

from typing import Any

from benchmarks.workers.protocol import Step, serve

STEPS = 3  # compared, before any is timed
# Norm-wise. Both call the same kernels on the same numbers; only sums outside of them run in another order.
TOLERANCE = 1e-5


def build(config: dict) -> tuple[Step, dict]:
    """``config``: bench_train.worker_config and ``rounds``. Facts: the largest relative errors, and for each side a
    list of a step's processor seconds (all threads) and one of its seconds."""
    import torch

    from benchmarks.workers import engine_worker
    from engine.parallel.wrap import unwrap
    from engine.runtime import keep_freed_memory

    torch.set_num_threads(config["threads"])
    keep_freed_memory()
    step, wrapped = engine_worker.start(config)
    parameters = dict(unwrap(wrapped[0]).named_parameters())
    facts, direct = compare(config, step, parameters)
    return (lambda index: 0.0), facts | in_turns({"engine": step, "direct": direct.step}, STEPS, config["rounds"])


def compare(config: dict, step: Step, parameters: dict) -> tuple[dict[str, float], Any]:
    """Trains both sides for a few steps from the engine's weights. -> largest errors, the direct side.

    Raises AssertionError where losses, the first step's gradients or the last step's weights differ.
    """
    from benchmarks.workers.direct import Trainer

    direct = Trainer(config, {name: p.detach().clone() for name, p in parameters.items()})
    losses, gradients = 0.0, {}
    for index in range(STEPS):
        ours, theirs = float(step(index)), direct.step(index)
        losses = max(losses, abs(ours - theirs) / theirs)
        if index == 0:
            gradients = errors({name: p.main_grad for name, p in parameters.items()}, direct.gradients)
    found = {"gradient": gradients, "weight": errors(parameters, direct.weights), "loss": {"the batch": losses}}
    facts = {}
    for what, by_name in found.items():
        worst = max(by_name, key=lambda name: by_name[name])
        facts[f"{what} error"] = by_name[worst]
        assert by_name[worst] <= TOLERANCE, f"{what} of {worst} is off by {by_name[worst]:.1e}"
    return facts, direct


def errors(ours: dict, theirs: dict) -> dict[str, float]:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return {name: ((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()).item()
            for name in ours}


def in_turns(steps: dict[str, Step], first: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Each side's next step, ``rounds`` times, beginning with another side each time."""
    import time

    found: dict[str, dict[str, list[float]]] = {side: {"cpu_seconds": [], "seconds": []} for side in steps}
    sides = list(steps)
    for index in range(first, first + rounds):
        for side in sides if index % 2 else reversed(sides):
            started, cpu = time.perf_counter(), time.process_time()
            steps[side](index)
            found[side]["seconds"].append(time.perf_counter() - started)
            found[side]["cpu_seconds"].append(time.process_time() - cpu)
    return found


if __name__ == "__main__":
    serve(build)
