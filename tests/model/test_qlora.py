"""Adapters on a base of NF4 codes: the same model under every layout, loaded layer by layer, trained as its dequantised
weights would be."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import lora_runs
import pytest
import qlora_runs
import tiny
import torch
from qlora_runs import COMMON, SHAPES, assert_quantised, qlora, quantised, through_nf4

from engine.config import Config, LoraConfig
from engine.config.nf4 import BLOCK
from engine.errors import UserError
from engine_kernels import nf4

DOUBLE = {"double_quant": True}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """An ordinary checkpoint of each shape, saved by one rank, and its unsplit weights."""
    return functools.cache(lambda shape: qlora_runs.trained(corpus, tmp_path_factory.mktemp(shape), shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lora", [{}, DOUBLE], ids=["single", "double"])
def test_a_checkpoint_is_quantised_weight_by_weight(config, trained, shape, lora):
    checkpoint, weights = trained(shape)
    chunks = qlora_runs.loaded(qlora(config(**COMMON | SHAPES[shape]), **lora), checkpoint)
    assert_quantised(qlora_runs.dequantised(chunks), weights, bool(lora))
    for name, p in chunks[0].named_parameters():  # the rest is as it was
        assert ".adapter." in name or torch.equal(p[:len(weights[name])], weights[name]), name
        assert not quantised(name, p) or ".adapter." in name


@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_that_of_the_dequantised_weights(config, shape):
    """Losses and gradients of the adapters, but for what sums of another order cost."""
    cfg = config(**COMMON | SHAPES[shape])
    found = lora_runs.three_steps(qlora(cfg))
    run = tiny.start(qlora(cfg, base="none"), masked=True)
    expected = _three_steps_dequantised(run)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, value in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], value, rtol=1e-5, atol=1e-6)


def _three_steps_dequantised(run: tiny.Run) -> dict[str, Any]:
    """``lora_runs.three_steps`` of a model whose weights went through NF4 and back."""
    from engine.model import whole

    with torch.no_grad():
        for name, p in whole.global_names(run.chunks[0]).items():
            if quantised(name, p) and ".adapter." not in name:
                p.copy_(through_nf4(name, p, False))
    lora_runs.randomise(run.chunks)
    for inner in run.optimizer.chained_optimizers:
        if not inner.is_stub_optimizer:
            inner.reload_model_params()
    results = [run.step()]
    gradients = lora_runs.adapters_only(tiny.whole_weights(run, lora_runs.gradient))
    results += [run.step(), run.step()]
    return {"losses": [r.sums.loss for r in results], "gradients": gradients}


@pytest.mark.parametrize("lora", [{}, DOUBLE], ids=["single", "double"])
def test_experts_in_one_launch(config, lora):
    """All experts' codes dequantised at once for the grouped kernels: what a loop over the experts gives."""
    from engine.model import experts, quantized

    changes = {"model__moe": SHAPES["gpt_oss"]["model__moe"] | {"ffn_hidden_size": 64}, "model__num_layers": 1,
               "model__linear_bias": True, "model__hidden_size": 64}
    (model,), _ = qlora_runs.chunks_of(qlora(config(**COMMON | changes), **lora))
    linears: Any = [expert.linear_fc1 for expert in model.decoder.layers[0].mlp.experts.local_experts]
    weights, biases = [linear.weight for linear in linears], [torch.randn_like(linear.bias) for linear in linears]
    assert isinstance(quantized.dense_experts(weights, "torch"), quantized.Experts)
    whole: Any = quantized.dense_experts(weights, "triton")
    assert torch.equal(whole, torch.stack([weight.dense() for weight in weights]))
    tokens_e = torch.tensor([3, 0, 5, 2])
    found = []
    for impl in ("torch", "triton"):
        x_pk = torch.randn(10, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y_pm: Any = experts._GroupedLinear.apply(x_pk, tokens_e, None, impl, *weights, *biases)
        y_pm.square().sum().backward()
        expected = torch.cat([part @ weight.dense().t() + bias for part, weight, bias in
                              zip(x_pk.detach().split(tokens_e.tolist()), weights, biases, strict=True)])
        torch.testing.assert_close(y_pm.detach(), expected, rtol=1e-5, atol=1e-5)
        found.append(x_pk.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert found[0].any()


def test_memory_of_the_base(config):
    """4.5 bits a weight, 4.1 with scales in 8 bits; nothing else of its size, before, in, or after a step."""
    from engine.model import build, quantized

    cfg = config(**COMMON | SHAPES["mixtral"])
    plain = build.parameter_count(tiny.start(qlora(cfg, base="none")).chunks)
    tiny.forget_layout()
    run = tiny.start(qlora(cfg))
    assert build.parameter_count(run.chunks) == plain
    held = quantized.weights(run.chunks[0])
    for weight in held.values():
        assert weight.nbytes * 8 == 4.5 * weight.numel()
        assert sum(t.untyped_storage().nbytes() for t in weight.packed.tensors()) in (
            weight.nbytes, 4 * weight.nbytes)  # experts share their layer's memory
    run.step()
    in_parameters = sum(p.numel() for chunk in run.chunks for p in chunk.parameters())
    assert in_parameters == plain - sum(weight.numel() for weight in held.values())
    assert not any(buffer.main_grad is not None for name, buffer in run.chunks[0].named_parameters()
                   if ".adapter." not in name and getattr(buffer, "main_grad", None) is not None)


def test_no_weight_is_kept_for_the_backward_pass(config):
    run = tiny.start(qlora(config(**COMMON | SHAPES["mixtral"])))
    shapes = {tuple(weight.shape) for weight in _weights(run).values()}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.step()
    assert kept
    assert not shapes & set(kept), shapes & set(kept)


def _weights(run: tiny.Run) -> dict[str, Any]:
    from engine.model import quantized

    return quantized.weights(run.chunks[0])


def test_a_blank_weight_is_not_multiplied_with(config, tmp_path):
    cfg = qlora(config(**COMMON)).model_copy(update={"init_from": str(tmp_path)})
    chunks, _ = qlora_runs.chunks_of(cfg)
    with pytest.raises(AssertionError, match=r"layers\.0\.self_attention\.linear_qkv\.weight was never loaded"):
        chunks[0](torch.zeros(1, tiny.SEQ, dtype=torch.long), torch.arange(tiny.SEQ)[None], None)


def test_training_in_bf16(config):
    """The base is dequantised to bf16, and adapters learn."""
    run = tiny.start(qlora(config(**COMMON | SHAPES["mixtral"], train__precision="bf16", train__max_steps=12)))
    assert {weight.dtype for weight in _weights(run).values()} == {torch.bfloat16}
    assert all(weight.packed.absmax.dtype == torch.float32 for weight in _weights(run).values())
    before = {name: weight.dense() for name, weight in _weights(run).items()}
    losses = [run.step().sums.loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(weight.dense(), before[name]) for name, weight in _weights(run).items())


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__hidden_size": 96}, "lora.base: nf4 has blocks of 64 input features, which 96 on a rank "
     "(model.hidden_size, parallel.tensor 1) are no multiple of. Use lora.base none"),
    ({"parallel__tensor": 4}, "lora.base: nf4 has blocks of 64 input features, which 32 on a rank (model.head_dim, "
     "parallel.tensor 4) are no multiple of. Use parallel.tensor 2, or lora.base none"),
    ({"model__ffn_hidden_size": 192, "parallel__tensor": 2}, "lora.base: nf4 has blocks of 64 input features, which 96 "
     "on a rank (model.ffn_hidden_size, parallel.tensor 2) are no multiple of. Use parallel.tensor 1, or lora.base "
     "none"),
    ({"model__moe": {"num_experts": 4, "ffn_hidden_size": 192}, "parallel__tensor": 2, "parallel__expert_tensor": 2,
      "parallel__sequence_parallel": True},
     "lora.base: nf4 has blocks of 64 input features, which 96 on a rank (model.moe.ffn_hidden_size, "
     "parallel.expert_tensor 2) are no multiple of. Use parallel.expert_tensor 1, or lora.base none"),
    ({"train__fp8": True}, "train.fp8: multiplies weights in 8 bits, but lora holds frozen ones in 4. Use train.fp8 "
     "false (--no-fp8)"),
    ({"model__backend": "te"}, "model.backend: te has no adapters (lora). Use backend engine"),
    ({"lora__base": "none", "lora__double_quant": True},
     "lora.double_quant: quantises the scales of nf4, but lora.base is none. Set lora.base to nf4"),
])
def test_refusals(changes, message):
    values = {"stage": "lora", "lora__base": "nf4", "examples__train": [{"path": "rows.jsonl"}],
              "model__num_layers": 2} | COMMON | changes
    values = {name.replace("__", "."): value for name, value in values.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        Config().with_values(values)


def test_blocks_on_two_ranks_are_refused_without_the_configuration(config):
    """A model that is loaded for evaluation goes through no such checks."""
    with pytest.raises(UserError, match=r"lora\.base: NF4 has blocks of 64 input features, but a layer here has 96"):
        qlora_runs.chunks_of(qlora(config(**COMMON | {"model__ffn_hidden_size": 96})))


def test_the_configuration_knows_the_block():
    assert BLOCK == nf4.BLOCK
    assert LoraConfig(base="nf4").double_quant is False


def in_4_bits(model: Any) -> Any:
    """A Transformers model with its decoder's linear layers as bitsandbytes holds them on a CPU."""
    import bitsandbytes

    nn: Any = bitsandbytes.nn
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            quantised_one = nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4",
                compress_statistics=False)
            quantised_one.weight = nn.Params4bit(
                module.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False,
                module=quantised_one)
            quantised_one.to("cpu")  # quantises
            assert quantised_one.weight.dtype == torch.uint8
            parent = model.model.layers.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], quantised_one)
    model.is_loaded_in_4bit = True
    return model


def test_peft_on_bitsandbytes_computes_the_same(config, tmp_path: Path):
    """QLoRA as others run it: logits and the adapters' gradients, on the same weights."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    import hugging_face
    from peft import PeftModel

    from engine.export import peft as adapters
    from engine.model import lora, whole

    cfg = qlora(config(**COMMON), base="none")
    (plain,), groups = qlora_runs.chunks_of(cfg)
    weights = {name: value for name, value in whole.assemble([whole.parts([plain])], tiny.VOCAB).items()
               if not lora.is_adapter(name)}
    lora_runs.randomise([plain])
    adapters.save([plain], cfg, groups, tmp_path / "adapter")
    base = in_4_bits(hugging_face.model("Llama", weights, cfg.model, vocab_size=tiny.VOCAB))
    theirs: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).train()
    assert "4bit" in type(theirs.base_model.model.model.layers[0].mlp.up_proj).__name__

    (ours,), _ = qlora_runs.chunks_of(qlora(config(**COMMON)))
    lora_runs.randomise([ours])
    tokens_bs = torch.randint(0, tiny.VOCAB, (3, tiny.SEQ), generator=torch.Generator().manual_seed(0))
    places_bs = torch.arange(tiny.SEQ).expand_as(tokens_bs)
    found, expected = ours(tokens_bs, places_bs, None)[..., : tiny.VOCAB], theirs(tokens_bs).logits
    assert (found - plain(tokens_bs, places_bs, None)[..., : tiny.VOCAB]).abs().max() > 0.01, "it is not quantised"
    assert (found - expected).abs().max() < 1e-5
    for logits_bsv in (found, expected):
        torch.nn.functional.cross_entropy(logits_bsv.flatten(0, 1), tokens_bs.roll(-1, 1).flatten()).backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in whole.global_names(ours).items() if p.requires_grad}
    expected_of = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for entry in adapters.entries(cfg, cfg.lora.targets()):
        for name, value in adapters._to_peft(entry, gradients).items():
            assert (value - expected_of[name]).norm() <= 1e-5 * expected_of[name].norm(), name
            compared += 1
    assert compared == len(expected_of) == 2 * 7 * cfg.model.num_layers


def test_merging_dequantises(config):
    """The merged model is an ordinary one: its logits are those with adapters, its weights the codes' and the sum."""
    from engine.model import lora_merge, quantized, whole

    (model,), groups = qlora_runs.chunks_of(qlora(config(**COMMON | SHAPES["gpt_oss"]), **DOUBLE))
    lora_runs.randomise([model])
    before = qlora_runs.dequantised([model])
    tokens_bs = torch.randint(0, tiny.VOCAB, (2, tiny.SEQ))
    places_bs = torch.arange(tiny.SEQ).expand_as(tokens_bs)
    with torch.no_grad():
        found = model.eval()(tokens_bs, places_bs, None)
        merged = lora_merge.merge([model], groups)
        assert merged.changed == merged.total > 0
        assert (model(tokens_bs, places_bs, None) - found).abs().max() < 1e-5
    assert not quantized.weights(model)
    after = whole.assemble([whole.parts([model])], tiny.VOCAB)
    assert before.keys() <= after.keys()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_a_hugging_face_directory_is_quantised_weight_by_weight(config, trained, tmp_path: Path):
    """Read into codes: what an ordinary model of it is, quantised."""
    from engine.export import hugging_face as directories
    from engine.model import lora

    cfg = config(**COMMON)
    (plain,), groups = qlora_runs.chunks_of(cfg)
    tokenizer = cfg.data.path / "tokenizer"
    directories.save([plain], cfg, groups, tokenizer, tmp_path / "model", dtype="fp32")
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    cfg = qlora(cfg).model_copy(update={"init_from": str(tmp_path / "model")})
    chunks, groups = qlora_runs.chunks_of(cfg)
    with lora.detached(chunks):
        directories.load(tmp_path / "model", chunks, cfg, groups)
    assert_quantised(qlora_runs.dequantised(chunks), weights, False)


def test_full_weights_never_lie_in_memory_together(config, corpus, tmp_path: Path):
    """Of 32 layers' weights (4 MB each) the codes and, for a moment, a few copies of one."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's count of a process's peak memory")
    cfg = config(**COMMON | {"model__num_layers": 32, "model__hidden_size": 256, "model__ffn_hidden_size": 1024})
    run = tiny.start(cfg)
    full = sum(4 * p.numel() for name, p in run.chunks[0].named_parameters() if p.dim() == 2 and "layers" in name)
    checkpoint = str(run.save())
    del run
    cases = {"warm": {}, "nf4": {}}
    (tmp_path / "cases.json").write_text(json.dumps({
        name: {"config": tiny.to_json(cfg), "lora": lora, "checkpoint": checkpoint} for name, lora in cases.items()}))
    ranks = tiny.launch(Path(__file__).with_name("qlora_memory.py"), 1, tmp_path, timeout=120)
    assert [code for code, _ in ranks] == [0], ranks
    peak = json.loads((tmp_path / "nf4.json").read_text())["peak"]
    print(f"peak {peak / 1e6:.1f} MB of {full / 1e6:.1f} MB of weights")
    assert full * 4.5 / 32 < peak < 0.4 * full
