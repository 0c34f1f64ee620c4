"""A checkpoint of any layout continues under any other: every pair, in one launch of eight ranks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import tiny

WORKER = Path(__file__).with_name("reshard_ranks.py")
# Four layers are two for each of two interleaved pipeline stages; rows are padded to 304 or, split in two, to 320.
MODEL = {"model__num_layers": 4, "model__hidden_size": 16, "model__ffn_hidden_size": 24, "model__seq_length": 8,
         "model__vocab_multiple": 16, "model__qk_norm": True, "model__attention_bias": True,
         "model__attention_sinks": True, "data__shuffle_seed": 7, "train__eps": 1e-5}
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 12}
FAMILIES = {
    "dense": {},
    "bf16": {"train__precision": "bf16", "model__tie_embeddings": False},
    "two_bytes": {"train__precision": "bf16", "train__adamw": {"moments": "bf16", "master": "remainder"},
                  "model__num_layers": 2, "model__moe": EXPERTS},
    "moe": {"model__num_layers": 2, "model__moe": EXPERTS | {
        "shared_ffn_hidden_size": 12, "num_dense_layers": 1, "router": "sigmoid", "expert_bias": True}},
    "muon": {"model__num_layers": 2, "model__moe": EXPERTS, "model__linear_bias": True, "train__optimizer": "muon"},
}


@pytest.fixture(scope="module")
def pairs(corpus, tmp_path_factory) -> dict[tuple[str, str, str], dict]:
    """What every pair of layouts of a family found: (family, source, target) -> record."""
    folder = tmp_path_factory.mktemp("reshard")
    for family, changes in FAMILIES.items():
        (folder / f"{family}.json").write_text(tiny.to_json(tiny.config(corpus, folder, **MODEL | changes)))
        (folder / family).mkdir()
    for code, output in tiny.launch(WORKER, 8, folder, *FAMILIES, timeout=600):
        assert code == 0, output[-6000:]
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return {(r["family"], r["source"], r["target"]): r for r in records}


def of(pairs: dict, family: str, layouts: int) -> list[dict]:
    found = {key[1:]: record for key, record in pairs.items() if key[0] == family}
    names = {source for source, _ in found}
    assert len(names) == layouts
    assert found.keys() == set(product(names, names))
    return list(found.values())


@pytest.mark.parametrize(("family", "layouts", "tolerance"), [
    ("dense", 8, 1e-6), ("bf16", 6, 1e-3), ("two_bytes", 4, 1e-3), ("moe", 6, 1e-6), ("muon", 5, 1e-6)])
def test_every_layout_continues_from_every_other(pairs, family, layouts, tolerance):
    for pair in of(pairs, family, layouts):
        what = pair["source"], pair["target"]
        assert not pair["wrong"], what
        assert pair["losses"] == pytest.approx(pair["expected"], rel=tolerance), what
        if pair["source"] == pair["target"]:
            assert pair["losses"] == pair["expected"], what
