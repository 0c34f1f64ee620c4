"""Which backend attention takes: the ranking on machines that are not at hand, what it says, what it refuses."""

from __future__ import annotations

import dataclasses
import logging

import fake_flash
import pytest
import torch

from engine_kernels import attention_backends as backends
from engine_kernels import attention_flash
from engine_kernels.attention import causal_attention
from engine_kernels.attention_backends import Machine, Request, choose, rank
from engine_kernels.documents import Documents, Packed

CPU = Machine()
H100 = Machine((9, 0), cudnn=91600)
A100 = dataclasses.replace(H100, capability=(8, 0))
L4 = dataclasses.replace(H100, capability=(8, 9))
B200 = dataclasses.replace(H100, capability=(10, 0))
V100 = dataclasses.replace(H100, capability=(7, 0))
FA2, FA3 = frozenset({"flash_attn"}), frozenset({"flash_attn", "flash_attn_interface"})
PLAIN = Request("cuda", torch.bfloat16, 128, 4096, 4096)


def asked(**changes) -> Request:
    return dataclasses.replace(PLAIN, **changes)


def having(machine: Machine, packages: frozenset[str]) -> Machine:
    return dataclasses.replace(machine, packages=packages)


def first(request: Request, machine: Machine) -> str:
    return next(name for name, why in rank(request, machine) if not why)


def forget(monkeypatch) -> None:
    """What was chosen and said so far."""
    monkeypatch.setattr(backends, "_told", set())
    backends._best.cache_clear()


@pytest.mark.parametrize(("machine", "changes", "expected"), [
    (H100, {}, "cudnn"), (B200, {}, "cudnn"), (A100, {}, "flash"), (L4, {}, "flash"), (V100, {}, "math"),
    (having(H100, FA3), {}, "flash_attn"), (having(H100, FA2), {}, "cudnn"), (having(A100, FA3), {}, "flash"),
    # What cuDNN does not do
    (H100, {"s": 1024}, "flash"), (H100, {"window": 128}, "varlen"), (H100, {"sinks": True}, "varlen"),
    (H100, {"documents": True}, "varlen"), (H100, {"deterministic": True}, "flash"), (H100, {"dropout": 0.1}, "flash"),
    (H100, {"dropout": 0.125}, "cudnn"), (dataclasses.replace(H100, cudnn=91200), {"dropout": 0.125}, "flash"),
    (dataclasses.replace(H100, cudnn=91200), {"s": 4000, "t": 4000}, "flash"),
    (dataclasses.replace(H100, cudnn=91200), {}, "cudnn"), (dataclasses.replace(H100, cudnn=0), {}, "flash"),
    (H100, {"d": 192}, "cudnn"), (B200, {"d": 192}, "flash"), (H100, {"d": 100}, "flash"), (H100, {"s": 1}, "flash"),
    # flash-attn, installed, takes documents and windows, but no sinks; FA3 drops nothing and is not deterministic
    (having(H100, FA3), {"documents": True, "window": 128}, "flash_attn"),
    (having(H100, FA3), {"documents": True, "sinks": True}, "varlen"), (having(H100, FA3), {"dropout": 0.1}, "flash"),
    (having(A100, FA2), {"documents": True}, "flash_attn"), (having(H100, FA3), {"deterministic": True}, "flash"),
    (having(H100, frozenset({"flash_attn_interface"})), {"documents": True, "dropout": 0.1}, "varlen"),
    # fp32 has no flash kernel; wide heads neither
    (H100, {"dtype": torch.float32}, "flex"), (H100, {"dtype": torch.float32, "documents": True}, "flex"),
    (dataclasses.replace(H100, triton="Triton is not installed"), {"dtype": torch.float32}, "efficient"),
    (H100, {"dtype": torch.float32, "dropout": 0.1}, "efficient"), (H100, {"dtype": torch.float64}, "math"),
    (H100, {"d": 320}, "flex"), (L4, {"d": 256}, "flex"), (L4, {"d": 256, "grad": False}, "flash"),
    # Transformer Engine is taken only when asked for
    (having(H100, frozenset({"transformer_engine"})), {}, "cudnn"),
    # On a CPU
    (CPU, {"device": "cpu"}, "cpu"), (CPU, {"device": "cpu", "documents": True, "sinks": True}, "cpu"),
    (CPU, {"device": "cpu", "dtype": torch.float16}, "flash"), (CPU, {"device": "cpu", "dropout": 0.1}, "math"),
    (Machine(extension="not built"), {"device": "cpu"}, "flash"),
    (Machine(extension="not built"), {"device": "cpu", "documents": True}, "math"),
])
def test_first_of_the_ranking(machine, changes, expected):
    assert first(asked(**changes), machine) == expected
    assert choose("auto", asked(**changes), machine) == expected


@pytest.mark.parametrize("machine", [CPU, H100, A100, B200, V100, having(H100, FA3)])
def test_a_ranking_names_every_backend_once(machine):
    found = rank(asked(device="cpu" if machine is CPU else "cuda"), machine)
    assert sorted(name for name, _ in found) == sorted(backends.BACKENDS)


@pytest.mark.parametrize(("backend", "machine", "changes", "words"), [
    ("cudnn", H100, {"window": 128}, "it has no window"), ("cudnn", H100, {"documents": True}, "it has no documents"),
    ("cudnn", H100, {"s": 7}, "as many"), ("flash", H100, {"sinks": True}, "varlen is the same kernel with them"),
    ("flash_attn", H100, {}, "it cannot: flash-attn is not installed"), ("varlen", H100, {"d": 320}, "up to 256"),
    ("flash_attn", having(H100, frozenset({"flash_attn_interface"})), {"dropout": 0.1}, "not installed as FA2"),
    ("flash_attn", having(H100, FA2), {"sinks": True}, "gives no gradient"),
    ("transformer_engine", H100, {}, "Transformer Engine is not installed"),
    ("cpu", H100, {}, "it runs on a CPU, but the tensors are on cuda"),
    ("cudnn", CPU, {"device": "cpu"}, "it runs on a GPU, but the tensors are on cpu"),
    ("varlen", V100, {}, "needs compute capability 8.0, this GPU has 7.0"),
    ("varlen", H100, {"dtype": torch.float32}, "takes bfloat16 or float16, not float32"),
    ("flex", CPU, {"device": "cpu"}, "has no backward pass on a CPU"), ("flex", H100, {"d": 8}, "from 16"),
    ("efficient", H100, {"d": 20}, "in steps of 8"), ("cpu", CPU, {"device": "cpu", "dropout": 0.5}, "has no dropout"),
    ("cpu", Machine(extension="the extension is not built"), {"device": "cpu"}, "it cannot: the extension"),
])
def test_a_backend_that_cannot_says_why_and_what_can(backend, machine, changes, words):
    request = asked(**changes)
    with pytest.raises(ValueError, match=words) as error:
        choose(backend, request, machine)
    message = str(error.value)
    assert message.startswith(f'causal_attention: impl="{backend}" cannot serve {request.device} ')
    assert message.endswith(f'use impl="{first(request, machine)}" or "auto"')
    assert "\n" not in message


def test_a_backend_that_is_asked_for_and_can_is_taken():
    te = having(H100, frozenset({"transformer_engine"}))
    for backend in ("cudnn", "flash", "varlen", "flex", "efficient", "math", "transformer_engine"):
        assert choose(backend, PLAIN, te) == backend
    assert choose("torch", PLAIN, te) == "torch"
    with pytest.raises(ValueError, match=r"impl must be one of auto, torch, cpu, .* not 'xformers'"):
        choose("xformers", PLAIN, te)


def test_the_choice_is_said_once(caplog, monkeypatch):
    forget(monkeypatch)
    with caplog.at_level(logging.INFO, "engine_kernels"):
        for length in (64, 128, 4096):
            choose("auto", asked(documents=True, s=length, t=length), H100)
        choose("auto", asked(), H100)
    assert [record.message for record in caplog.records] == [
        "attention for cuda bfloat16, head dimension 128, documents: varlen; passed over: cudnn (has no documents), "
        "flash (has no documents; varlen is the same kernel with them), flash_attn (flash-attn is not installed)",
        "attention for cuda bfloat16, head dimension 128: cudnn"]


def test_the_kernels_own_call_is_ranked(caplog, monkeypatch):
    """What causal_attention asks of this machine."""
    forget(monkeypatch)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 7, 8)
    with caplog.at_level(logging.INFO, "engine_kernels"):
        causal_attention(q, k, k, window=2, sinks=torch.zeros(2))
        causal_attention(q.double(), k.double(), k.double(), window=7)
        causal_attention(q, k, k, dropout=0.5)
    said = [record.message for record in caplog.records]
    assert said[0].endswith("cpu float32, head dimension 8, window 2, sinks, queries at the end of the keys: cpu")
    assert "cpu float64, head dimension 8, queries at the end of the keys: flash; passed over: cpu (takes" in said[1]
    assert "dropout, queries at the end of the keys: math; passed over: cpu (has no dropout), flash (has no" in said[2]
    with pytest.raises(ValueError, match='impl="cudnn" cannot serve cpu float32'):
        causal_attention(q, k, k, impl="cudnn")
    with pytest.raises(ValueError, match="q, k and v must have one dtype and device"):
        causal_attention(q, k.double(), k)


def test_without_the_extension_torch_serves_the_cpu(monkeypatch):
    from engine_kernels import dispatch

    monkeypatch.setattr(dispatch, "_extension", None)
    q = torch.randn(1, 2, 9, 8)
    torch.testing.assert_close(causal_attention(q, q, q), causal_attention(q, q, q, impl="math"))
    with pytest.raises(ValueError, match=r"it cannot: the extension engine_kernels\._cpu is not built"):
        causal_attention(q, q, q, impl="cpu")


def test_a_package_that_does_not_import_is_not_there(monkeypatch, tmp_path, caplog):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, "engine_kernels"):
        assert not backends._imports("flash_attn", "flash_attn")
    assert "flash_attn is installed but cannot be imported: undefined symbol" in caplog.text
    assert not backends._imports("no_such_package", "no_such_package")


@pytest.mark.parametrize("impl", ["auto", "cpu", "math", "flash"])
def test_compile_traces_the_choice(impl):
    """One graph, documents included."""
    q, sinks, documents = torch.randn(1, 2, 9, 8), torch.randn(2), Documents([[0, 4, 9]])
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    for options in ({"window": 3, "sinks": sinks}, {"documents": None if impl == "flash" else documents}):
        found, expected = (function(q, q, q, impl=impl, **options) for function in (compiled, causal_attention))
        torch.testing.assert_close(found, expected)


# Operators of torch's that only run on a GPU: arguments by position, in order, and by name, as they are called here.
CALLED = {
    "_flash_attention_forward": (
        ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
         "return_debug_mask"], {"scale", "window_size_left", "window_size_right"}, 5),
    "_flash_attention_backward": (
        ["grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
         "dropout_p", "is_causal", "rng_state", "unused"], {"scale", "window_size_left", "window_size_right"}, 3),
}


@pytest.mark.parametrize("name", CALLED)
def test_torchs_operators_are_called_by_their_schema(name, monkeypatch):
    by_position, by_name, results = CALLED[name]
    schema = getattr(torch.ops.aten, name).default._schema
    assert [a.name for a in schema.arguments if not a.kwarg_only] == by_position
    named = {a.name for a in schema.arguments if a.kwarg_only}
    assert by_name <= named
    assert all(a.has_default_value() for a in schema.arguments if a.kwarg_only and a.name not in by_name)
    assert len(schema.returns) == results
    library = fake_flash.register()  # whose functions have the same arguments
    try:
        lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
        kernel = attention_flash.Varlen(0.3, 2, 0.0, Packed(lengths, lengths, 5, 5, []))
        q, k = torch.randn(8, 4, 8), torch.randn(8, 2, 8)
        out, lse, state = kernel.forward(q, k, k)
        assert [x.shape for x in kernel.backward(out, q, k, k, out, lse, state)] == [q.shape, k.shape, k.shape]
    finally:
        library._destroy()


def test_the_cpu_kernels_schema():
    schema = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._schema
    assert [a.name for a in schema.arguments] == ["grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p",
                                                  "is_causal", "attn_mask", "scale"]
