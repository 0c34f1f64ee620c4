"""model.vocab_size: as large as the tokenizer's vocabulary when unset, larger when set, never smaller."""

from __future__ import annotations

import json

import pytest
import torch

import engine
from engine.config import ModelConfig, padded_vocab_size, vocabulary


def test_the_larger_of_the_two():
    assert vocabulary(ModelConfig(), 300) == 300
    assert vocabulary(ModelConfig(vocab_size=300), 300) == 300
    assert vocabulary(ModelConfig(vocab_size=128256), 300) == 128256
    with pytest.raises(engine.UserError, match=r"model.vocab_size: 299 is fewer than the 300 tokens .* Set it to 300"):
        vocabulary(ModelConfig(vocab_size=299), 300)


def test_a_model_with_room_for_more_tokens(config):
    """Trains, resumes and is evaluated with rows that no token uses, and never generates one of those."""
    cfg = config(train__max_steps=2, model__vocab_size=500, model__tie_embeddings=False, model__vocab_multiple=8)
    engine.pretrain.run(cfg)
    state = engine.pretrain.run(cfg.with_values({"train.max_steps": 3}))
    assert (state.step, state.consumed_samples) == (3, 12)
    with engine.restore(cfg.output_dir) as restored:
        rows = padded_vocab_size(cfg.model, 500)
        assert restored.record["vocab_size"] == 500
        weights = dict(restored.chunks[0].named_parameters())
        assert weights["output_layer.weight"].shape == (rows, cfg.model.hidden_size) == (504, 32)
        assert weights["embedding.word_embeddings.weight"].shape == (504, 32)
        assert weights["embedding.word_embeddings.weight"][300:500].std().item() == pytest.approx(0.08, rel=0.05)
        logged = [json.loads(line) for line in (cfg.output_dir / "metrics.jsonl").read_text().splitlines()]
        assert engine.evaluate.run(restored)["loss"] == pytest.approx(logged[-1]["val/loss"], abs=1e-6)
        with torch.no_grad():  # the model wants nothing but tokens that no text has
            weights["output_layer.weight"].zero_()
            weights["output_layer.weight"][300:500] = weights["output_layer.weight"].new_ones(32)
            weights["decoder.final_layernorm.weight"].fill_(1.0)
        prompt = restored.tokenizer.encode("the spring")
        from engine.evaluation.generation import Sampling, generate

        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=5, temperature=temperature)
            rows = generate(restored.chunks[0], prompt, sampling, eod_id=None, vocab_size=300, num_samples=4)
            assert max(map(max, rows)) < 300
            assert all(len(row) == 5 for row in rows)
        assert len(engine.generate.continuations(restored, "the spring", max_new_tokens=5, num_samples=2)) == 2
