"""GGUF files read back bit for bit, and beside Transformers in llama.cpp itself where llama-cpp-python is installed."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from tiny_transformers import CASES, YARN, save

from engine.errors import UserError
from engine.export import gguf, gguf_verify

package = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Each case's directory and model, made once."""
    made = {}

    def of(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("hf") / "model"
            made[name] = directory, save(name, directory)
        return made[name]

    return of


def contents(file) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values in fp32 of each tensor, by the gguf package's own reader."""
    return {tensor.name: (tensor.tensor_type.name, package.quants.dequantize(tensor.data, tensor.tensor_type))
            for tensor in package.GGUFReader(file).tensors}


def settings(file) -> dict:
    return {name: field.contents() for name, field in package.GGUFReader(file).fields.items()}


def side_by_side(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of the first half of each head, then row i of its second half."""
    d = x.shape[0] // heads
    order = [h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in (0, 1)]
    return x[order]


def expected(model, kind: str) -> dict[str, torch.Tensor]:
    """GGUF's tensors from a model of Transformers, written down by hand."""
    m, w = model.config, model.state_dict()
    heads = {"attn_q": m.num_attention_heads, "attn_k": m.num_key_value_heads}
    turned = heads if kind in ("llama", "mistral", "mixtral") else {}
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.router" if kind == "gpt_oss" else "mlp.gate",
        "post_attention_norm" if kind == "gpt_oss" else "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    found = {"token_embd.weight": w["model.embed_tokens.weight"], "output_norm.weight": w["model.norm.weight"]}
    if not m.tie_word_embeddings or kind == "gpt_oss":
        found["output.weight"] = w["lm_head.weight"]
    for i in range(m.num_hidden_layers):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        for name, his in names.items():
            for suffix in ("weight", "bias"):
                if (value := w.get(f"{theirs}{his}.{suffix}")) is not None:
                    found[f"{ours}{name}.{suffix}"] = side_by_side(value, turned[name]) if name in turned else value
        if (sinks := w.get(f"{theirs}self_attn.sinks")) is not None:
            found[f"{ours}attn_sinks.weight"] = sinks
        found |= expected_experts(w, f"{ours}ffn_", f"{theirs}mlp.experts.", kind)
    return found


def expected_experts(w, ours: str, theirs: str, kind: str) -> dict[str, torch.Tensor]:
    if f"{theirs}gate_up_proj" not in w:
        return {}
    both, down = w[f"{theirs}gate_up_proj"], w[f"{theirs}down_proj"]
    if kind != "gpt_oss":
        gate, up = both.chunk(2, dim=1)
        return {f"{ours}gate_exps.weight": gate, f"{ours}up_exps.weight": up, f"{ours}down_exps.weight": down}
    biases = w[f"{theirs}gate_up_proj_bias"], w[f"{theirs}down_proj_bias"]
    found = {}
    for suffix, both_e, down_e in (("weight", both.mT, down.mT), ("bias", *biases)):
        found |= {f"{ours}gate_exps.{suffix}": both_e[:, ::2], f"{ours}up_exps.{suffix}": both_e[:, 1::2],
                  f"{ours}down_exps.{suffix}": down_e}
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_there_bit_for_bit(directories, name, tmp_path):
    directory, model = directories(name)
    done = gguf.write(directory, tmp_path / "m.gguf", "f32")
    found, wanted = contents(tmp_path / "m.gguf"), expected(model, CASES[name][0])
    assert found.keys() - {"rope_freqs.weight"} == wanted.keys()
    for key, value in wanted.items():
        assert found[key][0] == "F32"
        np.testing.assert_array_equal(found[key][1], value.numpy(), err_msg=key, strict=True)
    assert done.tensors == {"F32": len(wanted)}
    assert done.bytes == (tmp_path / "m.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "kind"), [("fp16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_matrices_have_the_type_asked_for_and_all_else_is_fp32(directories, name, dtype, kind, tmp_path):
    directory, model = directories(name)
    gguf.write(directory, tmp_path / "m.gguf", dtype)
    found = contents(tmp_path / "m.gguf")
    for key, value in expected(model, CASES[name][0]).items():
        plain = value.dim() == 1 or key.endswith(".bias") or "ffn_gate_inp" in key
        assert found[key][0] == ("F32" if plain else kind)
        exact = value.float().contiguous()
        if plain:
            wanted = exact
        elif kind == "Q8_0":  # per 32 of a row: the largest becomes 127, the scale is an fp16
            blocks = exact.unflatten(-1, (-1, 32))
            scale = blocks.abs().amax(-1, keepdim=True) / 127
            codes = (blocks / scale).abs().add(0.5).floor() * blocks.sign()
            wanted = (codes * scale.half().float()).flatten(-2)
        else:
            wanted = exact.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
        rounding = 1e-6 if kind == "Q8_0" else 0
        np.testing.assert_allclose(found[key][1], wanted.numpy(), rtol=rounding, atol=0, err_msg=key)
    assert settings(tmp_path / "m.gguf")["general.file_type"] == {"F16": 1, "BF16": 32, "Q8_0": 7}[kind]


def test_rows_that_are_no_multiple_of_a_block_stay_f16(tmp_path):
    save("llama", tmp_path / "hf", intermediate_size=72)
    done = gguf.write(tmp_path / "hf", tmp_path / "m.gguf", "q8_0")
    found = contents(tmp_path / "m.gguf")
    assert {key for key, (kind, _) in found.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in range(3)}
    assert done.tensors == {"F16": 3, "Q8_0": 20, "F32": 7}


def test_auto_is_the_type_of_the_directory_and_bf16_is_exact(tmp_path):
    model = save("qwen3_moe", tmp_path / "hf", dtype=torch.bfloat16)
    assert gguf.write(tmp_path / "hf", tmp_path / "m.gguf").dtype == "bf16"
    for key, value in expected(model, "qwen3_moe").items():
        np.testing.assert_array_equal(contents(tmp_path / "m.gguf")[key][1], value.float().numpy(), err_msg=key)


def test_settings_are_those_of_the_model(directories, tmp_path):
    gguf.write(directories("gpt_oss")[0], tmp_path / "m.gguf", "f32")
    found = settings(tmp_path / "m.gguf")
    own = {key.removeprefix("gpt-oss."): value for key, value in found.items() if key.startswith("gpt-oss.")}
    assert found["general.architecture"] == "gpt-oss"
    assert own == {
        "context_length": 256, "embedding_length": 64, "block_count": 3, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "vocab_size": 700,
        "rope.dimension_count": 32, "rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 8.0,
        "rope.scaling.yarn_beta_slow": 1.0, "expert_count": 4, "expert_used_count": 2,
        "expert_feed_forward_length": 64, "attention.sliding_window": 8,
    }  # fmt: skip
    gguf.write(directories("gpt_oss every third")[0], tmp_path / "third.gguf", "f32")
    assert settings(tmp_path / "third.gguf")["gpt-oss.attention.sliding_window_pattern"] == [True, True, False]


def test_llama_3_frequencies_are_those_of_transformers(directories, tmp_path):
    directory, model = directories("llama 3.1 tied")
    gguf.write(directory, tmp_path / "m.gguf", "f32")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = contents(tmp_path / "m.gguf")["rope_freqs.weight"][1]
    np.testing.assert_allclose(plain.numpy() / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert factors.min() == 1.0
    assert factors.max() == 8.0
    assert "llama.rope.scaling.type" not in settings(tmp_path / "m.gguf")


def test_a_window_that_llama_cpp_lacks_bounds_the_context(tmp_path):
    save("mistral", tmp_path / "hf", sliding_window=96)
    done = gguf.write(tmp_path / "hf", tmp_path / "m.gguf", "f32")
    assert settings(tmp_path / "m.gguf")["llama.context_length"] == 96
    assert [note[:40] for note in done.notes] == ["llama.cpp has no sliding window in llama"]


def test_yarn_that_llama_cpp_rounds_is_said_for_gpt_oss_and_refused_elsewhere(tmp_path):
    yarn = YARN | {"truncate": False, "beta_fast": 3.0}
    save("gpt_oss", tmp_path / "hf", rope_parameters=yarn)
    done = gguf.write(tmp_path / "hf", tmp_path / "m.gguf", "f32")
    assert (done.exact, done.notes[0][:35]) == (False, "llama.cpp rounds the ends of YaRN's")
    save("qwen2", tmp_path / "other", rope_parameters=yarn)
    with pytest.raises(UserError, match=r"rope_scaling.truncate: YaRN without rounding"):
        gguf.write(tmp_path / "other", tmp_path / "other.gguf", "f32")


def test_a_tensor_is_converted_in_parts(directories, tmp_path, monkeypatch):
    directory, _ = directories("mixtral")
    assert gguf.write(directory, tmp_path / "m.gguf", "q8_0").exact
    monkeypatch.setattr(gguf, "_ROWS", 7)
    gguf.write(directory, tmp_path / "parts.gguf", "q8_0")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_mxfp4_experts_are_read(tmp_path):
    """GPT-OSS as OpenAI publishes it: the nibbles' values by hand."""
    from safetensors.torch import load_file, save_file

    save("gpt_oss", tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(2)
    bits = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    wanted = {}
    for i in range(3):
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{i}.mlp.experts.{name}"
            e, columns, rows = tensors.pop(key).shape
            codes = torch.randint(0, 16, (e, rows, columns))
            scales = torch.randint(120, 130, (e, rows, columns // 32))
            values = bits[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
            values = values * (2.0 ** (scales - 127.0)).repeat_interleave(32, -1)
            pairs = codes.view(e, rows, columns // 32, 16, 2)
            tensors[f"{key}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
            tensors[f"{key}_scales"] = scales.to(torch.uint8)
            if name == "down_proj":
                wanted[f"blk.{i}.ffn_down_exps.weight"] = values
            else:
                wanted[f"blk.{i}.ffn_gate_exps.weight"] = values[:, ::2]
                wanted[f"blk.{i}.ffn_up_exps.weight"] = values[:, 1::2]
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"quantization_config": {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                            "model.embed_tokens", "lm_head"]}}))
    gguf.write(tmp_path / "hf", tmp_path / "m.gguf", "bf16")
    found = contents(tmp_path / "m.gguf")
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key][1], value.numpy(), err_msg=key)


def with_tensor(directory, name, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def with_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nan(x):
    x[3] = float("nan")
    return x


REFUSED = {
    "missing": ("llama", lambda d: with_tensor(d, "model.layers.1.mlp.up_proj.weight", None),
                "does not hold model.layers.1.mlp.up_proj.weight"),
    "left over": ("llama", lambda d: with_tensor(d, "model.layers.9.extra", lambda _: torch.ones(2)),
                  "holds model.layers.9.extra, which this model does not have"),
    "shape": ("llama", lambda d: with_tensor(d, "model.norm.weight", lambda _: torch.ones(63)),
              r"model.norm.weight is \[63\], config.json makes it \[64\]"),
    "f16": ("llama", lambda d: with_tensor(d, "model.layers.2.mlp.up_proj.weight", lambda x: x * 1e6),
            "model.layers.2.mlp.up_proj.weight reaches .*, f16 ends at 65504. Use --dtype bf16"),
    "not finite": ("llama", lambda d: with_tensor(d, "model.norm.weight", nan),
                   "model.norm.weight holds values that are not finite"),
    "half a file": ("llama", lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-1000]), "model.safetensors: is damaged or not whole"),
    "architecture": ("llama", lambda d: with_config(d, model_type="gemma3_text"), "'gemma3_text' is not known here"),
    "setting": ("llama", lambda d: with_config(d, final_logit_softcapping=30.0), "final_logit_softcapping"),
    "router": ("qwen3_moe", lambda d: with_config(d, norm_topk_prob=False), "norm_topk_prob: experts' weights that"),
    "dense layers": ("qwen3_moe", lambda d: with_config(d, mlp_only_layers=[0]), "mlp_only_layers: 1 layers without"),
    "rope": ("qwen2", lambda d: with_config(d, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 64}), "rope_scaling: Llama 3's rotary scaling, which llama.cpp"),
    "no tokenizer": ("llama", lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "no config": ("llama", lambda d: (d / "config.json").unlink(), "holds no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(directories, case, tmp_path):
    name, damage, message = REFUSED[case]
    shutil.copytree(directories(name)[0], tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as raised:
        gguf.write(tmp_path / "hf", tmp_path / "out/m.gguf", "f16")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_existing_file_and_unknown_type_and_missing_package(directories, tmp_path, monkeypatch):
    directory, _ = directories("llama")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"m.gguf: exists already"):
        gguf.write(directory, tmp_path / "m.gguf", "f32")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    with pytest.raises(UserError, match=r"'q4_k' is no type that is written here. Use f32, f16, bf16 or q8_0"):
        gguf.write(directory, tmp_path / "other.gguf", "q4_k")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        gguf.write(directory, tmp_path / "other.gguf", "f32")


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_does(directories, name, tmp_path):
    pytest.importorskip("llama_cpp")
    directory, _ = directories(name)
    gguf.write(directory, tmp_path / "m.gguf", "f32")
    compared = gguf_verify.verify(directory, tmp_path / "m.gguf", tolerance=1e-4)
    assert compared.scale > 3
    assert (compared.greedy, compared.continued) == (16, 16)


@pytest.mark.parametrize(("dtype", "most"), [("f16", 0.1), ("bf16", 0.6), ("q8_0", 1.5)])
def test_llama_cpp_with_other_types_is_near(directories, dtype, most, tmp_path):
    pytest.importorskip("llama_cpp")
    directory, _ = directories("llama")
    gguf.write(directory, tmp_path / "m.gguf", dtype)
    compared = gguf_verify.verify(directory, tmp_path / "m.gguf")
    # Its products round both sides. Logits reach 6.9, and those of another model are off by 9.
    assert 1e-4 < compared.logits < most


def test_a_wrong_file_is_seen(directories, tmp_path):
    pytest.importorskip("llama_cpp")
    shutil.copytree(directories("llama")[0], tmp_path / "hf")
    gguf.write(tmp_path / "hf", tmp_path / "m.gguf", "f32")
    with_tensor(tmp_path / "hf", "model.layers.0.self_attn.q_proj.weight", lambda x: x.roll(1, 0))
    with pytest.raises(UserError, match=r"llama.cpp's logits are off"):
        gguf_verify.verify(tmp_path / "hf", tmp_path / "m.gguf", tolerance=1e-4)
