"""Overlap of communication and products: on by default on GPUs, and in which order. test_layouts has its values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.model import layers
from engine.model.config import build
from engine.parallel import wrap


def groups_on(device: str, data_parallel: int) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device),
                           pg=SimpleNamespace(dp_cp=SimpleNamespace(size=lambda: data_parallel)))


@pytest.mark.parametrize(("device", "ranks", "changes", "reduce", "gather"), [
    ("cuda", 2, {}, True, False),
    ("cuda", 2, {"parallel__distributed_optimizer": True}, True, True),
    ("cuda", 2, {"parallel__distributed_optimizer": True, "parallel__overlap_grad_reduce": False}, False, False),
    ("cuda", 2, {"train__enable_oom_recovery": True}, False, False),  # ranks vote before they reduce
    ("cuda", 1, {"parallel__distributed_optimizer": True}, False, False),  # nobody to communicate with
    ("cpu", 2, {"parallel__distributed_optimizer": True}, False, False),  # no streams
    ("cpu", 2, {"parallel__distributed_optimizer": True, "parallel__overlap_grad_reduce": True}, True, True),
])
def test_data_parallel_overlap(config, device, ranks, changes, reduce, gather):
    found = wrap.ddp_config(config(**changes), groups_on(device, ranks))
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == (reduce, gather)
    assert not found.align_param_gather


def test_interleaved_stages_overlap_point_to_point(config):
    interleaved = config(model__num_layers=4, parallel__pipeline=2, parallel__virtual_pipeline=2)
    for cfg, overlaps in ((interleaved, True), (config(parallel__pipeline=2), False)):
        found = build(cfg, 300, torch.float32)
        assert (found.overlap_p2p_comm, found.batch_p2p_comm) == (overlaps, not overlaps)
        assert wrap.ddp_config(cfg, groups_on("cuda", 2)).align_param_gather == overlaps


class Recorder:
    """torch.distributed of two ranks that hold the same, and the products: what is called and waited for, in order."""

    def __init__(self, monkeypatch):
        self.events: list[str] = []
        monkeypatch.setattr(layers, "dist", self)
        monkeypatch.setattr(layers, "_gather_along_first_dim", lambda x, group: torch.cat([x, x]))
        for name in ("matmul_nn", "matmul_tn"):
            monkeypatch.setattr(layers, name, self.recorded(name, getattr(layers, name)))

    def recorded(self, name, function):
        def call(*args):
            self.events.append(name)
            return function(*args)

        return call

    def _start(self, name: str) -> SimpleNamespace:
        self.events.append(name)
        return SimpleNamespace(wait=lambda: self.events.append(f"{name} is done"))

    def all_gather_into_tensor(self, out, x, group, async_op):
        assert async_op
        out.copy_(torch.cat([x, x]))
        return self._start("gather")

    def reduce_scatter_tensor(self, out, x, group, async_op):
        assert async_op
        out.copy_(2 * x[: len(out)])
        return self._start("sum")

    def all_reduce(self, x, group, async_op):
        assert async_op
        x.mul_(2)
        return self._start("sum")


@pytest.mark.parametrize(("sequence_parallel", "expected"), [
    (True, ["gather", "matmul_nn", "gather is done", "sum", "matmul_tn", "sum is done"]),
    (False, ["matmul_nn", "sum", "matmul_tn", "sum is done"]),
])
def test_tensor_parallel_communication_runs_beside_products(monkeypatch, sequence_parallel, expected):
    recorder = Recorder(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    x_sbh, weight, bias = (torch.randn(*shape, generator=generator, requires_grad=True)
                           for shape in ((3, 2, 5), (7, 5), (7,)))
    group = SimpleNamespace(size=lambda: 2)
    arguments = (not sequence_parallel, sequence_parallel, group)
    y = layers._ParallelLinear.apply(x_sbh, weight, bias, *arguments)
    grad_y = torch.randn(y.shape, generator=generator)
    if sequence_parallel:
        grad_y[3:] = grad_y[:3]  # both halves of the sequence are this rank's: both get the same gradient
    y.backward(grad_y)
    assert recorder.events == expected
    whole = torch.cat([x_sbh, x_sbh]).detach() if sequence_parallel else x_sbh.detach()
    torch.testing.assert_close(weight.grad, grad_y.flatten(0, 1).T @ whole.flatten(0, 1))
    torch.testing.assert_close(x_sbh.grad, 2 * grad_y[:3] @ weight.detach())
    torch.testing.assert_close(bias.grad, grad_y.sum((0, 1)))
