"""Attention in the model: windows, sinks, YaRN and rows of documents, against Transformers and against plain rows."""

from __future__ import annotations

import hugging_face
import pytest
import tiny
import torch

from engine.config.model import Llama3RopeConfig, YarnConfig
from engine.data.loader import Batch
from engine.evaluation.generation import Sampling, generate
from engine.model import build, forward, rotary, whole
from engine.model.objective import NEXT_TOKEN
from engine.parallel import context, topology
from engine_kernels import jit

WINDOWED = {"model__window_size": 5, "model__full_attention_every": 2}
SHAPES = {
    "window": {"model__window_size": 3},
    "some layers see all": WINDOWED,
    "sinks": {"model__attention_sinks": True},
    "yarn": {"model__yarn": {"factor": 4.0, "original_seq_length": 8}, "model__rotary_base": 100.0},
    "llama 3": {"model__llama3_rope": {"factor": 4.0, "original_seq_length": 8}, "model__rotary_base": 100.0},
    "norms of queries and keys": {"model__qk_norm": True, "model__activation": "quick_geglu"},
    "gpt-oss": WINDOWED | {"model__attention_sinks": True, "model__attention_bias": True, "model__head_dim": 16,
                           "model__yarn": {"factor": 32.0, "original_seq_length": 16}},
}


def bare_model(cfg):
    model = build.model(cfg, topology.build(cfg), tiny.VOCAB)[0]
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):  # sinks and biases that are seen
            if p.dim() == 1:
                g = torch.Generator().manual_seed(i)
                p.add_(torch.randn(p.shape, generator=g), alpha=0.3 if "norm" in name else 1.0)
    return model


def rows(length: int, count: int = 2, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens_bs, labels_bs = (torch.randint(0, tiny.VOCAB, (count, length), generator=g) for _ in range(2))
    mask_bs = (torch.rand(count, length, generator=g) < 0.8).float()
    return Batch(tokens_bs, labels_bs, mask_bs, torch.arange(length).repeat(count, 1))


def loss_and_gradients(model, batches: list[Batch]):
    """Of the sum over batches, through the engine's own forward step."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        output, loss_function = forward._forward_step(iter([batch]), model, objective=NEXT_TOKEN, groups=None)
        loss = loss_function(output)[0]
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected, bound: float):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert loss.item() == pytest.approx(expected_loss.item(), rel=bound)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert expected_grads[name].norm() > 0, name
        assert (grad - expected_grads[name]).norm() <= bound * expected_grads[name].norm(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_engine_equals_reference_backend(config, shape):
    found, expected = (loss_and_gradients(bare_model(config(model__backend=name, **SHAPES[shape])), [rows(tiny.SEQ)])
                       for name in ("engine", "reference"))
    assert_close(found, expected, 3e-6)


@pytest.mark.skipif(not jit.interpreted(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("shape", ["llama 3", "norms of queries and keys", "gpt-oss"])
def test_triton_kernels_equal_reference_backend(config, shape, recompute):
    """Keys turn inside the projection, whose view (with a bias or not) autograd then has to follow."""
    kernels = {"model__kernels": "triton", "train__recompute": recompute}
    found, expected = (loss_and_gradients(bare_model(config(**extra, **SHAPES[shape])), [rows(tiny.SEQ)])
                       for extra in (kernels, {"model__backend": "reference"}))
    assert_close(found, expected, 3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_changes_nothing(config, shape):
    model = bare_model(config(**SHAPES[shape]))
    sampling = Sampling(max_new_tokens=9, temperature=0.0)
    cached, whole = (generate(model, [5, 9, 200, 7], sampling, eod_id=None, use_cache=use) for use in (True, False))
    assert cached == whole
    assert len(cached[0]) == 9


@pytest.mark.parametrize("shape", ["window", "some layers see all"])
def test_a_window_hides_what_is_before_it(config, shape):
    """Through two layers of 3 keys a token reaches 4 back; with one layer that sees all, every token before."""
    model = bare_model(config(**SHAPES[shape])).eval()
    tokens_bs, changed = rows(tiny.SEQ).tokens_bs, rows(tiny.SEQ).tokens_bs
    changed[:, 4] += 1
    positions_bs = torch.arange(tiny.SEQ).expand_as(tokens_bs)
    with torch.no_grad():
        one, other = (model(t % tiny.VOCAB, positions_bs, None) for t in (tokens_bs, changed))
    differs = (one != other).any(-1).any(0).tolist()
    reached = range(4, 9) if shape == "window" else range(4, tiny.SEQ)
    assert [i for i, d in enumerate(differs) if d] == list(reached)


def packed(documents: list[Batch]) -> Batch:
    """One row of documents, one behind another."""
    ends = torch.tensor([0] + [d.tokens_bs.shape[1] for d in documents]).cumsum(0).int()
    parts = [torch.cat([getattr(d, name) for d in documents], dim=1)
             for name in ("tokens_bs", "labels_bs", "loss_mask_bs", "position_ids_bs")]
    return Batch(*parts, cu_seqlens_b=[ends])


def stacked(one: Batch, other: Batch) -> Batch:
    parts = [torch.cat([getattr(one, name), getattr(other, name)])
             for name in ("tokens_bs", "labels_bs", "loss_mask_bs", "position_ids_bs")]
    assert one.cu_seqlens_b
    assert other.cu_seqlens_b
    return Batch(*parts, cu_seqlens_b=one.cu_seqlens_b + other.cu_seqlens_b)


@pytest.mark.parametrize("shape", [{}, {"model__qk_norm": True}, SHAPES["gpt-oss"], {"train__recompute": "full"},
                                   {"train__recompute": "selective"}])
def test_documents_of_a_row_do_not_see_each_other(config, shape):
    model = bare_model(config(**shape))
    documents = [rows(length, 1, seed=length) for length in (5, 1, 7, 3, 10, 6)]
    expected = loss_and_gradients(model, documents)
    both = stacked(packed(documents[:4]), packed(documents[4:]))
    assert_close(loss_and_gradients(model, [both]), expected, 1e-6)
    both.cu_seqlens_b = None  # they would see each other
    with pytest.raises(AssertionError):
        assert_close(loss_and_gradients(model, [both]), expected, 1e-6)


@pytest.mark.parametrize("boundaries", [[0, 5], [1, 16], [0, 5, 5, 16], [0, 9, 4, 16]])
def test_boundaries_that_are_not_are_refused(config, boundaries):
    batch = rows(tiny.SEQ, 1)
    batch.cu_seqlens_b = [torch.tensor(boundaries, dtype=torch.int32)]
    with pytest.raises(ValueError, match="do not rise from 0 to the row's 16 tokens"):
        loss_and_gradients(bare_model(config()), [batch])


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("dim", "base", "factor", "original", "fast", "slow"), [
    (64, 150000.0, 32.0, 4096, 32.0, 1.0),  # GPT-OSS, which does not truncate
    (128, 1e6, 4.0, 32768, 32.0, 1.0),  # Qwen3 with YaRN, which does
    (16, 10000.0, 8.0, 64, 16.0, 2.0),
    (8, 10000.0, 1.0, 16, 32.0, 1.0),
])
def test_yarn_is_that_of_transformers(dim, base, factor, original, fast, slow, truncate):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = transformers.GptOssConfig(head_dim=dim, rope_parameters={
        "rope_type": "yarn", "rope_theta": base, "factor": factor, "beta_fast": fast, "beta_slow": slow,
        "original_max_position_embeddings": original, "truncate": truncate})
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](settings, torch.device("cpu"))
    turning = rotary.Rotary.of(dim, base, YarnConfig(factor=factor, original_seq_length=original, beta_fast=fast,
                                                     beta_slow=slow, truncate=truncate))
    torch.testing.assert_close(turning.frequencies().float(), expected, rtol=2e-6, atol=0)
    assert turning.magnitude == pytest.approx(magnitude)
    cos_sr, sin_sr = rotary.table(turning, 3, 4, torch.device("cpu"))
    angles = torch.outer(torch.arange(3.0, 7.0), expected)
    torch.testing.assert_close(cos_sr, angles.cos() * magnitude, rtol=0, atol=2e-5)
    torch.testing.assert_close(sin_sr, angles.sin() * magnitude, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dim", "base", "factor", "original", "low", "high"), [
    (128, 500000.0, 8.0, 8192, 1.0, 4.0),  # Llama 3.1
    (64, 500000.0, 32.0, 8192, 1.0, 4.0),  # Llama 3.2 1B
    (16, 10000.0, 4.0, 64, 2.0, 3.0),
    (8, 10000.0, 1.0, 16, 1.0, 4.0),
])
def test_llama3_scaling_is_that_of_transformers(dim, base, factor, original, low, high):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = transformers.LlamaConfig(head_dim=dim, rope_parameters={
        "rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original})
    expected, magnitude = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    turning = rotary.Rotary.of(dim, base, llama3=Llama3RopeConfig(
        factor=factor, original_seq_length=original, low_freq_factor=low, high_freq_factor=high))
    torch.testing.assert_close(turning.frequencies().float(), expected, rtol=2e-6, atol=0)
    assert turning.magnitude == magnitude == 1.0
    plain = rotary.Rotary.of(dim, base).frequencies()
    assert factor == 1.0 or (plain > turning.frequencies()).any()


def test_llama3_scaling_reaches_the_model(config):
    assert bare_model(config()).config.rotary.llama3 is None
    stretched = bare_model(config(**SHAPES["llama 3"])).config.rotary
    assert stretched.llama3 == rotary.Llama3(4.0, 8, low_freq_factor=1.0, high_freq_factor=4.0)


def test_gpt_oss_attention_is_that_of_transformers(config):
    """Window, sinks, biases, grouped queries and YaRN at once: one layer's attention on the same hidden states."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss import modeling_gpt_oss as theirs

    cfg = config(**SHAPES["gpt-oss"])
    m, model = cfg.model, bare_model(cfg).eval()
    settings = GptOssConfig(
        hidden_size=m.hidden_size, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=m.window_size,
        rope_parameters={"rope_type": "yarn", "rope_theta": m.rotary_base, "factor": 32.0, "truncate": False,
                         "original_max_position_embeddings": 16})
    settings._attn_implementation = "eager"
    hidden_bsh = torch.randn(2, tiny.SEQ, m.hidden_size)
    turn = theirs.GptOssRotaryEmbedding(settings)(hidden_bsh, torch.arange(tiny.SEQ)[None])
    for index, layer in enumerate(model.decoder.layers):
        ours = layer.self_attention
        attention = theirs.GptOssAttention(settings, index)
        fused = {kind: getattr(ours.linear_qkv, kind).unflatten(0, (2, 4, 16)) for kind in ("weight", "bias")}
        state = {f"{name}_proj.{kind}": x[:, which].flatten(0, 2 if which == slice(0, 2) else 1)
                 for kind, x in fused.items() for name, which in (("q", slice(0, 2)), ("k", 2), ("v", 3))}
        state |= {"sinks": ours.core_attention.softmax_offset, "o_proj.weight": ours.linear_proj.weight,
                  "o_proj.bias": torch.zeros(m.hidden_size)}
        attention.load_state_dict(state, strict=True)
        window = m.window_size if index == 0 else tiny.SEQ
        hidden = torch.ones(tiny.SEQ, tiny.SEQ).tril().triu(1 - window) == 0
        with torch.no_grad():
            expected = attention(hidden_bsh, position_embeddings=turn,
                                 attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))[0]
            found = ours(hidden_bsh.transpose(0, 1))[0].transpose(0, 1)
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_equals_mistral(config):
    cfg = config(model__window_size=5)
    model = bare_model(cfg).eval()
    theirs = hugging_face.model("Mistral", whole.assemble([whole.parts([model])], tiny.VOCAB), cfg.model,
                                vocab_size=tiny.VOCAB, sliding_window=5)
    batch = rows(tiny.SEQ)
    with torch.no_grad():
        expected = theirs(batch.tokens_bs).logits
        found = model(batch.tokens_bs, batch.position_ids_bs, None)[..., : tiny.VOCAB]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4


def test_sinks_are_drawn_and_not_decayed(config):
    run = tiny.start(config(model__attention_sinks=True))
    sinks = [p for name, p in tiny.unwrapped(run).named_parameters() if name.endswith("softmax_offset")]
    assert len(sinks) == 2
    assert all(p.shape == (4,) and 0.02 < p.std() < 0.3 for p in sinks)  # init_std 0.08
    undecayed = [p for inner in run.optimizer.chained_optimizers for group in inner.optimizer.param_groups
                 if group["wd_mult"] == 0.0 for p in group["params"]]
    assert all(any(p is q for q in undecayed) for p in sinks)
    before = [p.clone() for p in sinks]
    run.step()
    assert all(not torch.equal(p, old) for p, old in zip(sinks, before, strict=True))


def test_a_checkpoint_holds_the_sinks(config):
    run = tiny.start(config(model__attention_sinks=True))
    run.step()
    path = run.save()
    other = tiny.start(config(model__attention_sinks=True, seed=4321))
    other.load(path)
    for (name, p), (_, q) in zip(tiny.unwrapped(run).named_parameters(), tiny.unwrapped(other).named_parameters(),
                                 strict=True):
        assert torch.equal(p, q), name


class Place:
    """Stands for rank ``number`` of a group of ``count``."""

    def __init__(self, number: int, count: int):
        self.rank, self.size = lambda: number, lambda: count


def test_ranks_share_a_sequence_evenly():
    x_bs = torch.arange(2 * 24).view(2, 24)
    shares = [context.slice_sequence(x_bs, Place(r, 3)) for r in range(3)]
    assert [share[0].tolist() for share in shares] == [
        [0, 1, 2, 3, 20, 21, 22, 23], [4, 5, 6, 7, 16, 17, 18, 19], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert torch.equal(torch.cat(shares, 1).sort(1).values, x_bs)
    seen = [sum(p + 1 for p in context.positions(24, Place(r, 3)).tolist()) for r in range(3)]
    assert len(set(seen)) == 1, "causal attention costs ranks differently"
    assert context.slice_sequence(x_bs, Place(0, 1)) is x_bs
