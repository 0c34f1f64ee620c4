"""Before bench_layers measures: the engine's step and the layers called directly are one and the same computation.

Both train in this process from the engine's initial weights, which are also written for the side that is timed.
"""

from __future__ import annotations

from benchmarks.workers.protocol import Step, serve

STEPS = 3
# Norm-wise. Both call the same kernels on the same numbers; only sums outside of them run in another order.
TOLERANCE = 1e-5


def build(config: dict) -> tuple[Step, dict]:
    """``config``: bench_train.worker_config; initial weights go to ``save_weights``. Facts: the largest errors.

    Raises AssertionError where losses, gradients of the first step, or weights after three differ.
    """
    import torch
    from safetensors.torch import save_file

    from benchmarks.workers import direct_worker, engine_worker
    from engine.parallel.wrap import unwrap

    torch.set_num_threads(config["threads"])
    step, wrapped = engine_worker.start(config | {"load_weights": None})
    parameters = dict(unwrap(wrapped[0]).named_parameters())
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    save_file(initial, config["save_weights"])
    direct = direct_worker.Trainer(config, initial)

    def errors(ours: dict, theirs: dict) -> dict:
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        return {name: ((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()).item()
                for name in ours}

    facts = {"loss error": 0.0}
    for index in range(STEPS):
        ours, theirs = float(step(index)), direct.step(index)
        facts["loss error"] = max(facts["loss error"], abs(ours - theirs) / theirs)
        if index == 0:
            gradients = errors({name: p.main_grad for name, p in parameters.items()}, direct.gradients)
    weights = errors(parameters, direct.weights)
    for what, found in (("gradient", gradients), ("weight", weights)):
        worst = max(found, key=lambda name: found[name])
        facts[f"{what} error"] = found[worst]
        assert found[worst] <= TOLERANCE, f"{what} of {worst} is off by {found[worst]:.1e}"
    assert facts["loss error"] <= TOLERANCE, facts
    return (lambda index: 0.0), facts


if __name__ == "__main__":
    serve(build)
