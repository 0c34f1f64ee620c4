"""The router against plain float64 formulas, and what a model with experts does on one rank."""

from __future__ import annotations

import moe_runs
import pytest
import tiny
import torch

from engine.config import parameter_count
from engine.evaluation.generation import Sampling, generate
from engine.evaluation.perplexity import evaluate
from engine.model import build, forward, moe
from engine.parallel import topology

EXPERTS, TOP_K, SEQUENCES, LENGTH = 6, 3, 2, 10
AUX, Z, SUPERVISED = 0.3, 0.05, 70
ROUTERS = {
    "softmax_after_topk": {},
    "softmax_before_topk": {"scaling_factor": 1.5},
    "sigmoid": {"scaling_factor": 2.5, "expert_bias": True},
}


def built(config, **changes):
    cfg = config(**changes)
    return build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]


def plain(x_sbh, weight_eh, bias_e, choice_bias_e, kind: str, scale: float):
    """Weights [t, e], the sum over sequences of the balance loss, the sum of squared log-sums; token by token."""
    weights, shares, chosen_sb = [], [], []
    z_loss = aux_loss = torch.zeros((), dtype=torch.float64)
    for x_h in x_sbh.flatten(0, 1):
        logits = weight_eh @ x_h + bias_e
        z_loss = z_loss + torch.log(torch.exp(logits).sum()) ** 2
        scores = 1 / (1 + torch.exp(-logits)) if kind == "sigmoid" else torch.exp(logits) / torch.exp(logits).sum()
        order = sorted(range(EXPERTS), key=lambda e: -(scores[e] + choice_bias_e[e]).item())[:TOP_K]
        total = 1.0 if kind == "softmax_before_topk" else sum(scores[e] for e in order)
        weights.append(torch.stack([scores[e] / total * scale if e in order else 0 * scores[e]
                                    for e in range(EXPERTS)]))
        shares.append(scores / scores.sum())
        chosen_sb.append(sorted(range(EXPERTS), key=lambda e: -scores[e].item())[:TOP_K])
    for sequence in range(x_sbh.shape[1]):
        places = range(sequence, len(shares), x_sbh.shape[1])
        for e in range(EXPERTS):
            f = sum(e in chosen_sb[i] for i in places) / (len(places) * TOP_K)
            aux_loss = aux_loss + EXPERTS * f * sum(shares[i][e] for i in places) / len(places)
    return torch.stack(weights), aux_loss, z_loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_router_equals_the_formula(config, kind, precision):
    shape = {"num_experts": EXPERTS, "top_k": TOP_K, "router": kind, "aux_loss_coeff": AUX, "z_loss_coeff": Z}
    model = built(config, train__precision=precision, model__linear_bias=True, model__moe=shape | ROUTERS[kind])
    dtype = next(model.parameters()).dtype
    (_, router), *_ = moe.routers([model])
    g = torch.Generator().manual_seed(1)
    x_sbh = torch.randn(LENGTH, SEQUENCES, 32, generator=g).to(dtype).requires_grad_()
    with torch.no_grad():
        router.weight.copy_(0.3 * torch.randn(router.weight.shape, generator=g))
        assert router.bias is not None
        router.bias.copy_(torch.randn(EXPERTS, generator=g))
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.tensor([0.2, -0.3, 0.0, 0.1, 0.4, -0.1]))
    moe.prepare([model], supervised=SUPERVISED, sequences=SEQUENCES, tokens=SEQUENCES * LENGTH)
    probs_te, chosen_te = router.train()(x_sbh)
    direction_te = torch.randn(probs_te.shape, generator=g)
    (probs_te * direction_te).sum().backward()

    inputs = [t.detach().double().requires_grad_() for t in (x_sbh, router.weight, router.bias)]
    choice_bias = torch.zeros(EXPERTS) if router.expert_bias is None else router.expert_bias
    scale = ROUTERS[kind].get("scaling_factor", 1.0)
    expected_te, aux_loss, z_loss = plain(inputs[0], inputs[1], inputs[2], choice_bias, kind, scale)
    objective = (expected_te * direction_te.double()).sum()
    objective = objective + SUPERVISED * (AUX * aux_loss / SEQUENCES + Z * z_loss / (SEQUENCES * LENGTH))
    objective.backward()

    assert probs_te.dtype == torch.float32
    assert torch.equal(chosen_te, expected_te > 0)
    assert torch.allclose(probs_te.double(), expected_te, rtol=1e-5, atol=1e-6)
    assert torch.equal(router.counted_e, chosen_te.sum(0))
    assert torch.allclose(router.losses, torch.stack([aux_loss, z_loss]), rtol=1e-5)
    for found, wanted in zip((x_sbh, router.weight, router.bias), inputs, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        error = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < (1e-5 if precision == "fp32" else 4e-3)  # bf16: one rounding of each gradient


@pytest.mark.parametrize("shape", ["mixtral", "deepseek", "switch"])
def test_nothing_depends_on_the_micro_batch_size(config, shape):
    expected = None
    for micro in (1, 2, 4, 8):
        found = moe_runs.three_steps(config(train__global_batch_size=8, train__micro_batch_size=micro,
                                            train__eps=1e-5, **moe_runs.SHAPES[shape]))
        expected = expected or found
        assert torch.equal(found["counts"], expected["counts"])
        assert not moe_runs.differences(found, expected, 1e-5), micro


def test_losses_are_part_of_the_objective(config):
    """Each coefficient by itself changes the router's gradient, and only ``train/loss`` leaves both out."""
    shape = {"num_experts": 4, "top_k": 2, "aux_loss_coeff": 0.0}
    found = {name: moe_runs.three_steps(config(model__moe=shape | losses)) for name, losses in
             {"none": {}, "aux": {"aux_loss_coeff": 1.0}, "z": {"z_loss_coeff": 1.0}}.items()}
    router = "decoder.layers.1.mlp.router.weight"
    for name in ("aux", "z"):
        assert found[name]["losses"][0] == found["none"]["losses"][0]
        difference = found[name]["gradients"][router] - found["none"]["gradients"][router]
        assert difference.norm() > 0.05 * found["none"]["gradients"][router].norm(), name
    assert torch.equal(found["aux"]["router"][0], found["none"]["router"][0])


@pytest.mark.parametrize("shape", ["deepseek", "gpt_oss"])
def test_recomputation_counts_once(config, shape):
    results = {mode: moe_runs.three_steps(config(train__recompute=mode, **moe_runs.SHAPES[shape]))
               for mode in ("none", "selective", "full")}
    top_k = moe_runs.SHAPES[shape]["model__moe"]["top_k"]
    assert torch.all(results["full"]["counts"].sum(-1) == 4 * tiny.SEQ * top_k)
    for mode in ("selective", "full"):
        assert torch.equal(results[mode]["counts"], results["none"]["counts"])
        assert torch.equal(results[mode]["router"], results["none"]["router"])
        for kind in ("gradients", "weights"):
            for name, value in results[mode][kind].items():
                assert torch.equal(value, results["none"][kind][name]), (mode, kind, name)


def test_the_losses_are_scaled_with_the_loss(config):
    """As fp16 needs: a scale of 2^10 on the loss is one of 2^10 on every gradient."""
    def gradients(scale: float) -> dict[str, torch.Tensor]:
        run = tiny.start(config(**moe_runs.SHAPES["mixtral"]))
        settings = run.chunks[0].config
        settings.grad_scale_func = None if scale == 1 else lambda loss: loss * scale
        batches = run.data.micro_batches(0, global_batch_size=4, micro_batch_size=1, seq_length=tiny.SEQ)
        forward.run(run.chunks, batches, run.groups, num_micro_batches=4, micro_batch_size=1, seq_length=tiny.SEQ,
                    forward_only=False)
        return tiny.whole_weights(run, lambda p: p.main_grad)

    plain_gradients, scaled = gradients(1), gradients(1024)
    for name, value in plain_gradients.items():
        assert value.norm() > 0, name
        assert torch.equal(scaled[name], value * 1024), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bias_follows_the_counts(config, precision):
    run = tiny.start(config(train__precision=precision, **moe_runs.SHAPES["deepseek"]))
    (_, router), *_ = moe.routers(run.chunks)
    expected_e = torch.zeros(4)
    for _ in range(3):
        counts_e = run.step().sums.router.tokens_per_expert_le[0].float()
        expected_e += 0.05 * torch.sign(counts_e.mean() - counts_e)
        assert router.expert_bias is not None
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, expected_e)
    assert expected_e.abs().max() > 0.04


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_an_expert_without_tokens(config, dispatcher):
    shape = moe_runs.SHAPES["deepseek"]["model__moe"]
    run = tiny.start(config(model__moe=shape | {"dispatcher": dispatcher, "aux_loss_coeff": 0.0}))
    (_, router), *_ = moe.routers(run.chunks)
    assert router.expert_bias is not None
    router.expert_bias[2] = -100.0
    result = run.step()
    assert result.sums.router.tokens_per_expert_le[0, 2] == 0
    assert result.sums.router.expert_load_max >= 4 / 3
    for name, gradient in tiny.whole_weights(run, lambda p: p.main_grad).items():
        assert (gradient.norm() == 0) == (".local_experts.2." in name), name


def test_resuming_repeats_every_bit(config):
    cfg = config(**moe_runs.SHAPES["deepseek"] | {"train__precision": "bf16"})
    run = tiny.start(cfg)
    losses = [run.step().sums.loss for _ in range(2)]
    path = run.save()
    losses += [run.step().sums.loss for _ in range(2)]
    resumed = tiny.start(cfg)
    resumed.load(path)
    (_, fresh), *_ = moe.routers(resumed.chunks)
    assert fresh.expert_bias is not None
    assert fresh.expert_bias.abs().max() > 0.04
    assert [resumed.step().sums.loss for _ in range(2)] == losses[2:]
    expected = tiny.whole_weights(run)
    for name, value in tiny.whole_weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    for (_, one), (_, other) in zip(moe.routers(run.chunks), moe.routers(resumed.chunks), strict=True):
        assert one.expert_bias is not None
        assert other.expert_bias is not None
        assert torch.equal(one.expert_bias, other.expert_bias)
    tiny.assert_same_state(tiny.optimizer_state(resumed), tiny.optimizer_state(run))


@pytest.mark.parametrize("shape", moe_runs.SHAPES)
def test_generation_with_a_cache_equals_without(config, shape):
    model = built(config, model__init_std=0.3, **moe_runs.SHAPES[shape])
    for sampling in (Sampling(8, temperature=0.0), Sampling(8, temperature=1.0, top_p=1.0, seed=1)):
        cached, plain_rows = (generate(model, [5, 17, 250], sampling, eod_id=None, use_cache=c) for c in (True, False))
        assert cached == plain_rows  # with the cache, a token at a time goes through the experts
        assert len(cached[0]) == 8


def test_evaluation_counts_nothing(config):
    run = tiny.start(config(**moe_runs.SHAPES["deepseek"]))
    first = run.step()
    (_, router), *_ = moe.routers(run.chunks)
    counted_e = router.counted_e.clone()
    found = [evaluate(run.chunks, run.data, run.groups, micro_batch_size=micro, seq_length=tiny.SEQ, max_sequences=6)
             for micro in (1, 3)]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert torch.equal(router.counted_e, counted_e)
    assert first.sums.router is not None
    batches = run.data.evaluation_batches(1, tiny.SEQ, 1)
    assert forward.run(run.chunks, batches, run.groups, num_micro_batches=1, micro_batch_size=1, seq_length=tiny.SEQ,
                       forward_only=True).router is None


@pytest.mark.parametrize("shape", moe_runs.SHAPES)
def test_parameter_counts_are_those_of_the_configuration(config, shape):
    cfg = config(**moe_runs.SHAPES[shape])
    model = build.model(cfg, topology.build(cfg), tiny.VOCAB)
    assert build.parameter_count(model) == parameter_count(cfg.model, vocab_size=tiny.VOCAB)


def test_experts_begin_different(config):
    weights = dict(built(config, **moe_runs.SHAPES["mixtral"]).named_parameters())
    drawn = [value for name, value in weights.items() if "local_experts" in name and name.endswith("linear_fc1.weight")]
    assert len(drawn) == 8
    for i, one in enumerate(drawn):
        assert one.std().item() == pytest.approx(0.08, rel=0.05)
        assert all(not torch.equal(one, other) for other in drawn[:i])


def test_metrics_only_of_models_with_experts(config):
    from engine.train.loop import _row

    for shape, wanted in (({}, False), (moe_runs.SHAPES["mixtral"], True)):
        run = tiny.start(config(**shape))
        result = run.step()
        row = _row(result, run.state, run.groups.device)
        names = {"train/aux_loss", "train/z_loss", "train/expert_load_max"}
        assert names & row.keys() == (names if wanted else set())
        if (stats := result.sums.router) is not None:
            shares_le = stats.tokens_per_expert_le / stats.tokens_per_expert_le.sum(1, keepdim=True)
            assert row["train/expert_load_max"] == pytest.approx(4 * shares_le.max().item(), rel=1e-6)
            assert 0.9 <= row["train/aux_loss"] < 4.0
            assert row["train/z_loss"] == pytest.approx(stats.z_loss_l.mean().item())
