"""AdamW against torch's, inside and outside Megatron's optimizers; clipping; non-finite gradients."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from engine.train import optimizer as optim
from engine.train.optimizer import AdamW, NonFiniteError

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def tensors(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in ((7, 5), (33,), (1,))]


def test_equals_torch_step_by_step_with_changing_rates():
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in tensors(0)] for _ in range(2))
    optimizers = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(20):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, grad in zip(params, tensors(step + 1), strict=True):
                p.grad = grad * 10.0**-step  # many orders of magnitude
            optimizer.param_groups[0]["lr"] = 3e-3 / (step + 1)
            optimizer.step()
    for a, b, start in zip(ours, theirs, tensors(0), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)


def test_one_step_by_the_formula():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float32))
    p.grad = torch.tensor([0.5])
    AdamW([p], **OPTIONS).step()
    # After one step the bias-corrected moments are g and g²: w (1 - lr·decay) - lr g / (|g| + eps)
    assert p.item() == pytest.approx(2.0 * (1 - 3e-3 * 0.1) - 3e-3, rel=1e-6)


def test_step_is_one_number_of_the_group():
    params = [torch.nn.Parameter(t) for t in tensors(0)]
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], **OPTIONS)
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]  # also where no gradient came
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in params[:2])
    assert params[2] not in optimizer.state


def test_a_parameter_without_gradient_stays():
    params = [torch.nn.Parameter(t) for t in tensors(0)]
    params[0].grad = torch.ones_like(params[0])
    before = params[1].detach().clone()
    AdamW(params, **OPTIONS).step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_training_step_equals_torch_adamw_on_the_clipped_gradients(config, distributed):
    cfg = config(train__clip_grad=0.5, train__weight_decay=0.3, parallel__distributed_optimizer=distributed)
    run = tiny.start(cfg)
    named = dict(tiny.unwrapped(run).named_parameters())
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    t = cfg.train
    reference = torch.optim.AdamW(
        [{"params": [p for p in twins.values() if p.dim() > 1]},
         {"params": [p for p in twins.values() if p.dim() == 1], "weight_decay": 0.0}],
        lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps, weight_decay=t.weight_decay)
    for _ in range(3):
        result = run.step()
        # main_grad is left as it was clipped or not, by the kind of optimizer: scaled to the norm that is known
        grads = {name: p.main_grad.clone() for name, p in named.items()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert result.grad_norm > 0.5
        for name, grad in grads.items():
            twins[name].grad = grad * (0.5 / norm)
        reference.step()
        for name, p in named.items():
            assert torch.allclose(p, twins[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_raise_and_change_nothing(config, precision, distributed, bad):
    run = tiny.start(config(train__precision=precision, parallel__distributed_optimizer=distributed))
    run.step()
    weights, state, progress = tiny.whole_weights(run), tiny.optimizer_state(run), run.state.to_dict()
    hook = tiny.unwrapped(run).decoder.layers[1].mlp.linear_fc1.weight.register_hook(
        lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
    with pytest.raises(NonFiniteError, match=r"gradient norm is (nan|inf)"):
        run.step()
    hook.remove()
    assert run.state.to_dict() == progress
    for name, value in tiny.whole_weights(run).items():
        assert torch.equal(value, weights[name]), name
    tiny.assert_same_state(tiny.optimizer_state(run), state)
    assert math.isfinite(run.step().grad_norm), "a run can go on after it"


def test_a_loss_that_is_not_finite_raises_although_the_gradients_are(config, monkeypatch):
    from engine.model import gpt

    true_loss = gpt.next_token_loss

    def infinite(*args, **kwargs):
        loss, correct = true_loss(*args, **kwargs)
        return loss + math.inf, correct  # its gradient is that of the loss

    run = tiny.start(config())
    before = tiny.whole_weights(run)
    monkeypatch.setattr(gpt, "next_token_loss", infinite)
    with pytest.raises(NonFiniteError, match="loss is inf"):
        run.step()
    for name, value in tiny.whole_weights(run).items():
        assert torch.equal(value, before[name]), name
    assert run.state.step == 0


def test_matrices_decay_and_vectors_do_not(config):
    run = tiny.start(config(model__attention_bias=True))
    run.step()
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    counted = {0.0: 0, run.cfg.train.weight_decay: 0}
    for name, p in tiny.unwrapped(run).named_parameters():
        expected = 0.0 if p.dim() == 1 else run.cfg.train.weight_decay
        assert decay[id(p)] == expected, name
        counted[expected] += 1
    assert all(counted.values())


def test_building_leaves_megatron_choosing_as_before(config):
    from megatron.core import optimizer as megatron_optimizer

    before = getattr(megatron_optimizer, "Adam", None), megatron_optimizer.USING_PYTORCH_OPTIMIZER
    run = tiny.start(config())
    assert (getattr(megatron_optimizer, "Adam", None), megatron_optimizer.USING_PYTORCH_OPTIMIZER) == before
    assert all(isinstance(inner.optimizer, AdamW) for inner in run.optimizer.chained_optimizers)
    assert optim.AdamW is AdamW
