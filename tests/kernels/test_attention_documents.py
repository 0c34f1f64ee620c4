"""Rows of documents, windows, sinks and grouped queries by every backend: against the formula in float64.

Backends of a GPU run here by stand-ins of their kernels (helpers/fake_flash.py): all but the kernel itself is tested.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types

import fake_flash
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import attention_packages
from engine_kernels.attention import causal_attention, causal_attention_reference
from engine_kernels.attention_flash import varlen
from engine_kernels.attention_flex import block_mask, flex
from engine_kernels.attention_sdpa import Call
from engine_kernels.documents import Documents

BOUNDARIES = [[0, 5, 6, 130, 200], [0, 200], [0, 64, 128, 200]]
CHUNKS = {"whole": None, "rank 0 of 2": [(0, 50), (150, 200)], "rank 1 of 2": [(50, 100), (100, 150)]}


@pytest.fixture
def flash_kernels():
    library = fake_flash.register()
    yield
    library._destroy()


@pytest.fixture
def flex_with_gradients(monkeypatch):
    """FlexAttention's formula differentiates on a CPU; only its check of the device says no."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *_: None)


def case(b, h, g, s, t, d, dtype, with_sinks):
    """q, k, v, the sinks or nothing, and the gradient of the result."""
    inputs = [torch.randn(b, heads, length, d).to(dtype) for heads, length in ((h, s), (g, t), (g, t))]
    return [*inputs, *([torch.randn(h).to(dtype)] if with_sinks else [])], torch.randn(b, h, s, d).to(dtype)


def gradients(function, inputs, dout):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_equals_formula(function, inputs, dout, window, documents, bound):
    """`function(q, k, v, sinks)`; norm-wise, against the largest of the results."""
    def exact(q, k, v, sinks=None):
        return causal_attention_reference(q, k, v, q.shape[-1] ** -0.5, window, sinks, documents)

    expected = gradients(exact, [x.double() for x in inputs], dout.double())
    found = gradients(lambda q, k, v, sinks=None: function(q, k, v, sinks), inputs, dout)
    largest = max(e.norm() for e in expected)
    for x, e in zip(found, expected, strict=True):
        assert x.shape == e.shape
        assert (x.double() - e).norm() <= bound * largest


def by(impl: str, window, documents):
    """A backend as a function of q, k, v and the sinks; those of a GPU without the ranking, which refuses a CPU."""
    direct = {"varlen": varlen, "flex": flex}
    if impl in direct:
        return lambda q, k, v, sinks: direct[impl](q, k, v, Call(q.shape[-1] ** -0.5, window, sinks, 0.0, documents))
    return lambda q, k, v, sinks: causal_attention(q, k, v, window=window, sinks=sinks, documents=documents, impl=impl)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("impl", ["cpu", "torch", "math", "varlen", "flex"])
def test_documents_by_every_backend(flash_kernels, flex_with_gradients, impl, chunks, window, with_sinks):
    documents = Documents(BOUNDARIES, CHUNKS[chunks])
    dtype, bound = (torch.float32, 1e-6) if impl == "cpu" else (torch.float64, 1e-12)
    inputs, dout = case(3, 4, 2, documents.queries, 200, 24, dtype, with_sinks)
    assert_equals_formula(by(impl, window, documents), inputs, dout, window, documents, bound)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("s", "t", "window"), [(200, 200, None), (130, 300, None), (200, 200, 130), (1, 70, 5),
                                                (140, 500, 100)])
@pytest.mark.parametrize("impl", ["flash", "math", "varlen", "flex"])
def test_whole_rows_by_every_backend(flash_kernels, flex_with_gradients, impl, s, t, window, with_sinks):
    inputs, dout = case(2, 4, 2, s, t, 20, torch.float64, with_sinks)
    assert_equals_formula(by(impl, window, None), inputs, dout, window, None, 1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), g=st.integers(1, 2), m=st.integers(1, 3), d=st.integers(1, 40), b=st.integers(1, 3),
       t=st.integers(2, 150), window=st.none() | st.integers(1, 160), with_sinks=st.booleans())
def test_any_documents_in_the_cpu_kernel(data, g, m, d, b, t, window, with_sinks):
    rows = [sorted({0, t, *data.draw(st.lists(st.integers(1, t - 1), max_size=5))}) for _ in range(b)]
    cuts = sorted(data.draw(st.sets(st.integers(0, t), min_size=2, max_size=4)))
    chunks = data.draw(st.none() | st.just(list(zip(cuts[::2], cuts[1::2], strict=False))))
    documents = Documents(rows, chunks)
    inputs, dout = case(b, g * m, g, documents.queries, t, d, torch.float32, with_sinks)
    assert_equals_formula(by("cpu", window, documents), inputs, dout, window, documents, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_on_every_instruction_set(instruction_set, threads, dtype):
    documents = Documents(BOUNDARIES, CHUNKS["rank 0 of 2"])
    inputs, dout = case(3, 6, 2, documents.queries, 200, 40, dtype, True)
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert_equals_formula(by("cpu", 30, documents), inputs, dout, 30, documents, bound)


@pytest.mark.parametrize("impl", ["cpu", "varlen", "flex"])
@pytest.mark.parametrize("window", [None, 9])
def test_packed_equals_each_document_alone(flash_kernels, flex_with_gradients, impl, window):
    """What a document gets in a packed row is bit for bit (cpu) or to 1e-6 what it gets alone, gradients too."""
    boundaries = [0, 5, 6, 70, 131]
    documents = Documents([boundaries])
    inputs, dout = case(1, 4, 2, 131, 131, 24, torch.float32, True)
    packed = gradients(by(impl, window, documents), inputs, dout)
    dsinks = torch.zeros(4)
    for a, b in itertools.pairwise(boundaries):
        alone = gradients(by(impl, window if window is not None and window < b - a else None, None),
                          [*(x[:, :, a:b] for x in inputs[:3]), inputs[3]], dout[:, :, a:b])
        for whole, part in zip(packed[:4], alone[:4], strict=True):
            torch.testing.assert_close(whole[:, :, a:b], part, rtol=1e-6, atol=1e-6)
            assert impl != "cpu" or torch.equal(whole[:, :, a:b], part)
        dsinks += alone[4]
    torch.testing.assert_close(packed[4], dsinks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "math", "varlen", "flex"])
def test_another_document_is_not_read(flash_kernels, impl):
    documents = Documents([[0, 40, 90]])
    (q, k, v), _ = case(1, 2, 1, 90, 90, 16, torch.float32, False)
    before = by(impl, None, documents)(q, k, v, None)
    k[:, :, :40], v[:, :, :40] = 1e6, -1e6
    assert torch.equal(by(impl, None, documents)(q, k, v, None)[:, :, 40:], before[:, :, 40:])


def test_keys_without_queries_have_no_gradient():
    documents = Documents([[0, 10, 30, 40]], [(12, 20)])
    (q, k, v), _ = case(1, 2, 1, 8, 40, 8, torch.float32, False)
    for leaf in (k.requires_grad_(), v.requires_grad_()):
        causal_attention(q, k, v, documents=documents, impl="cpu").sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[:, :, :10].abs().max() == leaf.grad[:, :, 20:].abs().max() == 0
        assert leaf.grad[:, :, 10:20].norm() > 0


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface", "transformer_engine"])
def test_packages_are_called_as_they_are(monkeypatch, package, packed, window):
    """flash-attn 2 and 3 and Transformer Engine, by stand-ins with their signatures."""
    documents = Documents(BOUNDARIES, CHUNKS["rank 1 of 2"]) if packed else None
    inputs, dout = case(3, 4, 2, 100 if packed else 150, 200, 16, torch.float64, False)
    if package == "transformer_engine":
        module = types.SimpleNamespace(DotProductAttention=fake_flash.DotProductAttention)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
        attention_packages._te_module.cache_clear()
    else:
        monkeypatch.setitem(sys.modules, package, fake_flash.FlashAttn(package == "flash_attn_interface"))

    def function(q, k, v, _sinks):
        call = Call(q.shape[-1] ** -0.5, window, None, 0.0, documents)
        if package == "transformer_engine":
            return attention_packages.transformer_engine(q, k, v, call)
        return attention_packages.flash_attn(q, k, v, call, package)

    assert_equals_formula(function, inputs, dout, window, documents, 1e-12)
    attention_packages._te_module.cache_clear()


def test_what_kernels_need_is_made_once():
    documents = Documents(BOUNDARIES)
    device = torch.device("cpu")
    assert documents.table(7) is documents.table(7)
    assert documents.table(7) is not documents.table(None)
    assert documents.packed(None, device) is documents.packed(None, device)
    q = torch.randn(3, 2, 200, 16)
    flex(q, q, q, Call(1.0, documents=documents))
    kept = documents.keep(("flex", None, device), lambda: pytest.fail("made again"))
    flex(q, q, q, Call(1.0, documents=documents))
    assert documents.keep(("flex", None, device), lambda: None) is kept


@pytest.mark.parametrize("window", [None, 1, 128, 200])
@pytest.mark.parametrize("chunks", [None, [(0, 128), (384, 500)], [(70, 300)]])
def test_tables_of_blocks_are_those_of_torch(window, chunks):
    """Against create_block_mask, which evaluates the mask everywhere."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents = Documents([[0, 128, 256, 500], [0, 3, 390, 500]], chunks)
    lowest_bs, position_s = documents.lowest(window, torch.device("cpu"))
    ours = block_mask(lowest_bs, position_s, 500)
    theirs = create_block_mask(ours.mask_mod, 2, None, documents.queries, 500, device="cpu")
    assert ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for row in range(2):
        for block in range(ours.kv_num_blocks.shape[-1]):
            for kind in ("", "full_"):
                count = getattr(ours, f"{kind}kv_num_blocks")[row, 0, block]
                found, expected = (set(getattr(mask, f"{kind}kv_indices")[row, 0, block, :count].tolist())
                                   for mask in (ours, theirs))
                assert found == expected


def test_segments():
    documents = Documents([[0, 4, 10], [0, 10]], [(0, 5), (5, 8)])
    assert [tuple(one) for one in documents.segments(None)] == [
        (0, 0, 4, 0, 4, 0), (0, 4, 1, 4, 1, 0), (0, 5, 3, 4, 4, 1), (1, 0, 5, 0, 5, 0), (1, 5, 3, 0, 8, 1)]
    assert [one[3:5] for one in documents.segments(2)] == [(0, 4), (4, 1), (4, 4), (0, 5), (4, 4)]
    lengths = documents.packed(None, torch.device("cpu"))
    assert lengths.cu_queries.tolist() == [0, 4, 5, 8, 13, 16]
    assert lengths.cu_keys.tolist() == [0, 4, 5, 9, 14, 22]
    assert lengths.keys == [(0, 0, 5), (0, 4, 8), (1, 0, 5), (1, 0, 8)]


@pytest.mark.parametrize(("boundaries", "chunks", "words"), [
    ([[1, 5]], None, "do not rise from 0"), ([[0, 5], [0, 6]], None, "do not rise from 0"),
    ([[0, 3, 3, 5]], None, "do not rise from 0"), ([[]], None, "do not rise from 0"),
    ([[0, 5]], [(2, 6)], "are not ranges"), ([[0, 5]], [(3, 3)], "are not ranges"),
])
def test_boundaries_that_are_not_are_refused(boundaries, chunks, words):
    with pytest.raises(ValueError, match=words):
        Documents(boundaries, chunks)


def test_documents_of_other_rows_are_refused():
    q = torch.randn(2, 2, 6, 8)
    for documents in (Documents([[0, 6]]), Documents([[0, 6]] * 2, [(0, 3)]), Documents([[0, 7]] * 2)):
        with pytest.raises(ValueError, match="but q has 2 of 6, and k 6"):
            causal_attention(q, q, q, documents=documents)


def test_library_contract_with_documents():
    documents = Documents([[0, 3, 10]] * 2, [(0, 4), (6, 10)])
    inputs, dout = case(2, 4, 2, 8, 10, 8, torch.float32, True)
    q, k, v, sinks = (x.requires_grad_() for x in inputs)
    options = (documents.table(None), 0.3, 10, 2)
    torch.library.opcheck(torch.ops.engine_kernels.causal_attention_fwd.default, (q, k, v, sinks, *options))
    out, lse = torch.ops.engine_kernels.causal_attention_fwd(*(x.detach() for x in (q, k, v, sinks)), *options)
    torch.library.opcheck(torch.ops.engine_kernels.causal_attention_bwd.default,
                          (dout, *(x.detach() for x in (q, k, v)), out, lse, *options))


def test_calls_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Call(1.0).scale = 2.0  # type: ignore[misc]
