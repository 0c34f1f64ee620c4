"""Directories that are not what they should be: one line that names the file, the tensor or the setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hf_models
import pytest
import tiny
import torch

from engine.errors import UserError
from engine.export import hugging_face
from engine.model import build
from engine.parallel import topology


@pytest.fixture(scope="module")
def sources(corpus, tmp_path_factory) -> dict[str, Path]:
    """A model in one file, in several, and one with experts."""
    folder = tmp_path_factory.mktemp("sources")
    for name, model, shard in (("one", "llama 3", "1GB"), ("several", "llama", "20KB"), ("experts", "mixtral", "1GB"),
                               ("qwen", "qwen3_moe", "1GB"), ("oss", "gpt_oss", "1GB")):
        hf_models.save(model, folder / name, corpus / "tokenizer", shard=shard)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copy(sources, tmp_path):
    def made(name: str) -> Path:
        return Path(shutil.copytree(sources[name], tmp_path / name))

    return made


def load(directory: Path, output: Path):
    cfg = tiny.config(directory, output, model=hugging_face.model_section(directory))
    groups = topology.build(cfg)
    chunks = build.model(cfg, groups, cfg.model.vocab_size)
    hugging_face.load(directory, chunks, cfg, groups)
    return cfg, groups, chunks


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("one", {"model_type": "mamba"}, r"config\.json: model_type: the architecture 'mamba' is not known here\. Those t"),
    ("one", {"model_type": ["x"]}, "the architecture \\['x'\\] is not known here"),
    ("one", {"architectures": ["LlamaForSequenceClassification"]},
     r"architectures: \['LlamaForSequenceClassification'\] is not the language model LlamaForCausalLM"),
    ("one", {"hidden_size": None}, r"config\.json: hidden_size: is missing"),
    ("one", {"hidden_act": "gelu"}, r"hidden_act: is 'gelu', this engine computes silu"),
    ("one", {"attention_bias": True}, "attention_bias: is True, but mlp_bias is False"),
    ("one", {"residual_multiplier": 2.0}, r"residual_multiplier: is a setting that is not known here \(2\.0\)"),
    ("one", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: 'linear' is a kind of rot"),
    ("one", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "low_freq_factor: is None"),
    ("one", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}},
     "attention_factor: multiplies the rotation by 3.0"),
    ("one", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: is 0"),
    ("one", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: weights quantised by 'gptq'"),
    ("one", {"num_hidden_layers": "four"}, r"config\.json: num_layers: got 'four', expected"),
    ("qwen", {"num_hidden_layers": "four"}, r"config\.json: num_layers: got 'four', expected"),
    ("qwen", {"num_hidden_layers": 10**30}, r"config\.json: num_layers: "),
    ("qwen", {"mlp_only_layers": 2}, "mlp_only_layers: is 2: here only the first layers"),
    ("one", {"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_parameters: \['yarn'\] is a kind of rotary"),
    ("one", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}},
     "attention_factor: is 'x', expected a number"),
    ("one", {"num_attention_heads": 5}, r"config\.json: num_query_groups: 2 groups do not divide 5 heads"),
    ("qwen", {"mlp_only_layers": [1]}, r"mlp_only_layers: is \[1\]: here only the first layers"),
    ("qwen", {"decoder_sparse_step": 2}, "decoder_sparse_step: is 2, this engine computes 1"),
    ("qwen", {"attention_bias": True}, "attention_bias: is true, this engine computes False"),
    ("oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types: gives windows to layers in an"),
    ("oss", {"swiglu_limit": 5.0}, r"swiglu_limit: is 5\.0, this engine computes 7\.0"),
])
def test_settings_that_are_not_ours(copy, name, changes, message):
    directory = copy(name)
    hf_models.edit_config(directory, **changes)
    with pytest.raises(UserError, match=message):
        hugging_face.model_section(directory)


@pytest.mark.parametrize(("name", "key"), [("one", "num_hidden_layers"), ("one", "tie_word_embeddings"),
                                           ("experts", "intermediate_size")])
def test_null_is_no_value(copy, name, key):
    """Nothing of the engine's own takes its place."""
    directory = copy(name)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: None}))
    with pytest.raises(UserError, match=rf"config\.json: {key}: is null"):
        hugging_face.model_section(directory)


def test_a_base_stated_twice_is_the_inner_one(copy):
    directory = copy("one")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert hugging_face.model_section(directory)["rotary_base"] == config["rope_parameters"]["rope_theta"] == 5e5


def test_one_file_is_taken_before_shards(copy, tmp_path):
    """As Transformers does: an index of older files may lie beside it."""
    directory = copy("one")
    _bad_index(directory)
    load(directory, tmp_path / "run")


def test_no_configuration(tmp_path):
    with pytest.raises(UserError, match=r"no such folder\. Give a Hugging Face model's directory"):
        hugging_face.model_section(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        hugging_face.model_section(tmp_path)
    for text in ("{", "[1]", '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: (cannot be read|is no JSON object)"):
            hugging_face.model_section(tmp_path)


def _half(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_shard(directory: Path) -> None:
    sorted(directory.glob("model-*.safetensors"))[2].unlink()


def _not_in_its_file(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))


def _bad_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _drop(name: str):
    return lambda directory: hf_models.rewrite(directory, lambda t: {k: v for k, v in t.items() if k != name})


def _put(name: str, value: torch.Tensor):
    return lambda directory: hf_models.rewrite(directory, lambda t: t | {name: value})


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("one", _half, r"model\.safetensors: is damaged or not whole \(.*\)\. Download"),
    ("several", _no_shard, r"model-00003-of-\d+\.safetensors: this file of the model is missing"),
    ("several", _not_in_its_file, r"layers\.9\.mlp\.up_proj\.weight, which model\.safetensors\.index\.json says"),
    ("several", _bad_index, r"index\.json: cannot be read \(weight_map does not name files beside it\)"),
    ("one", _pickled, r"holds neither model\.safetensors nor .* Convert its pickled weights, which could run code"),
    ("one", _drop("model.layers.1.self_attn.k_proj.weight"), r"does not hold model\.layers\.1\.self_attn\.k_proj\.we"),
    ("one", _drop("model.norm.weight"), r"does not hold model\.norm\.weight\. Check"),
    ("experts", _drop("model.layers.1.block_sparse_moe.experts.3.w2.weight"), r"does not hold .*experts\.3\.w2\.weig"),
    ("one", _put("model.layers.4.mlp.up_proj.weight", torch.ones(48, 32)), r"holds model\.layers\.4\.mlp\.up_proj\.w"),
    ("one", _put("model.layers.0.self_attn.q_proj.bias", torch.ones(32)), r"q_proj\.bias, which this model does not h"),
    ("one", _put("model.layers.2.mlp.up_proj.weight", torch.ones(32, 48)),
     r"model\.layers\.2\.mlp\.up_proj\.weight is \[32, 48\], config\.json makes it \[48, 32\]"),
    ("one", _put("model.norm.weight", torch.ones(32, dtype=torch.int8)), r"model\.norm\.weight is stored as I8"),
    ("one", _put("lm_head.weight", torch.ones(307, 32)), r"lm_head\.weight differs from model\.embed_tokens\.weight"),
    ("one", _put("lm_head.weight", torch.ones(3, 32)), r"lm_head\.weight differs from model\.embed_tokens\.weight"),
])
def test_weights_that_do_not_fit(copy, tmp_path, name, damage, message):
    directory = copy(name)
    damage(directory)
    with pytest.raises(UserError, match=message):
        load(directory, tmp_path / "run")


def test_a_directory_of_another_model(sources, tmp_path):
    """A model section that somebody overrode."""
    section = hugging_face.model_section(sources["one"])
    for changes, message in (({"num_layers": 3}, "holds model.layers.3"), ({"tie_embeddings": False}, "lm_head"),
                             ({"qk_norm": True}, "does not hold .*k_norm"),
                             ({"moe": {"num_experts": 4, "top_k": 2}}, "is a llama, but model.moe is set")):
        cfg = tiny.config(sources["one"], tmp_path, model=section | changes)
        groups = topology.build(cfg)
        chunks = build.model(cfg, groups, cfg.model.vocab_size)
        with pytest.raises(UserError, match=message):
            hugging_face.load(sources["one"], chunks, cfg, groups)


def test_an_export_that_fails_leaves_nothing(sources, corpus, tmp_path, monkeypatch):
    cfg, groups, chunks = load(sources["one"], tmp_path / "run")
    tokenizer, target = corpus / "tokenizer", tmp_path / "out" / "model"

    def save(**options):
        return hugging_face.save(chunks, cfg, groups, tokenizer, target, dtype="fp32", **options)

    with tiny.full_disk(monkeypatch, "model.safetensors") as hit, pytest.raises(UserError, match="No space left"):
        save()
    assert hit

    def refuse(folder: Path) -> None:
        assert (folder / "config.json").exists()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        save(check=refuse)
    assert not list(target.parent.glob("*"))
    (target.parent / "model.tmp").mkdir(parents=True)
    (target.parent / "model.tmp" / "left.safetensors").write_text("by a save that was killed")
    save()
    assert not (target / "left.safetensors").exists()
    with pytest.raises(UserError, match=r"exists and is not replaced\. Choose another --output"):
        save()
    assert not (target.parent / "model.tmp").exists()
