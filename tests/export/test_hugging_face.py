"""Every architecture read as Transformers writes it and written back: the same logits, the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import tiny
import torch

from engine.config import ModelConfig
from engine.data.tokenizer import load_tokenizer
from engine.export import families, hugging_face, names
from engine.model import build
from engine.parallel import topology


def read(directory: Path, output: Path, **changes):
    """(cfg, groups, chunks) of a model that was read."""
    cfg = tiny.config(directory, output, model=hugging_face.model_section(directory), **changes)
    groups = topology.build(cfg)
    chunks = build.model(cfg, groups, cfg.model.vocab_size)
    hugging_face.load(directory, chunks, cfg, groups)
    return cfg, groups, chunks


def write(read_model, directory: Path, tokenizer: Path, **options) -> Path:
    cfg, groups, chunks = read_model
    return hugging_face.save(chunks, cfg, groups, tokenizer, directory, **{"dtype": "fp32", **options})


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_every_architecture_is_read_and_written_back(name, corpus, tmp_path):
    """Two independent programs agree on the logits twice, and the files that Transformers wrote come back."""
    source, tokenizer = tmp_path / "hf", corpus / "tokenizer"
    theirs = hf_models.save(name, source, tokenizer)
    model = read(source, tmp_path / "run")
    loaded = None if name.startswith("qwen2") else load_tokenizer(tokenizer)  # see below
    assert hugging_face.verify(source, model[2], model[1], loaded) < 1e-4
    back = write(model, tmp_path / "back", tokenizer)
    hf_models.assert_same(hf_models.tensors(back), hf_models.tensors(source))
    assert hugging_face.verify(back, model[2], model[1], loaded) < 1e-4
    assert not list(tmp_path.glob("*.tmp"))
    # What is read again is the same model, and Transformers' own.
    again, first = (ModelConfig(**hugging_face.model_section(folder)) for folder in (back, source))
    assert again == first
    assert json.loads((back / "config.json").read_text())["architectures"] == [type(theirs).__name__]


def test_a_difference_is_seen(corpus, tmp_path):
    hf_models.save("llama", tmp_path / "hf", corpus / "tokenizer")
    _, groups, chunks = read(tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        chunks[0].decoder.layers[2].mlp.linear_fc2.weight[3, 5] += 0.05
    with pytest.raises(Exception, match=r"Transformers' logits differ from the engine's by .* \(at most 0\.0001\)"):
        hugging_face.verify(tmp_path / "hf", chunks, groups, None)


def test_transformers_5_form_of_experts_is_read(corpus, tmp_path):
    """In memory Transformers 5 holds all experts in one tensor, and saves them so on demand."""
    for name in ("mixtral", "qwen3_moe"):
        source = tmp_path / name
        theirs = hf_models.save(name, source, corpus / "tokenizer")
        before = hf_models.tensors(source)
        hf_models.rewrite(source, lambda _, theirs=theirs: {k: v.clone() for k, v in theirs.state_dict().items()})
        assert "model.layers.1.mlp.experts.gate_up_proj" in hf_models.tensors(source)
        model = read(source, tmp_path / "run")
        back = write(model, tmp_path / f"{name} back", corpus / "tokenizer")
        hf_models.assert_same(hf_models.tensors(back), before)


def packed(weights_ehf: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random MXFP4 of this shape (GPT-OSS's [experts, in, out]): blocks, scales, and what Transformers makes of them.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, inner, outer = weights_ehf.shape
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(110, 130, (experts, outer, inner // 32), dtype=torch.uint8, generator=g)
    return blocks, scales, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def test_mxfp4_of_gpt_oss_is_read(corpus, tmp_path):
    source, plain = tmp_path / "mxfp4", {}

    def pack(tensors):
        found = dict(tensors)
        for i, (name, value) in enumerate(sorted(tensors.items())):
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                del found[name]
                found[f"{name}_blocks"], found[f"{name}_scales"], plain[name] = packed(value, i)
            else:
                plain[name] = value
        return found

    hf_models.save("gpt_oss", source, corpus / "tokenizer")
    hf_models.rewrite(source, pack)
    hf_models.edit_config(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    back = write(read(source, tmp_path / "run"), tmp_path / "back", corpus / "tokenizer")
    hf_models.assert_same(hf_models.tensors(back), plain)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_mxfp4_decodes_every_code_and_scale():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from engine.export.files import mxfp4

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(254, 1, 1)
    scales = torch.arange(1, 255, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
    found = mxfp4(blocks, scales)
    assert torch.equal(found, expected)
    assert found[126, :4].tolist() == [0.0, 0.0, 0.5, 0.0], "the low half of a byte comes first"


def test_leftovers_that_follow_from_the_rest_are_accepted(corpus, tmp_path):
    """Old rotary buffers, and a stored head that is the tied embedding."""
    source = tmp_path / "hf"
    hf_models.save("llama 3", source, corpus / "tokenizer")
    before = hf_models.tensors(source)
    assert "lm_head.weight" not in before
    hf_models.rewrite(source, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    back = write(read(source, tmp_path / "run"), tmp_path / "back", corpus / "tokenizer")
    hf_models.assert_same(hf_models.tensors(back), before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_survive_fp32_and_shards(corpus, tmp_path, dtype):
    source, tokenizer = tmp_path / "hf", corpus / "tokenizer"
    hf_models.save("mixtral", source, tokenizer, dtype=hugging_face.DTYPES[dtype], shard="30KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    back = write(read(source, tmp_path / "run"), tmp_path / "back", tokenizer, dtype=dtype, max_shard_gb=3e-5)
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 35_000 for file in files)
    hf_models.assert_same(hf_models.tensors(back), hf_models.tensors(source))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in hf_models.tensors(back).values())


def test_every_element_of_a_stored_tensor_is_used_once():
    """The map itself, at the shapes of the published models."""
    for preset, form in (("8b", None), ("mixtral_8x7b", "w1_w2_w3"), ("mixtral_8x7b", "stacked"),
                         ("qwen3_30b_a3b", "gate_up_down"), ("20b_moe", "gpt_oss")):
        m = ModelConfig(preset=preset, **({"num_layers": 2} if preset != "8b" else {}))
        found = names.entries(m, 1000, form)
        stored = names.stored(found)
        covered = dict.fromkeys(stored, 0)
        for entry in found:
            for piece in entry.pieces:
                covered[piece.name] += piece.rows * (entry.columns or 1)
        assert covered == {name: torch.Size(s.shape).numel() for name, s in stored.items()}
        units = names.units(found)
        assert sum(map(len, units)) == len(found)
        in_units = [name for unit in units for name in names.stored(unit)]
        assert in_units == list(dict.fromkeys(in_units)) == list(stored)


HUB = {
    # What stands in config.json of the published models, where the model follows from it.
    "8b": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
           "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
           "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
           "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
           "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
           "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
           "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256},
    "mixtral_8x7b": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
                     "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
                     "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
                     "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
                     "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
                     "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
                     "tie_word_embeddings": False, "vocab_size": 32000},
    "qwen3_30b_a3b": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
                      "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
                      "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
                      "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
                      "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
                      "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
                      "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
                      "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
                      "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
                      "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
    "20b_moe": {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True,
                "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
                "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
                "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072,
                "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64,
                "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
                "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-05,
                "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
                "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                                 "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
                "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
                "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
                "vocab_size": 201088},
}  # fmt: skip


@pytest.mark.parametrize("preset", HUB)
def test_published_configurations_are_the_presets(preset, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB[preset]))
    found = ModelConfig(**hugging_face.model_section(tmp_path))
    known = ModelConfig(preset=preset)
    for name in ModelConfig.model_fields:
        if name in ("moe", "seq_length", "preset", "vocab_multiple"):
            continue
        assert getattr(found, name) == getattr(known, name), name
    assert found.seq_length == HUB[preset]["max_position_embeddings"]
    if known.moe is not None and found.moe is not None:
        assert found.moe.model_copy(update={"aux_loss_coeff": known.moe.aux_loss_coeff}) == known.moe


def test_llama_3_1_and_qwen_with_yarn(tmp_path):
    """131,072 tokens are more than 8 x 8,192, and the older name of the kind of scaling."""
    llama = HUB["8b"] | {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    found = ModelConfig(**hugging_face.model_section(tmp_path))
    assert found.seq_length == 131072
    assert found.llama3_rope is not None
    assert found.llama3_rope.factor == 8
    qwen = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_window_layers": 28,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 131072,
            "use_sliding_window": False, "rope_scaling": {
                "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    found = ModelConfig(**hugging_face.model_section(tmp_path))
    assert found.yarn is not None
    assert (found.yarn.truncate, found.yarn.factor, found.window_size, found.attention_bias) == (True, 4, None, True)


def test_only_what_transformers_computes_is_exported(corpus, tmp_path):
    base = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    moe = {"num_experts": 4, "top_k": 2}
    for changes, message in (
        ({"activation": "quick_geglu"}, "nearest llama has no activation quick_geglu"),
        ({"qk_norm": True, "attention_bias": True}, "nearest qwen2 has no qk_norm True"),
        ({"window_size": 4, "full_attention_every": 2}, "nearest llama has no windows in some layers"),
        ({"moe": moe | {"shared_ffn_hidden_size": 8}}, "nearest mixtral has no moe.shared_ffn_hidden_size 8"),
        ({"moe": moe | {"router": "sigmoid", "expert_bias": True}}, "mixtral has no moe.router sigmoid, moe.expert_b"),
        ({"moe": moe | {"num_dense_layers": 1}}, "mixtral has no moe.num_dense_layers some"),
        ({"rotary_percent": 0.5}, "llama has no rotary_percent 0.5"),
    ):
        with pytest.raises(Exception, match=message):
            families.family_of(ModelConfig(**base, **changes))
    assert families.family_of(ModelConfig(**base)).model_type == "llama"
    assert families.family_of(ModelConfig(**base), "mistral").model_type == "mistral"
    with pytest.raises(Exception, match=r"model: Transformers' llama has no qk_norm True\. Those that can be exported"):
        families.family_of(ModelConfig(**base, qk_norm=True), "llama")
