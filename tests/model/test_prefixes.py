"""Documents that go on from another of their row: attention and whole models give what whole sequences give."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels import prefixes
from engine_kernels.attention import causal_attention
from engine_kernels.attention_flash import varlen
from engine_kernels.attention_flex import flex
from engine_kernels.attention_sdpa import Call
from engine_kernels.documents import Documents

# Two prompts of 40 and 30 tokens with two answers each, and of the second one only a beginning; a plain document.
ROWS = [[0, 40, 70, 75, 105, 115, 140, 150], [0, 9, 10, 30, 80, 150]]
PREFIXES = [[None, (0, 40), (0, 40), None, (75, 100), (75, 105), None], [None, (0, 9), (0, 9), None, (30, 80)]]
CHUNKS = {"whole": None, "rank 0 of 2": [(0, 37), (113, 150)], "rank 1 of 2": [(37, 75), (75, 113)]}
T = 150


@pytest.fixture
def gpu_kernels(monkeypatch):
    """Stand-ins for the kernels of GPUs; FlexAttention's check of the device says no otherwise."""
    import fake_flash
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    library = fake_flash.register()
    yield
    library._destroy()


def alone(q, k, v, sinks, window):
    """Every document attended as the whole sequence it is, in float64 and in plain torch: -> [b, h, t, d]."""
    repeats = q.shape[1] // k.shape[1]
    rows = []
    for row, (boundaries, before) in enumerate(zip(ROWS, PREFIXES, strict=True)):
        parts = []
        for (begin, stop), prefix in zip(itertools.pairwise(boundaries), before, strict=True):
            first, end = prefix or (0, 0)
            keys, values = (torch.cat([x[row, :, first:end], x[row, :, begin:stop]], 1).repeat_interleave(repeats, 0)
                            for x in (k, v))
            own = q[row, :, begin:stop]
            back = (torch.arange(own.shape[1])[:, None] + end - first) - torch.arange(keys.shape[1])
            scores = own @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
            scores = scores.masked_fill((back < 0) | (back >= (window or T)), -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], -1)
            parts.append(scores.softmax(-1)[..., : keys.shape[1]] @ values)
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows)


def by(impl, q, k, v, sinks, window, documents):
    if impl in ("varlen", "flex"):
        k, v, documents = prefixes.before_documents(k, v, documents)
        direct = {"varlen": varlen, "flex": flex}[impl]
        return direct(q, k, v, Call(q.shape[-1] ** -0.5, window, sinks, 0.0, documents))
    if impl == "formula":
        from engine_kernels.attention import causal_attention_reference

        return causal_attention_reference(q, k, v, q.shape[-1] ** -0.5, window, sinks, documents)
    return causal_attention(q, k, v, window=window, sinks=sinks, documents=documents, impl=impl)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 60])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("impl", ["cpu", "torch", "math", "varlen", "flex", "formula"])
def test_answers_see_their_prompt_by_every_backend(gpu_kernels, impl, chunks, window, with_sinks):
    documents = Documents(ROWS, CHUNKS[chunks], prefixes_b=PREFIXES)
    dtype, bound = (torch.float32, 2e-6) if impl == "cpu" else (torch.float64, 1e-12)
    inputs = [torch.randn(2, 4, T, 24).to(dtype), *(torch.randn(2, 2, T, 24).to(dtype) for _ in range(2))]
    inputs += [torch.randn(4).to(dtype)] if with_sinks else []
    ranges = documents.chunks_b[0]
    dout = torch.randn(2, 4, T, 24).to(dtype)

    def own(x):
        return torch.cat([x[:, :, first:end] for first, end in ranges], 2)

    def run(function, cast):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(own(dout).to(cast))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected = run(lambda q, k, v, sinks=None: own(alone(q, k, v, sinks, window)), torch.float64)
    found = run(lambda q, k, v, sinks=None: by(impl, own(q), k, v, sinks, window, documents), dtype)
    largest = max(x.norm() for x in expected)
    for x, e in zip(found, expected, strict=True):
        assert (x.double() - e).norm() <= bound * largest


@settings(max_examples=20, deadline=None)
@given(data=st.data(), prompts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
       window=st.none() | st.integers(1, 30))
def test_any_prompts_and_answers_equal_the_formula(data, prompts, window):
    boundaries, before = [0], []
    for length in prompts:
        at = boundaries[-1]
        boundaries.append(at + length)
        before.append(None)
        for _ in range(data.draw(st.integers(0, 3))):
            boundaries.append(boundaries[-1] + data.draw(st.integers(1, 9)))
            before.append((at, at + data.draw(st.integers(1, length))))
    t = boundaries[-1]
    cuts = sorted(data.draw(st.sets(st.integers(0, t), min_size=2, max_size=4)))
    chunks = data.draw(st.none() | st.just(list(zip(cuts[::2], cuts[1::2], strict=False))))
    documents = Documents([boundaries], chunks, prefixes_b=[before])
    q, k, v = torch.randn(1, 4, documents.queries, 8), torch.randn(1, 2, t, 8), torch.randn(1, 2, t, 8)
    results = []
    for impl in ("cpu", "formula"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = by(impl, *leaves, None, window, documents)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


def test_gradients_of_copies_are_added_in_fp32_and_the_same_every_time():
    documents = Documents(ROWS, prefixes_b=PREFIXES)
    k = torch.randn(2, 3, T, 8).to(torch.bfloat16)
    leaf, exact = k.clone().requires_grad_(), k.double().requires_grad_()
    spread, _, expanded = prefixes.before_documents(leaf, leaf, documents)
    grad = torch.randn(spread.shape).to(torch.bfloat16)
    spread.backward(grad)
    wide, _, _ = prefixes.before_documents(exact, exact, documents)
    wide.backward(grad.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    assert torch.equal(leaf.grad, exact.grad.float().to(torch.bfloat16))  # rounded once
    assert expanded.length == spread.shape[2] == 150 + 80 + 55
    assert expanded.boundaries_b[1][-2:] == [150 + 18 + 50, 285], "a shorter row ends in a document without queries"


@pytest.mark.parametrize(("before", "words"), [
    ([[None, (0, 40)]], "one for each document"), ([[None, None, (0, 41)]], "beginning"),
    ([[None, None, (1, 40)]], "beginning"), ([[None, (0, 40), (40, 50)]], "beginning"),
    ([[(0, 40), None, None]], "beginning"), ([[None, (50, 60), None]], "beginning"),
    ([[None, (0, 0), None]], "beginning"),
])
def test_prefixes_out_of_place_are_refused(before, words):
    with pytest.raises(ValueError, match=words):
        Documents([[0, 40, 50, 60]], prefixes_b=before)


def test_no_prefix_is_no_copy():
    k = torch.randn(1, 1, 10, 4)
    documents = Documents([[0, 4, 10]], prefixes_b=[[None, None]])
    assert documents.prefixes_b is None
    assert prefixes.before_documents(k, k, documents)[0] is k


PROMPT, CHOSEN, REJECTED = 6, 7, 4


def pair_rows(shared: bool, seed: int = 0, micro: int = 2):
    """The same pairs in rows of 40: the prompt once, or before each answer. Loss on the answers' tokens."""
    from engine.data.loader import Batch

    generator = torch.Generator().manual_seed(seed)
    length = 40
    parts: dict[str, list[torch.Tensor]] = {"tokens": [], "labels": [], "mask": [], "positions": []}
    cu, before = [], []
    for _ in range(micro):
        prompt, *answers = (torch.randint(5, tiny.VOCAB, (n,), generator=generator).tolist()
                            for n in (PROMPT, CHOSEN, REJECTED))
        row, labels, mask, positions, ends, prefix = [], [], [], [], [0], []
        if shared:
            row, labels, mask, positions = prompt[:-1], prompt[1:], [0] * (PROMPT - 1), list(range(PROMPT - 1))
            ends.append(len(row))
            prefix.append(None)
        for answer in answers:
            whole = prompt + answer
            first = PROMPT - 1 if shared else 0
            row, labels = row + whole[first:-1], labels + whole[first + 1 :]
            mask += [int(i >= PROMPT - 1) for i in range(first, len(whole) - 1)]
            positions += list(range(first, len(whole) - 1))
            ends.append(len(row))
            prefix.append((0, PROMPT - 1) if shared else None)
        left = length - len(row)
        cu.append(torch.tensor([*ends, length], dtype=torch.int32))
        before.append([*prefix, None])
        for name, values, fill in (("tokens", row, [0] * left), ("labels", labels, [0] * left),
                                   ("mask", mask, [0] * left), ("positions", positions, list(range(left)))):
            parts[name].append(torch.tensor(values + fill))
    tokens, labels, mask, positions = (torch.stack(parts[n]) for n in ("tokens", "labels", "mask", "positions"))
    return Batch(tokens, labels, mask.float(), positions, cu, before if shared else None)


class Rows:
    """A loader of nothing but these."""

    def __init__(self, shared: bool):
        self.shared = shared

    def micro_batches(self, position, *, global_batch_size, micro_batch_size, seq_length):
        for micro in range(global_batch_size // micro_batch_size):
            yield pair_rows(self.shared, position + micro, micro_batch_size)


MODELS = {
    "plain": {},
    "windows and sinks": {"model__window_size": 5, "model__full_attention_every": 2, "model__attention_sinks": True},
    "torch": {"model__kernels": "torch", "model__attention_backend": "math", "model__qk_norm": True},
    "recomputed": {"train__recompute": "full"},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_the_same_from_shared_prompts(config, name):
    found = []
    for shared in (False, True):
        tiny.forget_layout()
        run = tiny.start(config(model__seq_length=40, train__micro_batch_size=2, **MODELS[name]))
        run.data = Rows(shared)
        result = run.step()
        gradients = tiny.whole_weights(run, lambda p: p.main_grad)
        found.append((result.sums, gradients))
    (sums, apart), (shared_sums, together) = found
    assert shared_sums.tokens == sums.tokens == 4 * (CHOSEN + REJECTED)
    assert shared_sums.loss == pytest.approx(sums.loss, rel=1e-6)
    for key, gradient in apart.items():
        assert (together[key] - gradient).norm() <= 2e-6 * gradient.norm(), key
