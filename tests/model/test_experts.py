"""A layer's experts in few launches against Megatron's loop over them: values, gradients, hooks, what falls back."""

from __future__ import annotations

from typing import Any

import moe_runs
import pytest
import tiny
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from engine.model import build
from engine.model.experts import Experts
from engine.parallel import topology
from engine_kernels import dispatch

TOKENS = [5, 0, 17, 1]
KERNELS = ["auto", "torch", "triton"]


def built(config, shape: str, **changes) -> Experts:
    """The last layer's experts, drawn so that every gradient is of a size."""
    cfg = config(model__init_std=0.3, **moe_runs.SHAPES[shape], **changes)
    experts = build.model(cfg, topology.build(cfg), tiny.VOCAB)[0].decoder.layers[-1].mlp.experts
    assert isinstance(experts, Experts)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return experts


def passed(forward, experts: Experts, seed: int = 0) -> dict[str, torch.Tensor]:
    """Output and every gradient of one pass of the same rows."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(experts.parameters()).dtype
    x = torch.randn(sum(TOKENS), 32, generator=g).to(dtype).requires_grad_()
    probs = torch.rand(sum(TOKENS), generator=g).requires_grad_()
    y, bias = forward(x, torch.tensor(TOKENS), probs)
    assert bias is None
    names = dict(experts.named_parameters())
    grads = torch.autograd.grad(y, [x, probs, *names.values()], torch.randn(y.shape, generator=g).to(dtype))
    return {"output": y.detach(), **dict(zip(("x", "probs", *names), grads, strict=True))}


def looped(experts: Experts):
    return lambda *inputs: SequentialMLP.forward(experts, *inputs)


def close(found: dict, expected: dict, bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert found[name].dtype == value.dtype
        assert error < bound, (name, error)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", ["mixtral", "gpt_oss"])
def test_equals_the_loop(config, shape, kernels, precision):
    experts = built(config, shape, train__precision=precision, model__kernels=kernels)
    found = passed(experts, experts)
    close(found, passed(looped(experts), experts), 2e-6 if precision == "fp32" else 1.5e-2)
    empty = [name for name in found if name.startswith("local_experts.1.")]
    assert len(empty) == (4 if shape == "gpt_oss" else 2)
    assert not any(found[name].any() for name in empty)


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_rows_at_all(config, kernels):
    experts = built(config, "gpt_oss", model__kernels=kernels)
    y, _ = experts(torch.zeros(0, 32, requires_grad=True), torch.zeros(4, dtype=torch.int64), torch.zeros(0))
    assert y.shape == (0, 32)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_the_kernels_run(config, monkeypatch):
    """What the tests above compare are three implementations, not one."""
    ran = []
    choose = dispatch.choose

    def noted(impl, op, *tensors, **kernels):
        found = choose(impl, op, *tensors, **kernels)
        ran.append((op, found))
        return found
    monkeypatch.setattr(dispatch, "choose", noted)
    for kernels in KERNELS:
        experts = built(config, "mixtral", model__kernels=kernels)
        passed(experts, experts)
        products = {found for op, found in ran if op.startswith(("grouped", "experts"))}
        assert products == {"triton" if kernels == "triton" else "torch"}
        ran.clear()


def test_frozen_experts_get_no_gradient(config):
    experts = built(config, "gpt_oss", model__kernels="triton").requires_grad_(False)
    chosen: Any = experts.local_experts[2]
    chosen.linear_fc2.weight.requires_grad_()
    x = torch.randn(sum(TOKENS), 32, requires_grad=True)
    experts(x, torch.tensor(TOKENS), torch.rand(sum(TOKENS)))[0].sum().backward()
    assert x.grad is not None
    with_gradient = {name for name, p in experts.named_parameters() if p.grad is not None}
    assert with_gradient == {"local_experts.2.linear_fc2.weight"}


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "other class", "other product"])
def test_what_is_not_the_engine_s_own_is_called(config, kind):
    experts = built(config, "mixtral")
    expected = passed(looped(experts), experts)
    expert: Any = experts.local_experts[2]
    layer, seen = expert.linear_fc1, []

    def note(*_inputs):
        seen.append(kind)

    if kind == "forward":
        layer.register_forward_hook(note)
    elif kind == "pre":
        expert.register_forward_pre_hook(note)
    elif kind == "backward":
        layer.register_full_backward_hook(note)
    elif kind == "other product":
        product = layer._forward_impl
        layer._forward_impl = lambda **inputs: note() or product(**inputs)
    else:
        class Adapted(type(layer)):
            def forward(self, x):
                note()
                return super().forward(x)
        layer.__class__ = Adapted
    close(passed(experts, experts), expected, 1e-6)
    assert seen


def test_waits_for_parameters_that_ddp_gathers(config):
    """With overlap_param_gather DDP hangs a hook on every layer that completes its weights before it is called."""
    run = tiny.start(config(parallel__distributed_optimizer=True, parallel__overlap_grad_reduce=True,
                            **moe_runs.SHAPES["mixtral"]))
    waited = []
    for group in run.chunks[0].expert_parallel_bucket_groups:
        finish = group.finish_param_sync
        group.finish_param_sync = lambda *inputs, finish=finish, **more: waited.append(1) or finish(*inputs, **more)
    losses = [run.step().sums.loss for _ in range(2)]
    assert waited, "the experts' weights were never waited for"
    plain = tiny.start(config(**moe_runs.SHAPES["mixtral"]))
    assert losses == [plain.step().sums.loss for _ in range(2)]


@pytest.mark.parametrize(("precision", "overlap"), [("fp32", False), ("bf16", True)])
def test_sums_of_micro_batches(config, precision, overlap):
    """Gradients of two steps of four micro-batches, which Triton's kernels add to main_grad, as the loop's."""
    found = {}
    for kernels in ("torch", "triton"):
        run = tiny.start(config(train__precision=precision, parallel__overlap_grad_reduce=overlap,
                                **moe_runs.SHAPES["gpt_oss"]))
        for layer in tiny.unwrapped(run).decoder.layers:
            assert layer.mlp.experts.config is not layer.config
            layer.mlp.experts.config.kernel_impl = kernels  # the interpreter takes a minute for all the others
        experts = {name: p for name, p in tiny.unwrapped(run).named_parameters() if "local_experts" in name}
        steps = []
        for _ in range(2):
            run.step()
            steps.append({name: p.main_grad.clone() for name, p in experts.items()})
            assert {p.grad_added_to_main_grad for name, p in experts.items() if name.endswith("weight")} == {True}
        found[kernels] = steps
    for mine, theirs in zip(found["triton"], found["torch"], strict=True):
        close(mine, theirs, 1e-4 if precision == "fp32" else 0.05)
        assert all(value.any() for value in mine.values())
