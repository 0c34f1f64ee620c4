"""Every architecture read as Transformers writes it and written back: the same logits, the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import tiny
import torch

from engine.checkpoint import restore
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
    loaded = load_tokenizer(tokenizer)
    assert hugging_face.verify(source, model[2], model[1], loaded) < 1e-4
    back = write(model, tmp_path / "back", tokenizer)
    hf_models.assert_same(hf_models.tensors(back), hf_models.tensors(source))
    assert hugging_face.verify(back, model[2], model[1], loaded) < 1e-4
    assert not list(tmp_path.glob("*.tmp"))
    # What is read again is the same model, and Transformers' own.
    assert hugging_face.model_section(back) == hugging_face.model_section(source) | {
        name: value for name, value in hugging_face.model_section(back).items() if name == "moe"}
    stated = json.loads((back / "config.json").read_text())
    assert stated["architectures"] == type(theirs).__name__.split() or name in ("mistral nemo",)


def test_a_difference_is_seen(corpus, tmp_path):
    hf_models.save("llama", tmp_path / "hf", corpus / "tokenizer")
    _, groups, chunks = read(tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        chunks[0].decoder.layers[2].mlp.linear_fc2.weight[3, 5] += 0.05
    with pytest.raises(Exception, match=r"Transformers' logits differ from the engine's by .* \(at most 0\.0001\)"):
        hugging_face.verify(tmp_path / "hf", chunks, groups, None)


