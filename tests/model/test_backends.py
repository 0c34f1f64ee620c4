"""The engine's backend against the reference backend and against Transformers' models with the same weights."""

from __future__ import annotations

import hugging_face
import pytest
import tiny
import torch

from engine.errors import UserError
from engine.model import build, whole
from engine.parallel import topology
from engine_kernels import jit

BATCH = 3
ROWS = 384  # of the padded vocabulary


def bare_model(cfg):
    """The unwrapped model on one rank, generators seeded anew."""
    return build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]


def batch(length: int = tiny.SEQ, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    tokens_bs, labels_bs = (torch.randint(0, tiny.VOCAB, (BATCH, length), generator=g) for _ in range(2))
    mask_bs = (torch.rand(BATCH, length, generator=g) < 0.7).float()
    return tokens_bs, torch.arange(length).expand_as(tokens_bs), labels_bs, mask_bs


def loss_and_gradients(model, length: int = tiny.SEQ):
    tokens_bs, positions_bs, labels_bs, mask_bs = batch(length)
    loss = model(tokens_bs, positions_bs, None, labels=labels_bs, loss_mask=mask_bs)[0]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def logits(model, length: int = tiny.SEQ) -> torch.Tensor:
    tokens_bs, positions_bs, _, _ = batch(length)
    with torch.no_grad():
        return model.eval()(tokens_bs, positions_bs, None)


SHAPES = {
    "grouped": {},
    "one group, wide heads": {"model__num_query_groups": 1, "model__head_dim": 16},
    "untied": {"model__tie_embeddings": False},
    "qk norm": {"model__qk_norm": True},
    "biases, part of a head rotates": {"model__attention_bias": True, "model__rotary_percent": 0.5},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_engine_equals_reference_backend(config, shape):
    (loss, grads), (expected_loss, expected) = (
        loss_and_gradients(bare_model(config(model__backend=name, **SHAPES[shape])))
        for name in ("engine", "reference"))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.norm() > 0, name
        assert (grad - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_loss_is_that_of_the_logits(config):
    model = bare_model(config())
    tokens_bs, positions_bs, labels_bs, mask_bs = batch()
    out = model(tokens_bs, positions_bs, None, labels=labels_bs, loss_mask=mask_bs)
    logits_bsv = logits(model)[..., : tiny.VOCAB].double()
    losses_bs = torch.nn.functional.cross_entropy(logits_bsv.transpose(1, 2), labels_bs, reduction="none")
    assert out[0].item() == pytest.approx((losses_bs * mask_bs).sum().item(), rel=1e-6)
    hits_bs = (logits_bsv.argmax(-1) == labels_bs) & (mask_bs > 0)
    assert torch.equal(out[1:].view(mask_bs.shape) > 0, hits_bs)
    assert hits_bs.any()


@pytest.mark.parametrize("backend", ["engine", "reference"])
def test_smoothing_and_z_loss_are_trained_on_and_not_evaluated(config, backend):
    model = bare_model(config(train__label_smoothing=0.2, train__z_loss=1e-2, model__backend=backend))
    tokens_bs, positions_bs, labels_bs, mask_bs = batch()
    logits_bvs = logits(model)[..., : tiny.VOCAB].double().transpose(1, 2)
    z_bs = 1e-2 * logits_bvs.logsumexp(1).square()
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        model.train(training)
        out = model(tokens_bs, positions_bs, None, labels=labels_bs, loss_mask=mask_bs)
        losses_bs = torch.nn.functional.cross_entropy(logits_bvs, labels_bs, reduction="none",
                                                      label_smoothing=smoothing)
        assert out[0].item() == pytest.approx(((losses_bs + training * z_bs) * mask_bs).sum().item(), rel=1e-6)


@pytest.mark.parametrize(("field", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1e-4)])
def test_terms_that_make_no_sense_are_refused(config, field, value):
    with pytest.raises(UserError, match=f"train.{field}"):
        config(**{f"train__{field}": value})


@pytest.mark.parametrize(("family", "changes"), [
    ("Llama", {}),
    ("Llama", {"model__tie_embeddings": False, "model__num_query_groups": 4, "model__rotary_base": 500000.0,
               "model__norm_eps": 1e-3}),
    ("Llama", {"model__num_query_groups": 1, "model__head_dim": 16}),
    ("Qwen2", {"model__attention_bias": True}),
    ("Qwen3", {"model__qk_norm": True}),
])
def test_equals_transformers(config, family, changes):
    cfg = config(**changes)
    m, model = cfg.model, bare_model(cfg)
    with torch.no_grad():  # norms and biases must be seen as well
        for i, p in enumerate(p for p in model.parameters() if p.dim() == 1):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    theirs = hugging_face.model(family, whole.assemble([whole.parts([model])], tiny.VOCAB), m, vocab_size=tiny.VOCAB)
    with torch.no_grad():
        expected = theirs(batch()[0]).logits
    found = logits(model)[..., : tiny.VOCAB]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4


def test_padding_rows_are_zero_and_stay_zero(config):
    run = tiny.start(config(model__tie_embeddings=False))
    for _ in range(3):
        run.step()
    weights = whole.assemble([whole.parts(run.chunks)], ROWS)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert weights[name].shape[0] == ROWS
        assert torch.all(weights[name][tiny.VOCAB :] == 0), name
        assert torch.all(weights[name][: tiny.VOCAB].norm(dim=1) > 0), name


def test_initial_weights_have_the_stated_spread(config):
    cfg = config(model__hidden_size=64, model__num_layers=4)
    for name, p in bare_model(cfg).named_parameters():
        if p.dim() == 1:
            assert torch.all(p == 1), name
            continue
        into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        wanted = 0.08 / (8**0.5 if into_residual else 1.0)
        rows = p[: tiny.VOCAB] if "embedding" in name else p
        assert rows.std().item() == pytest.approx(wanted, rel=0.05), name


def test_initial_weights_follow_the_seed(config):
    def embedding(seed):
        return bare_model(config(seed=seed)).embedding.word_embeddings.weight

    assert torch.equal(embedding(1), embedding(1))
    assert not torch.equal(embedding(1), embedding(2))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_gives_equal_gradients(config, dropout):
    results = {mode: loss_and_gradients(bare_model(config(train__recompute=mode, model__dropout=dropout)))
               for mode in ("none", "selective", "full")}
    loss, grads = results["none"]
    for mode in ("selective", "full"):
        assert torch.equal(results[mode][0], loss), mode
        for name, grad in results[mode][1].items():
            assert torch.equal(grad, grads[name]), (mode, name)


def test_dropout_drops_in_training_only(config):
    cfg = config(model__dropout=0.2)
    model = bare_model(cfg)
    first, second = (loss_and_gradients(model)[0] for _ in range(2))
    assert first != second
    plain = bare_model(config())
    assert torch.equal(logits(model), logits(plain))
    assert loss_and_gradients(plain.train())[0] not in (first, second)


@pytest.mark.parametrize("length", [1, 5])
def test_shorter_sequences_are_prefixes(config, length):
    model = bare_model(config())
    assert torch.allclose(logits(model)[:, :length], _on_prefix(model, length), atol=1e-6)


def _on_prefix(model, length: int) -> torch.Tensor:
    tokens_bs, positions_bs, _, _ = batch()
    with torch.no_grad():
        return model(tokens_bs[:, :length], positions_bs[:, :length], None)


def test_triton_without_a_gpu_or_its_interpreter_is_refused_by_name(config, monkeypatch):
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    with pytest.raises(UserError, match=r"^model\.kernels: on cpu; Triton .* a CUDA tensor .* Use kernels auto$"):
        bare_model(config(model__kernels="triton"))
