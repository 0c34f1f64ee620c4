"""Muon through the engine's real step against torch's Muon and AdamW, block by block; which parameter goes where."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from engine.config.presets import PRESETS
from engine.train import muon, muon_matrices, ownership
from engine.train.optimizer import NonFiniteError

MUON = {"train__optimizer": "muon"}


def blocks(name: str, weight: torch.Tensor, m) -> list[torch.Tensor]:
    """The matrices of a weight by the definition: q, k and v of each group, gate and up, or the weight itself."""
    if name.endswith("linear_fc1.weight"):
        return [weight[: weight.shape[0] // 2], weight[weight.shape[0] // 2 :]]
    if not name.endswith("linear_qkv.weight"):
        return [weight]
    d, found = m.head_dim, []
    queries = m.num_attention_heads // m.num_query_groups * d
    for i in range(m.num_query_groups):
        start = i * (queries + 2 * d)
        found += [weight[start : start + queries], weight[start + queries : start + queries + d],
                  weight[start + queries + d : start + queries + 2 * d]]
    return found


def is_hidden(name: str) -> bool:
    return name.endswith(("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"))


class Twin:
    """The same model's parameters under torch.optim.Muon, one parameter a block, and torch.optim.AdamW."""

    def __init__(self, run: tiny.Run):
        t, m = run.cfg.train, run.cfg.model
        self.named = dict(tiny.unwrapped(run).named_parameters())
        weights = {name: p.detach().float() for name, p in self.named.items()}
        self.matrices = {name: [torch.nn.Parameter(block.clone()) for block in blocks(name, w, m)]
                         for name, w in weights.items() if is_hidden(name)}
        self.rest = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items() if not is_hidden(name)}
        self.model = m
        self.muon = torch.optim.Muon(
            [block for found in self.matrices.values() for block in found], lr=t.lr, weight_decay=t.weight_decay,
            momentum=t.muon.momentum, nesterov=t.muon.nesterov, ns_steps=t.muon.ns_steps,
            adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(
            [{"params": [p for p in self.rest.values() if p.dim() > 1]},
             {"params": [p for p in self.rest.values() if p.dim() == 1], "weight_decay": 0.0}],
            lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps, weight_decay=t.weight_decay)

    def step(self, clip: float, grad_norm: float) -> None:
        """With the gradients that the run had. Only its owned ones were clipped, which on one rank are all."""
        grads = {name: p.main_grad for name, p in self.named.items()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
        assert norm == pytest.approx(min(grad_norm, clip), rel=1e-5)
        for name, found in self.matrices.items():
            for block, grad in zip(found, blocks(name, grads[name], self.model), strict=True):
                block.grad = grad.clone()
        for name, p in self.rest.items():
            p.grad = grads[name].clone()
        self.muon.step()
        self.adamw.step()

    def weights(self, name: str) -> torch.Tensor:
        return torch.cat(list[torch.Tensor](self.matrices[name])) if name in self.matrices else self.rest[name]


@pytest.mark.parametrize("changes", [
    {},
    {"train__weight_decay": 0.0, "train__muon": {"nesterov": False, "momentum": 0.5}},
    {"model__num_query_groups": 1, "model__head_dim": 10, "model__attention_bias": True, "train__weight_decay": 0.5},
    {"model__ffn_hidden_size": 20, "model__tie_embeddings": False, "train__muon": {"ns_steps": 2}},
    {"train__precision": "bf16"},
], ids=["default", "plain_momentum", "one_group", "narrow", "bf16_weights"])
def test_steps_equal_torch_muon_and_adamw_block_by_block(config, changes):
    bf16 = {"train__muon": {"ns_precision": "bf16"} | changes.get("train__muon", {})}  # torch knows no other
    run = tiny.start(config(**MUON | {"train__clip_grad": 0.5} | changes | bf16))
    twin = Twin(run)
    start = {name: p.detach().clone() for name, p in twin.named.items()}
    for _ in range(4):
        twin.step(0.5, run.step().grad_norm)
    for name, p in twin.named.items():
        held = getattr(p, "main_param", p)  # the fp32 weights
        assert torch.allclose(held, twin.weights(name), rtol=2e-6, atol=1e-7), name
        assert not torch.equal(p, start[name]), name


def test_fp32_steps_equal_the_formula_in_float64(config):
    run = tiny.start(config(**MUON, train__clip_grad=0.0))
    t, model = run.cfg.train, run.cfg.model
    named = {name: p for name, p in tiny.unwrapped(run).named_parameters() if is_hidden(name)}
    weights = {name: [b.detach().double().clone() for b in blocks(name, p, model)] for name, p in named.items()}
    means = {name: [torch.zeros_like(b) for b in found] for name, found in weights.items()}
    for _ in range(3):
        run.step()
        for name, p in named.items():
            grads = blocks(name, p.main_grad.double(), model)
            for w, mean, grad in zip(weights[name], means[name], grads, strict=True):
                mean.mul_(0.95).add_(grad, alpha=0.05)
                direction = 0.05 * grad + 0.95 * mean
                u, s, vh = torch.linalg.svd(direction, full_matrices=False)
                s = s / s.norm()
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                w.mul_(1 - t.lr * t.weight_decay).sub_(u * s @ vh, alpha=t.lr * 0.2 * math.sqrt(max(w.shape)))
    for name, p in named.items():
        expected = torch.cat(weights[name])
        error = (p.double() - expected).norm() / expected.norm()
        assert error < 1e-6, (name, error)


def test_owners_state_is_what_checkpoints_read(config):
    run = tiny.start(config(**MUON, train__precision="bf16"))
    run.step()
    inner = run.optimizer.chained_optimizers[0].optimizer
    for name, p in tiny.unwrapped(run).named_parameters():
        state = inner.state_of(p.main_param)
        assert set(state) == ({"momentum"} if is_hidden(name) else {"exp_avg", "exp_avg_sq"}), name
        assert all(v.shape == p.shape and v.dtype == torch.float32 for v in state.values()), name
        assert run.optimizer.owner(p) == inner.owner(p.main_param) == 0
    assert [group.get("step") for group in run.optimizer.param_groups] == [None, 1, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_norm_is_adamw_s(config, precision):
    changes = {"train__precision": precision, "model__tie_embeddings": False}
    norms = [tiny.start(config(train__optimizer=name, **changes)).step().grad_norm for name in ("adamw", "muon")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_raise_and_change_nothing(config, precision, bad):
    run = tiny.start(config(**MUON, train__precision=precision))
    run.step()
    weights, state = tiny.whole_weights(run), tiny.optimizer_state(run)
    hook = tiny.unwrapped(run).decoder.layers[1].mlp.linear_fc1.weight.register_hook(
        lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
    with pytest.raises(NonFiniteError, match=r"gradient norm is (nan|inf)"):
        run.step()
    hook.remove()
    for name, value in tiny.whole_weights(run).items():
        assert torch.equal(value, weights[name]), name
    tiny.assert_same_state(tiny.optimizer_state(run), state)
    assert math.isfinite(run.step().grad_norm), "a run can go on after it"


def test_an_fp16_overflow_skips_the_update_and_lowers_the_scale(config, monkeypatch):
    from engine.model import build

    monkeypatch.setattr(build.model_config, "resolve_precision", lambda precision, device: torch.float16)
    run = tiny.start(config(**MUON))
    exact = run.step()
    assert exact.stepped
    run.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(2.0**40)
    before = {name: p.detach().clone() for name, p in tiny.unwrapped(run).named_parameters()}
    assert [run.step().stepped for _ in range(2)] == [False, False]  # hysteresis: the second lowers it
    assert run.optimizer.get_loss_scale().item() == 2.0**39
    for name, p in tiny.unwrapped(run).named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_s_hidden_matrices_go_to_muon_and_nothing_else(config, preset):
    """Of the preset's kind, but small."""
    small = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8,
             "ffn_hidden_size": 48, "seq_length": 16, "vocab_size": tiny.VOCAB}
    if "moe" in PRESETS[preset]:
        small["moe"] = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}
        if not PRESETS[preset].get("linear_bias"):
            small["moe"]["shared_ffn_hidden_size"] = 40
    cfg = config(**MUON, model={"preset": preset} | small)
    run = tiny.start(cfg)
    inner = run.optimizer.chained_optimizers[0].optimizer
    counted = {True: 0, False: 0}
    for name, p in tiny.unwrapped(run).named_parameters():
        assert set(inner.state_of(p)) == ({"momentum"} if is_hidden(name) else {"exp_avg", "exp_avg_sq"}), name
        counted[is_hidden(name)] += 1
        assert is_hidden(name) or p.dim() == 1 or name.endswith((
            "word_embeddings.weight", "output_layer.weight", "router.weight")), name
    assert counted[True] >= 8
    assert counted[False] >= 5


def test_an_unknown_matrix_is_not_put_anywhere(config):
    run = tiny.start(config())
    bare = tiny.unwrapped(run)
    with pytest.raises(AssertionError, match=r"neither Muon nor AdamW is meant for decoder\.new\.weight"):
        muon_matrices.of("decoder.new.weight", torch.empty(4, 4), bare.config, bare.pg_collection, steps=5, size=2)


def test_owners_have_about_equal_work_and_every_parameter_one():
    costs = [100.0, 1.0, 50.0, 30.0, 30.0, 20.0, 20.0, 20.0, 20.0, 2.0, 3.0, 4.0]
    shares = ownership.balance(costs, 3)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) == 100.0  # no more than the costliest alone
    assert ownership.balance([5.0, 5.0], 4) == [[0], [1], [], []]


def test_buckets_hold_one_dtype_and_no_more_than_their_limit(monkeypatch):
    monkeypatch.setattr(ownership, "BUCKET", 64)
    params = [torch.empty(n, dtype=dtype) for n, dtype in (
        (8, torch.float32), (8, torch.bfloat16), (8, torch.float32), (1, torch.float32), (40, torch.float32))]
    found = ownership._buckets(params)
    assert [[p.numel() for p in bucket] for bucket in found] == [[8], [8, 8], [1], [40]]
    assert all(len({p.dtype for p in bucket}) == 1 for bucket in found)
    assert ownership._buckets([]) == []


def test_batches_hold_equal_shapes_and_no_more_than_their_limit(monkeypatch):
    monkeypatch.setattr(muon, "BATCH", 100)
    shapes = [(4, 6)] * 5 + [(30, 30)] * 2 + [(6, 4)]
    params = [torch.empty(shape) for shape in shapes]
    found = list(muon._batches(params, [muon_matrices.Matrices("local", 1, 1, (shape,)) for shape in shapes]))
    assert [len(batch) for _, batch in found] == [4, 1, 1, 1, 1]
    assert all(cut.shapes == (tuple(p.shape),) for cut, batch in found for p in batch)


def test_muon_learns_faster_than_adamw_each_at_its_better_rate(config):
    """60 steps on the tiny corpus: 0.81 against 1.05 when this was written."""
    best = {}
    for name in ("adamw", "muon"):
        for lr in (3e-3, 1e-2):
            run = tiny.start(config(train__optimizer=name, train__lr=lr, train__global_batch_size=16,
                                    train__micro_batch_size=16, model__hidden_size=64, model__ffn_hidden_size=128))
            losses = [run.step().sums.loss for _ in range(60)]
            best[name] = min(best.get(name, math.inf), sum(losses[-10:]) / 10)
    assert best["muon"] < best["adamw"] - 0.1, best
