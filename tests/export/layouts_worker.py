"""Run by test_layouts.py as several ranks: models read and written under each layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hf_models
import tiny
import torch
import torch.distributed as dist

from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.export import hugging_face
from engine.model import build, whole
from engine.parallel import topology


def round_trip(source: Path, layout: dict, output: Path, tokenizer: Path) -> float:
    """Reads and writes under ``layout``; every rank holds its part alone. -> difference of the logits."""
    tiny.forget_layout()
    cfg = tiny.config(source, output, model=hugging_face.model_section(source), **layout)
    groups = topology.build(cfg)
    chunks = build.model(cfg, groups, cfg.model.vocab_size)
    for chunk in chunks:
        for p in chunk.parameters():
            p.data.fill_(float("nan"))  # nothing of the initial weights may be left
    hugging_face.load(source, chunks, cfg, groups)
    assert all(p.isfinite().all() for chunk in chunks for p in chunk.parameters())
    for chunk in chunks:
        for name, p in whole.global_names(chunk).items():
            rows = whole.split_of(name, p, groups.pg)
            if name in whole.VOCABULARY and rows.index == rows.count - 1:
                assert not p[-1].any(), "rows that pad the vocabulary are zero"
    back = hugging_face.save(chunks, cfg, groups, tokenizer, output / "back", dtype="fp32", max_shard_gb=2e-5)
    if groups.is_main:
        assert len(list(back.glob("*.safetensors"))) > 3
        hf_models.assert_same(hf_models.tensors(back), hf_models.tensors(source))
    if len(chunks) > 1:  # interleaved stages
        return 0.0
    own = None if source.name.startswith("qwen2") else load_tokenizer(tokenizer)  # AutoTokenizer has its own for it
    return hugging_face.verify(back, chunks, groups, own)


def one_rank_fails(source: Path, tokenizer: Path, output: Path) -> list[str]:
    """What each rank raises where a single one cannot go on: none waits for the others."""
    tiny.forget_layout()
    cfg = tiny.config(source, output, model=hugging_face.model_section(source), parallel__tensor=2)
    groups = topology.build(cfg)
    chunks = build.model(cfg, groups, cfg.model.vocab_size)
    hugging_face.load(source, chunks, cfg, groups)
    if groups.rank == 1:
        with torch.no_grad():
            chunks[0].decoder.layers[1].mlp.linear_fc1.weight[0, 0] = 1e6  # past fp16
    said: list = [None, None]
    try:
        hugging_face.save(chunks, cfg, groups, tokenizer, output / "fp16", dtype="fp16")
        own = "nothing"
    except UserError as error:
        own = str(error)
    dist.all_gather_object(said, own)
    return said


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    results: dict = {}
    tokenizer = Path(job["tokenizer"])
    for i, (name, source, layout) in enumerate(job["trips"]):
        print(name, layout, flush=True)
        results[f"{name} {layout}"] = round_trip(Path(source), layout, folder / str(i), tokenizer)
    if "fails" in job:
        results["fails"] = one_rank_fails(Path(job["fails"]), tokenizer, folder / "fails")
        assert not list((folder / "fails").glob("*")), "an export that failed left something behind"
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
