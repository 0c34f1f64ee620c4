"""``train.adamw``: state of fewer bytes is really smaller, resumes exactly, changes form, and trains as well."""

from __future__ import annotations

import logging
from itertools import product

import gathered
import pytest
import tiny
import torch

from engine.errors import UserError
from engine.model import whole
from engine.train import adamw, optimizer

BF16 = {"train__precision": "bf16", "model__tie_embeddings": False, "data__shuffle_seed": 3}
# Bytes of optimizer state a parameter of bf16 weights, the fp32 weights behind them counted in.
BYTES = {("fp32", "fp32"): 12, ("bf16", "fp32"): 8, ("fp32", "remainder"): 10, ("bf16", "remainder"): 6,
         ("fp32", "none"): 8, ("bf16", "none"): 4}
KINDS = ["adamw", "distributed", "muon"]


def changes(kind: str, moments: str, master: str) -> dict:
    found = BF16 | {"train__adamw": {"moments": moments, "master": master}}
    return found | {"adamw": {}, "distributed": {"parallel__distributed_optimizer": True},
                    "muon": {"train__optimizer": "muon"}}[kind]


def trained(cfg, steps: int) -> tuple[tiny.Run, list[float]]:
    run = tiny.start(cfg)
    return run, [run.step().sums.loss for _ in range(steps)]


def kept_bytes(run: tiny.Run) -> dict[torch.Tensor, int]:
    """Bytes in the storages of all that is kept for each tensor that the inner optimizers update, itself if fp32."""
    found = {}
    for inner in run.optimizer.chained_optimizers:
        for p in (p for group in inner.optimizer.param_groups for p in group["params"]):
            tensors = [*inner.optimizer.state[p].values(), *([p] if p.dtype == torch.float32 else [])]
            found[p] = sum(t.untyped_storage().nbytes() for t in tensors)
    return found


@pytest.mark.parametrize(("kind", "form"), list(product(KINDS, BYTES)))
def test_bytes_of_a_parameter(config, kind, form):
    run, _ = trained(config(**changes(kind, *form)), 1)
    kept = kept_bytes(run)
    parameters = sum(p.numel() for p in tiny.unwrapped(run).parameters())
    assert sum(p.numel() for p in kept) == parameters
    if kind == "muon":
        by_kind = {group["kind"]: [0, 0] for inner in run.optimizer.chained_optimizers
                   for group in inner.optimizer.param_groups}
        for inner in run.optimizer.chained_optimizers:
            for group in inner.optimizer.param_groups:
                for p in group["params"]:
                    by_kind[group["kind"]][0] += kept[p]
                    by_kind[group["kind"]][1] += p.numel()
        assert by_kind["muon"][0] == 8 * by_kind["muon"][1]
        assert by_kind["adamw"][0] == BYTES[form] * by_kind["adamw"][1]
    else:
        assert sum(kept.values()) == BYTES[form] * parameters
    for p in kept:
        if p.dtype == torch.bfloat16:  # the model's own weights, and DDP's own buffer of gradients
            assert any(p.data_ptr() >= q.data_ptr() and p.data_ptr() < q.data_ptr() + q.nbytes
                       for q in tiny.unwrapped(run).parameters())
            assert p.grad is None


@pytest.mark.parametrize(("kind", "form"), list(product(KINDS, [("bf16", "remainder"), ("bf16", "none"),
                                                                ("bf16", "fp32")])))
def test_resuming_repeats_every_bit(config, kind, form):
    """Rounding is random, and the random bits are those of the step."""
    cfg = config(**changes(kind, *form))
    straight, losses = trained(cfg, 5)
    run, _ = trained(cfg, 2)
    path = run.save()
    resumed = tiny.start(cfg)
    resumed.load(path)
    assert not gathered.differing(gathered.state(resumed), gathered.state(run))
    assert [resumed.step().sums.loss for _ in range(3)] == losses[2:]
    assert not gathered.differing(gathered.state(resumed), gathered.state(straight))


def test_rounding_is_random(config):
    """The state is not what rounding to the nearest gives, and follows from the seed."""
    runs = [trained(config(train__optimizer="adamw", **(BF16 | {"train__adamw": {"moments": "bf16"}})), 1)[0]
            for _ in range(2)]
    exact, _ = trained(config(**BF16), 1)
    one, other, fp32 = (gathered.state(run) for run in (*runs, exact))
    assert not gathered.differing(one, other)
    for kind in ("exp_avg", "exp_avg_sq"):
        nearest = sum((one[kind][name] != value.bfloat16()).float().mean() for name, value in fp32[kind].items())
        assert nearest / len(fp32[kind]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_masters_change_their_form(config, kind, tmp_path, caplog):
    """fp32 copies and remainders are the same numbers: either continues from the other's checkpoint."""
    copy, _ = trained(config(**changes(kind, "fp32", "fp32"), output_dir=tmp_path / "copy"), 2)
    saved = gathered.state(copy)
    path = copy.save()
    parts = tiny.start(config(**changes(kind, "fp32", "remainder"), seed=77))
    parts.load(path)
    found = gathered.state(parts)
    assert not gathered.differing({k: v for k, v in found.items() if k != "weights"},
                                  {k: v for k, v in saved.items() if k != "weights"})
    for name, value in found["weights"].items():  # of a number between two, the other may have been taken
        assert torch.equal(value, saved["weights"][name]) or (saved["param"][name].view(torch.int32) & 0xFFFF
                                                              == 0x8000).any()
    back = parts.save()
    again = tiny.start(config(**changes(kind, "fp32", "fp32"), seed=5))
    again.load(back)
    assert not gathered.differing(gathered.state(again), found)
    losses = [run.step().sums.loss for run in (copy, parts, again)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    exact = [gathered.state(run)["param"] for run in (copy, parts, again)]
    for name, value in exact[0].items():
        for other in exact[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)  # of a step of 5e-3
    assert "was saved in" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_masters_may_change_to_fewer_bytes_and_back(config, kind, caplog):
    wide, _ = trained(config(**changes(kind, "fp32", "fp32")), 2)
    saved, path = gathered.state(wide), wide.save()
    narrow = tiny.start(config(**changes(kind, "bf16", "none"), seed=77))
    with caplog.at_level(logging.WARNING, "engine.checkpoint"):
        narrow.load(path)
    assert "exp_avg was saved in float32 and goes on in bfloat16" in caplog.text
    found = gathered.state(narrow)
    assert not gathered.differing({"weights": found["weights"]}, {"weights": saved["weights"]})
    for name, value in saved["exp_avg_sq"].items():
        assert torch.equal(found["exp_avg_sq"][name], value.bfloat16())
    narrow.step()
    after, path = gathered.state(narrow), narrow.save()
    caplog.clear()
    again = tiny.start(config(**changes(kind, "fp32", "remainder")))
    with caplog.at_level(logging.WARNING, "engine.checkpoint"):
        again.load(path)
    assert "exp_avg_sq was saved in bfloat16 and goes on in float32" in caplog.text
    found = gathered.state(again)
    for name, value in after["weights"].items():
        assert torch.equal(found["weights"][name], value)
        if name in after["exp_avg"]:
            assert torch.equal(found["param"][name], value.float())
            assert torch.equal(found["exp_avg"][name], after["exp_avg"][name].float())
    assert again.step().sums.loss == pytest.approx(narrow.step().sums.loss, rel=1e-3)


def test_a_checkpoint_of_remainders_loads_in_fp32(config):
    half, _ = trained(config(**changes("adamw", "bf16", "remainder")), 2)
    saved = gathered.state(half)
    full = tiny.start(config(**(BF16 | {"train__precision": "fp32"}), seed=5))
    full.load(half.save())
    assert not gathered.differing({"weights": gathered.state(full)["weights"]}, {"weights": saved["param"]})


def test_trains_as_well_as_fp32(config):
    """Mean loss of steps 100 to 120, relative to that of fp32 moments and masters in the same bf16 model."""
    options = {"train__max_steps": 120, "train__lr": 2e-3, "train__micro_batch_size": 4}
    found = {}
    for moments, master in (("fp32", "fp32"), ("bf16", "remainder"), ("bf16", "none")):
        _, losses = trained(config(**changes("adamw", moments, master), **options), 120)
        assert losses[0] > 1.5 * losses[-1], "it learns"
        found[master] = sum(losses[100:]) / 20
    assert found["remainder"] == pytest.approx(found["fp32"], rel=0.01)
    assert found["none"] == pytest.approx(found["fp32"], rel=0.03)


def test_remainders_train_as_fp32_masters(config):
    """With fp32 moments they are only another way to store the same weights."""
    (one, a), (other, b) = (trained(config(**changes("adamw", "fp32", master)), 4) for master in ("fp32", "remainder"))
    assert a == pytest.approx(b, rel=1e-6)
    mine, theirs = gathered.state(one)["param"], gathered.state(other)["param"]
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-5)  # of steps of 5e-3 each


def test_random_bits_follow_the_number_in_the_unsplit_parameter():
    shape = torch.Size((4, 6))
    whole_place = adamw.place(1, "w", torch.Size((8, 6)), whole.Split())
    numbers = torch.arange(48).view(8, 6)
    for split in (whole.Split(0, 1, 1, 2), whole.Split(0, 2, 1, 2)):
        place = adamw.place(1, "w", shape, split, start=3)
        n = place.start + torch.arange(24 - 3)
        found = n + (n // place.run * (place.count - 1) + place.index) * place.run
        assert torch.equal(found, split.take(numbers).flatten()[3:])
        assert place.key == whole_place.key
    columns = whole.Split(1, 1, 1, 2)
    place = adamw.place(1, "w", torch.Size((8, 3)), columns)
    n = torch.arange(24)
    assert torch.equal(n + (n // place.run + place.index) * place.run, columns.take(numbers).flatten())
    assert adamw.place(2, "w", shape, whole.Split()).key != whole_place.key
    assert adamw.place(1, "v", shape, whole.Split()).key != whole_place.key


@pytest.mark.parametrize("distributed", [False, True])
def test_clipping_scales_what_is_read(config, distributed):
    """The gradients stay in fp32 in DDP's buffer, and the update is that of the clipped ones."""
    options = changes("distributed" if distributed else "adamw", "fp32", "remainder")
    runs = [tiny.start(config(**options, train__clip_grad=clip, train__eps=1e-3)) for clip in (0.5, 0.0)]
    results = [run.step() for run in runs]
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm)
    assert results[0].grad_norm > 0.5
    states = [gathered.state(run) for run in runs]
    for name, value in states[1]["exp_avg"].items():
        clipped = value * (0.5 / results[0].grad_norm)
        torch.testing.assert_close(states[0]["exp_avg"][name], clipped, rtol=1e-4, atol=1e-9)
    assert all(inner.optimizer.rule.grad_scale is None for inner in runs[0].optimizer.chained_optimizers)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("master", ["remainder", "none"])
def test_masters_of_other_weights_are_refused(config, precision, master):
    with pytest.raises(UserError, match=rf"train.adamw.master: {master} is for bf16 .*train.precision is {precision}"):
        config(train__precision=precision, train__adamw={"master": master})


def test_fp32_weights_are_their_own_masters(config):
    run, _ = trained(config(train__precision="auto", train__adamw={"moments": "bf16", "master": "remainder"}), 1)
    assert optimizer.rule(run.cfg, run.chunks[0].config).moments == torch.bfloat16
    for inner in run.optimizer.chained_optimizers:
        for p, state in inner.optimizer.state.items():
            assert ("remainder" in state) == (p.dtype == torch.bfloat16)
