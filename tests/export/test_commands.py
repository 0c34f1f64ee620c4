"""`mainspring import` and `mainspring export`, from a command line to what Transformers generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny
import torch

from engine import cli, export_model, import_model
from engine.checkpoint import layout, restore
from engine.config import load_yaml
from engine.errors import UserError
from engine.evaluation.generation import Sampling, generate
from engine.parallel import topology


@pytest.fixture
def source(corpus, tmp_path) -> Path:
    hf_models.save("llama 3", tmp_path / "hf", corpus / "tokenizer", dtype=torch.bfloat16)
    return tmp_path / "hf"


def test_a_trained_run_becomes_a_model_of_transformers(config, corpus, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tiny.start(config(model__init_std=0.3, model__qk_norm=True))
    run.step()
    run.save()
    out = tmp_path / "out" / "model"
    topology.shutdown()
    assert cli.run(["export", "--checkpoint", str(run.cfg.output_dir), "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "Transformers computes the same logits to" in said.err
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    prompt = "the spring stores"
    theirs = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    written = model.generate(**theirs(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0].tolist()
    with restore.model(run.cfg.output_dir) as restored:
        ids = restored.tokenizer.encode(prompt)
        own = generate(restored.chunks[0], ids, Sampling(max_new_tokens=8, temperature=0.0), eod_id=None,
                       vocab_size=restored.tokenizer.vocab_size)[0]
    assert written == ids + own


def test_import_then_export_gives_the_same_files(source, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.run(["import", "--from", str(source), "--output", str(output)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == layout.find(output)
    assert path.name == "iter_0000000"
    layout.verify(path)
    saved = load_yaml(path / "config.yaml")
    assert saved["train"]["precision"] == "bf16"
    assert saved["model"]["vocab_size"] == hf_models.VOCAB
    assert (path / "tokenizer" / "tokenizer.json").exists()
    assert not (path / "tokenizer" / "model.safetensors").exists()
    assert cli.run(["export", "--checkpoint", str(output), "--output", str(tmp_path / "back")]) == 0
    hf_models.assert_same(hf_models.tensors(tmp_path / "back"), hf_models.tensors(source))


def test_import_checks_against_transformers_and_takes_options(source, corpus, tmp_path, capsys):
    words = ["--from", str(source), "--output", str(tmp_path / "run"), "--precision", "fp32", "--seq_length", "24",
             "--tokenizer", str(corpus / "tokenizer"), "--verify"]
    assert import_model.main(words) == 0
    assert "the logits are those of Transformers to" in capsys.readouterr().err
    saved = load_yaml(tmp_path / "run" / "checkpoints" / "iter_0000000" / "config.yaml")
    assert (saved["model"]["seq_length"], saved["train"]["precision"]) == (24, "fp32")
    export_model.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--dtype", "fp16",
                       "--seq_length", "64", "--architecture", "mistral", "--max_shard_gb", "1e-5"])
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["max_position_embeddings"], stated["model_type"]) == (64, "mistral")
    assert stated["torch_dtype"] == "float16"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_no_value_is_rounded_that_the_files_hold(source, tmp_path):
    """A config.json may say bfloat16 of files that somebody merged in fp32."""
    name = "model.layers.1.mlp.up_proj.weight"
    hf_models.rewrite(source, lambda t: t | {name: t[name].float() + 1e-6})
    import_model.main(["--from", str(source), "--output", str(tmp_path / "run")])
    topology.shutdown()
    export_model.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert torch.equal(hf_models.tensors(tmp_path / "out")[name], hf_models.tensors(source)[name])


def test_an_empty_working_folder_may_become_the_export(source, tmp_path, monkeypatch):
    import_model.main(["--from", str(source), "--output", str(tmp_path / "run")])
    topology.shutdown()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_model.main(["--checkpoint", str(tmp_path / "run"), "--output", ".", "--no-verify", "--seq_length", "32"])
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_fp16_that_overflows_is_refused_without_a_check(source, tmp_path):
    hf_models.rewrite(source, lambda t: {name: v * (1e7 if name.endswith("layers.1.mlp.up_proj.weight") else 1)
                                         for name, v in t.items()})
    import_model.main(["--from", str(source), "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight has values up to .*beyond fp16"):
        export_model.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--dtype", "fp16",
                           "--no-verify"])
    assert not (tmp_path / "out").exists()
    topology.shutdown()


def test_ranks_share_the_work(source, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    for script, options in ((import_model, ["--from", source, "--output", run, "--parallel.tensor", "2"]),
                            (export_model, ["--checkpoint", run, "--output", back, "--parallel.pipeline", "2"])):
        for code, output in tiny.launch(Path(script.__file__ or ""), 2, *options):
            assert code == 0, output[-3000:]
    hf_models.assert_same(hf_models.tensors(back), hf_models.tensors(source))


def test_weights_alone_are_no_run_to_resume(source, corpus, tmp_path):
    import_model.main(["--from", str(source), "--output", str(tmp_path / "run"), "--precision", "fp32"])
    path = layout.find(tmp_path / "run")
    with restore.model(path) as restored:
        assert restored.record["optimizer"] is None
        own = restored.tokenizer.sha256
        model = restored.cfg.model
    run = tiny.start(tiny.config(corpus, tmp_path / "run", model=model.model_dump(exclude_unset=True)))
    with pytest.raises(UserError, match=r"holds weights alone, .* Start from it with --init_from .*iter_0000000"):
        run.checkpointer(tokenizer_sha256=own, vocab_size=hf_models.VOCAB).load(path, run.chunks, run.optimizer)


@pytest.mark.parametrize(("main", "words", "message"), [
    (import_model.main, ["--from", "{source}/nothing", "--output", "{new}"], "no such folder"),
    (import_model.main, ["--from", "{source}", "--output", "{new}", "--tokenizer", "{source}/config.json"], "not a t"),
    (import_model.main, ["--from", "{source}", "--output", "{new}", "--parallel.tensor", "2"], "1 rank does not fit"),
    (export_model.main, ["--checkpoint", "{source}", "--output", "{new}"], "no checkpoint in this folder"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{source}"], "exists and is not replaced"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{source}", "--format", "gguf"], "exists and is not"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{new}", "--dtype", "q8_0"], "q8_0 is a type of GGUF"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{new}", "--merge"], "there are no adapters to merge"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{new}", "--format", "adapter"], "there are no adapters"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{new}", "--architecture", "gpt_oss"],
     r"Transformers' gpt_oss has no linear_bias False, attention_sinks False, activation swiglu, moe False"),
    (export_model.main, ["--checkpoint", "{run}", "--output", "{new}", "--tolerance", "1e-12"], "at most 1e-12"),
])
def test_refusals_leave_nothing(source, tmp_path, main, words, message):
    places = {"source": source, "run": tmp_path / "run", "new": tmp_path / "out" / "new"}
    if any("{run}" in word for word in words):
        import_model.main(["--from", str(source), "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match=message):
        main([word.format(**places) for word in words])
    assert not list(places["new"].parent.glob("*"))
    topology.shutdown()


@pytest.mark.parametrize("dtype", ["auto", "q8_0"])
def test_gguf_by_the_command(source, tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    import_model.main(["--from", str(source), "--output", str(tmp_path / "run")])
    file = tmp_path / "out" / "mine.gguf"
    assert export_model.main(["--checkpoint", str(tmp_path / "run"), "--output", str(file), "--format", "gguf",
                              "--dtype", dtype]) == 0
    assert [p.name for p in file.parent.iterdir()] == ["mine.gguf"]
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name in ("BF16", "Q8_0", "F32", "F16")
    assert tensors["token_embd.weight"].shape.tolist() == [32, hf_models.VOCAB]
