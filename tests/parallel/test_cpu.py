"""The adaptor for machines without a GPU: what it leaves alone, what it refuses, and its gradient norm."""

from __future__ import annotations

import subprocess
import sys

import megatron.core
import pytest
import torch

from engine.errors import UserError
from engine.parallel import cpu

SNAPSHOT = """
import torch, torch.cuda, json, warnings
warnings.simplefilter("ignore")
places = {"torch": torch, "torch.cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module,
          "torch.nn.functional": torch.nn.functional, "torch.random": torch.random}
import megatron.core.tensor_parallel, megatron.core.optimizer, megatron.core.models.gpt.gpt_model, engine.model.gpt
before = {name: dict(vars(place)) for name, place in places.items()}
from engine.parallel import cpu
cpu.install()
cpu.install()
changed = sorted(f"{name}.{key}" for name, place in places.items() for key, value in vars(place).items()
                 if before[name].get(key) is not value)
print(json.dumps([changed, [m for m in ("torch", "torch.cuda") if __import__("sys").modules[m] is not places[m]],
                  megatron.core.tensor_parallel.layers.torch is torch]))
"""


def test_torch_itself_stays_as_it_was():
    done = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == '[["Module.cuda", "Tensor.cuda"], [], false]'


def test_megatron_sees_the_cpu_where_it_names_cuda():
    cpu.install()
    from megatron.core.tensor_parallel import layers

    assert layers.torch is not torch
    assert layers.torch.empty(2, device="cuda").device.type == "cpu"
    assert layers.torch.zeros(2, device=torch.device("cuda", 0), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.empty(2, device=layers.torch.cuda.current_device()).device.type == "cpu"
    assert layers.torch.float32 is torch.float32
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(2, device="cuda")


def test_refuses_a_version_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    with pytest.raises(UserError, match=r"megatron-core 0\.99\.0 was not tested on CPU.*megatron-core==0\.16\.1"):
        cpu.install()


def test_type_names_are_changed_within_only():
    x = torch.ones(1)
    with cpu.cuda_type_names():
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert x.type(torch.float64).dtype == torch.float64
    assert x.type() == "torch.FloatTensor"


@pytest.mark.parametrize("sizes", [(3_000_000,), (1_000_003, 17, 1)])
def test_gradient_norm_is_exact_on_large_tensors(config, sizes):
    from megatron.core.optimizer import clip_grads

    from engine.parallel import topology

    groups = topology.build(config())
    g = torch.Generator().manual_seed(len(sizes))
    grads = [1e-3 * torch.randn(n, generator=g) + 1e-2 for n in sizes]
    found = clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=groups.pg.mp)
    assert found == pytest.approx(torch.cat(grads).double().norm().item(), rel=1e-6)


def test_clipping_scales_to_the_bound_and_leaves_small_gradients():
    cpu.install()
    from megatron.core.optimizer import optimizer

    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    optimizer.clip_grad_by_total_norm_fp32(params, max_norm=10.0, total_norm=5.0)
    assert params[0].grad.tolist() == [3.0, 0.0, 0.0]
    optimizer.clip_grad_by_total_norm_fp32(params, max_norm=1.0, total_norm=5.0)
    assert torch.stack([params[0].grad, params[1].grad]).norm().item() == pytest.approx(1.0, rel=1e-6)
    assert params[2].grad is None
