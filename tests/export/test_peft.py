"""Adapters beside PEFT's on the same weights: logits, gradients, merged weights, and the files in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import hugging_face
import lora_runs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import restore
from engine.errors import UserError
from engine.export import peft as adapters
from engine.model import build, lora, lora_merge, lora_report, whole
from engine.parallel import topology
from engine.stages import origin

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40}
THEIRS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"model__qk_norm": True, "model__tie_embeddings": False, "model__norm_eps": 1e-6, "model__moe": MOE}
GPT_OSS = {"model__linear_bias": True, "model__activation": "clamped_swiglu", "model__attention_sinks": True,
           "model__window_size": 5, "model__full_attention_every": 2, "model__tie_embeddings": False,
           "model__rotary_base": 150000.0, "model__ffn_hidden_size": 40, "model__moe": MOE,
           "model__yarn": {"factor": 4.0, "original_seq_length": 8}}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 8}
# family, the engine's configuration, Transformers', adapters
CASES = {
    "llama": ("Llama", {}, {}, {}),
    "llama rslora some": ("Llama", {}, {}, {"target_modules": ["q_proj", "v_proj", "down_proj"], "rslora": True}),
    "qwen2": ("Qwen2", {"model__attention_bias": True}, {}, {"target_modules": ["attention", "up_proj"]}),
    "mixtral": ("Mixtral", {"model__moe": {**MOE, "ffn_hidden_size": 64}}, {**THEIRS, "sliding_window": None}, {}),
    "qwen3 moe": ("Qwen3Moe", QWEN, {**THEIRS, "norm_topk_prob": True, "moe_intermediate_size": 40}, {}),
    "qwen3 moe square": (  # 2 * 16 features of gate and up beside 32 of the model: shapes say nothing
        "Qwen3Moe", QWEN | {"model__moe": {**MOE, "ffn_hidden_size": 16}},
        {**THEIRS, "norm_topk_prob": True, "moe_intermediate_size": 16},
        {"target_modules": ["experts.gate_up_proj", "k_proj"]}),
    "gpt oss": ("GptOss", GPT_OSS, {**THEIRS, "sliding_window": 5, "rope_parameters": YARN}, {}),
    "gpt oss square": (  # as GPT-OSS itself: down is 32 by 32
        "GptOss", GPT_OSS | {"model__ffn_hidden_size": 32, "model__moe": {**MOE, "ffn_hidden_size": 32}},
        {**THEIRS, "sliding_window": 5, "rope_parameters": YARN}, {}),
    "gpt oss down": ("GptOss", GPT_OSS, {**THEIRS, "sliding_window": 5, "rope_parameters": YARN},
                     {"target_modules": ["experts.down_proj"]}),
}
TOKENS_BS = torch.randint(0, tiny.VOCAB, (3, tiny.SEQ), generator=torch.Generator().manual_seed(0))


def build_pair(config, case: str):
    """-> configuration, groups, the engine's model with random adapters, and Transformers' model without."""
    family, changes, settings, values = CASES[case]
    cfg = lora_runs.with_lora(config(**changes), **values)
    groups = topology.build(cfg)
    model = build.model(cfg, groups, tiny.VOCAB)[0].eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.dim() == 1):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    lora_runs.randomise([model])
    weights = {name: value for name, value in whole.assemble([whole.parts([model])], tiny.VOCAB).items()
               if not lora.is_adapter(name)}
    return cfg, groups, model, hugging_face.model(family, weights, cfg.model, vocab_size=tiny.VOCAB, **settings)


def logits(model) -> torch.Tensor:
    return model(TOKENS_BS, torch.arange(tiny.SEQ).expand_as(TOKENS_BS), None)[..., : tiny.VOCAB]


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it_and_computes_the_same(config, case, tmp_path: Path):
    from peft import PeftModel

    cfg, groups, model, theirs = build_pair(config, case)
    with torch.no_grad():
        plain = theirs(TOKENS_BS).logits
        with lora.detached([model]):
            assert (logits(model) - plain).abs().max() < 1e-5
    found = logits(model)
    assert (found - plain).abs().max() > 0.01, "the adapters do nothing"
    adapters.save([model], cfg, groups, tmp_path / "adapter", base="someone/base", record={"sha256": "abc"})
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"), is_trainable=True)
    stated = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stated["peft_version"] == adapters.LAYOUT_VERSION
    expected = loaded(TOKENS_BS).logits
    assert (found - expected).abs().max() < 1e-5

    # Gradients, through what was written: PEFT's parameters by its own names, ours by the map.
    torch.nn.functional.cross_entropy(found.flatten(0, 1), TOKENS_BS.roll(-1, 1).flatten()).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), TOKENS_BS.roll(-1, 1).flatten()).backward()
    ours = {name: p.grad for name, p in whole.global_names(model).items() if p.requires_grad}
    trained: dict = {name.replace(".default", ""): p.grad for name, p in loaded.named_parameters() if p.requires_grad}
    entries = list(adapters.entries(cfg, cfg.lora.targets()))
    assert trained.keys() == {f"{entry.key}.lora_{which}.weight" for entry in entries for which in "AB"}
    for entry in entries:
        for name, value in adapters._to_peft(entry, ours).items():
            assert (value - trained[name]).norm() <= 1e-5 * trained[name].norm(), name

    merged = loaded.merge_and_unload().eval()
    changed = lora_merge.merge([model], groups)
    with torch.no_grad():
        assert (logits(model) - found).abs().max() < 1e-5
        assert (merged(TOKENS_BS).logits - logits(model)).abs().max() < 1e-5
    weights = whole.assemble([whole.parts([model])], tiny.VOCAB)
    assert not any(map(lora.is_adapter, weights))
    stored = merged.state_dict()
    for name, value in hugging_face.state_dict(weights, cfg.model).items():
        assert (value - stored[name]).abs().max() < 1e-6, name
    assert changed.changed == changed.total == sum(len(entry.layers) for entry in entries)


@pytest.mark.parametrize("case", ["llama rslora some", "qwen3 moe", "gpt oss"])
def test_reading_gives_back_what_was_written(config, case, tmp_path: Path):
    cfg, groups, model, _ = build_pair(config, case)
    adapters.save([model], cfg, groups, tmp_path / "adapter")
    assert adapters.section(tmp_path / "adapter") == cfg.lora.model_dump(
        include={"rank", "alpha", "rslora", "dropout"}) | {"target_modules": [
            name for name in cfg.lora.targets() if cfg.model.moe is None or name not in (
                "gate_proj", "up_proj", "down_proj")]}
    expected = {name: p.detach().clone() for name, p in whole.global_names(model).items() if lora.is_adapter(name)}
    with torch.no_grad():
        for name, p in whole.global_names(model).items():
            if lora.is_adapter(name):
                p.fill_(torch.nan)
    adapters.load(tmp_path / "adapter", [model], cfg, groups)
    for name, value in expected.items():
        assert torch.equal(whole.global_names(model)[name], value), name


@pytest.mark.parametrize("case", ["qwen3 moe", "qwen3 moe square", "gpt oss square"])
def test_experts_of_peft_before_0_19_1_are_read(config, case, tmp_path: Path):
    """Their A and B were those of the transposed weight; where shapes do not tell, the layer's other factors do (later
    versions beside Transformers 4 turn GPT-OSS's), else the version."""
    cfg, groups, model, _ = build_pair(config, case)
    found = logits(model).detach()
    adapters.save([model], cfg, groups, tmp_path / "new")
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    old, count, rank = dict(tensors), cfg.model.moe.num_experts, cfg.lora.rank
    for key in [key.removesuffix("lora_A.weight") for key in tensors if "experts" in key and "lora_A" in key]:
        a, b = tensors[f"{key}lora_A.weight"], tensors[f"{key}lora_B.weight"]
        a_eri, b_ore = a.unflatten(0, (count, rank)), b.unflatten(1, (rank, count))
        old[f"{key}lora_A.weight"] = b_ore.permute(2, 1, 0).flatten(0, 1).contiguous()
        old[f"{key}lora_B.weight"] = a_eri.permute(2, 1, 0).flatten(1).contiguous()
    stated = json.loads((tmp_path / "new/adapter_config.json").read_text())
    for name, version in (("old", "0.18.0"), ("unknown", None)):
        (tmp_path / name).mkdir()
        save_file(old, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(stated | {"peft_version": version}))
    adapters.load(tmp_path / "old", [model], cfg, groups)
    assert torch.equal(logits(model), found)
    if case == "qwen3 moe square":
        with pytest.raises(UserError, match="which version of PEFT"):
            adapters.load(tmp_path / "unknown", [model], cfg, groups)
    else:
        adapters.load(tmp_path / "unknown", [model], cfg, groups)
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("version", ["0.18.0", None])
def test_gpt_oss_is_read_straight_whatever_version_wrote(config, version, tmp_path: Path):
    """Its weights are [in, out], which PEFT took every expert's for; down is square, so shapes say nothing."""
    cfg, groups, model, _ = build_pair(config, "gpt oss square")
    found = logits(model).detach()
    adapters.save([model], cfg, groups, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": version}))
    with torch.no_grad():
        for name, p in whole.global_names(model).items():
            if lora.is_adapter(name):
                p.zero_()
    adapters.load(tmp_path / "adapter", [model], cfg, groups)
    assert torch.equal(logits(model), found)


def test_what_does_not_fit_is_refused(config, tmp_path: Path):
    cfg, groups, model, _ = build_pair(config, "llama")
    good = tmp_path / "good"
    adapters.save([model], cfg, groups, good, record={"sha256": "abc"})
    with pytest.raises(UserError, match="exists and is not replaced"):
        adapters.save([model], cfg, groups, good)
    with pytest.raises(UserError, match="an adapter for another base"):
        adapters.load(good, [model], cfg, groups, base_sha256="def")
    adapters.load(good, [model], cfg, groups, base_sha256="abc")
    record = (good / adapters.RECORD).read_text()
    (good / adapters.RECORD).write_text(record[: len(record) // 2])
    with pytest.raises(UserError, match=r"mainspring\.json: cannot be read"):
        adapters.load(good, [model], cfg, groups, base_sha256="abc")
    tensors, stated = load_file(good / "adapter_model.safetensors"), json.loads(
        (good / "adapter_config.json").read_text())
    key = min(tensors)

    def attempt(**changes):
        bad = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        bad.mkdir()
        save_file(changes.get("tensors", tensors), bad / "adapter_model.safetensors")
        (bad / "adapter_config.json").write_text(json.dumps(stated | changes.get("stated", {})))
        if changes.get("cut"):
            file = bad / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        adapters.load(bad, [model], cfg, groups)

    with pytest.raises(UserError, match=r"does not hold.*lora_A"):
        attempt(tensors={name: value for name, value in tensors.items() if name != key})
    with pytest.raises(UserError, match=r"holds base_model\.model\.lm_head.*no place"):
        attempt(tensors=tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"has A \[4, 7\].*"):
        attempt(tensors=tensors | {key: torch.zeros(4, 7)})
    with pytest.raises(UserError, match="use_dora"):
        attempt(stated={"use_dora": True})
    with pytest.raises(UserError, match="rank_pattern"):
        attempt(stated={"rank_pattern": {"q_proj": 2}})
    for name, value in (("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("kasa_config", {"beta": 1})):
        with pytest.raises(UserError, match=f"{name}: is .* Merge the adapter with PEFT"):
            attempt(stated={name: value})
    with pytest.raises(UserError, match="half a file"):
        attempt(cut=True)


def test_counts_are_pefts(config, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    cfg, groups, model, theirs = build_pair(config, "qwen3 moe")
    found = lora_report.check([model], cfg, groups)
    wrapped = get_peft_model(theirs, LoraConfig(
        r=cfg.lora.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    trained, everything = wrapped.get_nb_trainable_parameters()
    assert found.trained == trained
    assert found.base == everything - trained


def _restored(run: Path):
    with restore.model(run, load_base=origin.load_base) as restored:
        return restored


@pytest.mark.parametrize("shape", ["dense", "experts"])
def test_a_runs_adapters_are_exported_merged_and_loaded(corpus, tmp_path: Path, capfd, shape):
    """The whole way from a run of the stage lora: PEFT's directory, a merged model, and both beside each other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from engine import export_model, import_model, pretrain
    from engine import lora as stage
    from engine.config import Config

    moe = {"model__moe": {"num_experts": 4, "top_k": 2}} if shape == "experts" else {}
    pretrain.run(tiny.config(corpus, tmp_path / "base", train__max_steps=1, model__seq_length=96, **moe))
    rows = [{"instruction": f"the spring {i}", "response": f"stores {i * 7}"} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    values = {"stage": "lora", "output_dir": tmp_path / "run", "device": "cpu",
              "init_from": str(tmp_path / "base"), "lora": {"rank": 4, "alpha": 64.0},
              "examples": {"train": [{"path": str(tmp_path / "rows.json")}], "template": "chatml", "audit_samples": 0},
              "train": {"max_steps": 3, "global_batch_size": 4, "lr": 3e-2, "precision": "fp32"},
              "logging": {"tensorboard": False, "progress": "off"}}
    stage.run(Config(**values))
    for name, options in (("adapter", ["--format", "adapter"]), ("merged", ["--merge", "true"])):
        export_model.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / name), *options])
    printed = capfd.readouterr().err
    assert "PEFT computes the same logits" in printed
    total = 2 * 7 if shape == "dense" else 2 * (4 + 4 * 2)
    assert f"merged: {total} of {total} matrices changed" in printed
    export_model.main(["--checkpoint", str(tmp_path / "base"), "--output", str(tmp_path / "plain")])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        before = plain(TOKENS_BS).logits
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(TOKENS_BS).logits
        assert (adapted - before).abs().max() > 1e-2
        assert (adapted - merged(TOKENS_BS).logits).abs().max() < 1e-5

    # Back again: the run's own adapters, beside its own base, and merged once more.
    import_model.main(["--from", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--output",
                       str(tmp_path / "back")])
    ours, expected = ({name: p.detach().clone() for name, p in whole.global_names(restored.chunks[0]).items()}
                      for restored in map(_restored, (tmp_path / "back", tmp_path / "run")))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    with pytest.raises(UserError, match="--base"):
        import_model.main(["--from", str(tmp_path / "adapter"), "--output", str(tmp_path / "none")])
    with pytest.raises(UserError, match="for another base"):
        import_model.main(["--from", str(tmp_path / "adapter"), "--base", str(tmp_path / "plain"), "--output",
                           str(tmp_path / "none")])

    # The exported base and the adapter as PEFT's directory are the same model again, and a Hugging Face base resumes.
    values |= {"output_dir": tmp_path / "beside", "init_from": str(tmp_path / "plain")}
    stage.run(Config(**values).with_values({"train.max_steps": 1}))
    stage.run(Config(**values).with_values({"train.max_steps": 2}))
    export_model.main(["--checkpoint", str(tmp_path / "beside"), "--output", str(tmp_path / "second"), "--format",
                       "adapter"])
    stated = json.loads((tmp_path / "second/adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(tmp_path / "plain")
