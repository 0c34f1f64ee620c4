"""Models read under tensor, pipeline and expert parallelism and written from there: the same bits and logits."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import tiny

TP2, PP2, EP2 = ({f"parallel__{name}": 2} for name in ("tensor", "pipeline", "expert"))
SP = {**TP2, "parallel__sequence_parallel": True}
TRIPS: dict[int, list[tuple[str, dict]]] = {
    2: [("llama", TP2), ("llama 3", PP2), ("llama 3", {**PP2, "parallel__virtual_pipeline": 2}), ("qwen2", TP2),
        ("one group", TP2), ("qwen3", PP2), ("mixtral", EP2), ("qwen3_moe dense first", EP2), ("mixtral", SP),
        ("gpt_oss", EP2), ("llama", {})],
    4: [("llama 3", {**TP2, **PP2}), ("qwen3_moe", {**PP2, **EP2}),
        ("gpt_oss", {**SP, **EP2, "parallel__expert_tensor": 1})],
}
CHANGES = {"one group": ("llama", {"num_key_value_heads": 1})}


@pytest.mark.parametrize("world", TRIPS)
def test_layouts_read_and_write_the_same_model(world, corpus, tmp_path):
    tokenizer, job = corpus / "tokenizer", {"trips": [], "tokenizer": str(corpus / "tokenizer")}
    for name, layout in TRIPS[world]:
        model, changes = CHANGES.get(name, (name, {}))
        source = tmp_path / name
        if not source.exists():
            hf_models.save(model, source, tokenizer, shard="20KB", **changes)
        job["trips"].append((name, str(source), layout))
    if world == 2:
        job["fails"] = str(tmp_path / "llama")
    (tmp_path / "job.json").write_text(json.dumps(job))
    for code, output in tiny.launch(Path(__file__).with_name("layouts_worker.py"), world, tmp_path):
        assert code == 0, output[-4000:]
    found = json.loads((tmp_path / "results.json").read_text())
    for said in found.pop("fails", []):
        assert "decoder.layers.1.mlp.linear_fc1.weight has values up to 1e+06, beyond fp16. Use --dtype bf16" in said
    assert len(found) == len(TRIPS[world])
    assert max(found.values()) < 1e-4, found
