"""Every backend that this GPU has, against the formula in float64: test_attention_documents.py without stand-ins."""

from __future__ import annotations

import pytest
import torch

from engine_kernels import attention_backends as backends
from engine_kernels.attention import causal_attention, causal_attention_reference
from engine_kernels.documents import Documents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BOUNDARIES = [[0, 5, 6, 130, 384], [0, 384], [0, 128, 256, 384]]
CHUNKS = [(0, 96), (288, 384)]
CASES = {
    "plain": {}, "one head a group": {"g": 8}, "narrow": {"d": 64}, "wide": {"d": 256}, "odd": {"d": 40},
    "at the end": {"s": 96}, "one query": {"s": 1}, "window": {"window": 128}, "sinks": {"sinks": True},
    "window and sinks": {"window": 33, "sinks": True, "d": 64}, "window at the end": {"s": 96, "window": 50},
    "documents": {"documents": True}, "documents, window, sinks": {"documents": True, "window": 40, "sinks": True},
    "documents in chunks": {"documents": True, "chunks": CHUNKS, "s": 192, "sinks": True, "window": 200},
}


def build(b=3, h=8, g=2, s=384, t=384, d=128, window=None, sinks=False, documents=False, chunks=None,
          dtype=torch.bfloat16):
    packed = Documents(BOUNDARIES, chunks) if documents else None
    shapes = [(b, s, h, d), (b, t, g, d), (b, t, g, d)]
    inputs = [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes]
    if sinks:
        inputs.append(torch.randn(h, device="cuda").to(dtype))
    request = backends.Request("cuda", dtype, d, s, t, window, sinks, documents)
    return inputs, torch.randn(b, h, s, d, device="cuda").to(dtype), window, packed, request


def gradients(function, inputs, dout):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def run(impl, inputs, dout, window, documents):
    def function(q, k, v, sinks=None):
        return causal_attention(q, k, v, window=window, sinks=sinks, documents=documents, impl=impl)

    return gradients(function, inputs, dout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["auto", "torch", *backends.BACKENDS])
def test_values_and_gradients(impl, case, dtype):
    inputs, dout, window, documents, request = build(**CASES[case], dtype=dtype)
    if impl in backends.BACKENDS and (why := backends.obstacle(impl, request, backends.this_machine("cuda", 0))):
        pytest.skip(f"{impl} {why}")

    def exact(q, k, v, sinks=None):
        return causal_attention_reference(q, k, v, q.shape[-1] ** -0.5, window, sinks, documents)

    expected = gradients(exact, [x.double() for x in inputs], dout.double())
    bound = 1e-2 if dtype == torch.bfloat16 else 5e-3  # fp32 may be multiplied in tf32
    largest = max(e.norm() for e in expected)
    for x, e in zip(run(impl, inputs, dout, window, documents), expected, strict=True):
        assert x.shape == e.shape
        assert x.isfinite().all()
        assert (x.double() - e).norm() <= bound * largest
        assert (x.double() - e).norm() <= 5 * bound * e.norm()


@pytest.mark.parametrize("case", ["plain", "window and sinks", "documents in chunks"])
@pytest.mark.parametrize("impl", ["flash", "varlen", "flex", "efficient", "math"])
def test_told_to_be_deterministic_it_is(impl, case, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    inputs, dout, window, documents, request = build(**CASES[case])
    if backends.obstacle(impl, request, backends.this_machine("cuda", 0)):
        pytest.skip(f"{impl} cannot")
    torch.use_deterministic_algorithms(True)
    try:
        first = run(impl, inputs, dout, window, documents)
        for _ in range(5):
            assert all(map(torch.equal, first, run(impl, inputs, dout, window, documents)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["flash", "varlen", "efficient"])
def test_dropout_keeps_the_mean_and_its_gradient(impl):
    inputs, dout, *_ = build(b=1, s=128, t=128, d=64)
    exact = run("math", inputs, dout, None, None)
    torch.manual_seed(0)
    many = []
    for _ in range(200):
        def function(q, k, v):
            return causal_attention(q, k, v, dropout=0.25, impl=impl)

        many.append(torch.stack([x.double().flatten()[:1000] for x in gradients(function, inputs, dout)]))
    samples = torch.stack(many)
    assert samples.std(0).max() > 0.01
    error = (samples.mean(0) - torch.stack([x.double().flatten()[:1000] for x in exact])).abs()
    assert (error < 6 * samples.std(0) / 200**0.5 + 0.05).all()


def test_nothing_waits_for_the_gpu():
    """Once a micro-batch's documents were seen, a layer's attention queues kernels and returns."""
    inputs, dout, window, documents, _ = build(documents=True, sinks=True)
    run("auto", inputs, dout, window, documents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("auto", inputs, dout, window, documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
