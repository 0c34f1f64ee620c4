"""``model.attention_backend`` in the model, and rows of documents in one call of attention a layer."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from engine.config import Config
from engine.data.loader import Batch
from engine.errors import UserError
from engine.evaluation.generation import Sampling, generate
from engine.model import attention, build, forward
from engine.model.objective import NEXT_TOKEN
from engine.parallel import topology
from engine_kernels import attention_backends

DOCUMENTS = [[0, 5, 6, tiny.SEQ], [0, 9, tiny.SEQ]]


def model_of(cfg: Config):
    return build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]


def packed_batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, tiny.VOCAB, (2, tiny.SEQ), generator=g) for _ in range(2))
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(row)]) for row in DOCUMENTS])
    return Batch(tokens, labels, torch.ones(2, tiny.SEQ), positions, [torch.tensor(row).int() for row in DOCUMENTS])


def loss_and_gradients(model, batch: Batch):
    output, loss_function = forward._forward_step(iter([batch]), model, objective=NEXT_TOKEN, groups=None)
    loss = loss_function(output)[0]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The options of every call of attention."""
    found, real = [], attention.causal_attention

    def recorded(*tensors, **options):
        found.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(attention, "causal_attention", recorded)
    return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_layer_calls_attention_once_for_all_documents(config, calls, recompute):
    model = model_of(config(train__recompute=recompute))
    loss_and_gradients(model, packed_batch())
    assert len(calls) == (2 if recompute == "none" else 4)  # layers; again in the backward pass
    assert all(call["documents"] is calls[0]["documents"] is not None for call in calls), "made for every layer"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["math", "cpu"])
def test_a_backend_asked_for_is_taken(config, calls, backend, dropout):
    if backend == "cpu" and dropout:
        with pytest.raises(UserError, match=r"^model.attention_backend: cpu cannot serve .*: it has no dropout\. "
                                            "Use math or auto$"):
            model_of(config(model__attention_backend=backend, model__dropout=dropout))
        return
    model = model_of(config(model__attention_backend=backend, model__dropout=dropout))
    found = loss_and_gradients(model, packed_batch())
    assert {call["impl"] for call in calls} == {backend}
    if not dropout:
        loss, gradients = loss_and_gradients(model_of(config()), packed_batch())
        assert found[0] == pytest.approx(loss, rel=1e-6)
        for name, grad in gradients.items():
            torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("changes", "impl"), [
    ({}, "auto"), ({"model__kernels": "torch"}, "torch"), ({"model__backend": "reference"}, "torch"),
    ({"model__kernels": "torch", "model__attention_backend": "flash"}, "flash"),
])
def test_what_attention_is_told(config, calls, changes, impl):
    model = model_of(config(**changes))
    model(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], None)
    assert {call["impl"] for call in calls} == {impl}


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__attention_backend": "cudnn"},
     r"^model.attention_backend: cudnn cannot serve cpu float32, head dimension 8: it runs on a GPU, but the tensors "
     r"are on cpu\. Use cpu or auto$"),
    ({"model__attention_backend": "flex", "model__attention_sinks": True},
     "flex cannot serve cpu float32, head dimension 8, sinks: it has no backward pass on a CPU"),
    ({"model__attention_backend": "flash", "model__dropout": 0.1},
     r"flash cannot serve .* it has no dropout on a CPU\. Use math or auto$"),
])
def test_a_backend_that_cannot_is_refused_before_training(config, changes, message):
    with pytest.raises(UserError, match=message):
        model_of(config(**changes))


def test_each_kind_of_layer_is_checked(config, monkeypatch):
    """Of GPT-OSS's layers, those with a window are what cuDNN cannot do; under context parallelism all are."""
    machine = attention_backends.Machine((9, 0), cudnn=91600)
    monkeypatch.setattr(attention_backends, "this_machine", lambda *_: machine)
    device, half = torch.device("cuda"), torch.bfloat16
    wide = {"model__seq_length": 256, "model__attention_backend": "cudnn"}
    attention.check_backend(config(**wide), half, device)
    attention.check_backend(config(**wide, model__window_size=256), half, device)
    with pytest.raises(UserError, match=r"window 64: it has no window\. Use varlen or auto$"):
        attention.check_backend(config(**wide, model__window_size=64, model__full_attention_every=2), half, device)
    with pytest.raises(UserError, match="queries at the end of the keys: it is causal only where"):
        attention.check_backend(config(**wide, parallel__context=2), half, device)
    with pytest.raises(UserError, match="takes bfloat16 or float16, not float32"):
        attention.check_backend(config(**wide), torch.float32, device)


def test_another_backend_has_no_choice(config):
    with pytest.raises(UserError, match=r"attention_backend.* but backend is reference.* Set it to auto"):
        config(model__backend="reference", model__attention_backend="math")
    with pytest.raises(UserError, match="attention_backend"):
        config(model__attention_backend="xformers")


def test_generation_does_not_insist(config, calls):
    """Flash refuses documents at run time; against a cache, the choice is the dispatcher's."""
    model = model_of(config(model__attention_backend="flash")).eval()
    generate(model, [5, 9], Sampling(max_new_tokens=3, temperature=0.0), eod_id=None, use_cache=True)
    assert {call["impl"] for call in calls} == {"auto"}
    with pytest.raises(ValueError, match=r'impl="flash" cannot serve .*documents: it has no documents; use impl="cpu"'):
        loss_and_gradients(model.train(), packed_batch())
