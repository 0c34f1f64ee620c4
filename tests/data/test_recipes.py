"""Every recipe of configs/data on its fixture: the format and fields of the real data set, from file to tokens."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

from engine.config import STAGES, Config, load_yaml, parse
from engine.config.prepare import PrepareConfig
from engine.data.examples import build
from engine.data.examples.encoding import Encoding
from engine.data.indexed import IndexedDataset
from engine.data.prepare import prepare
from engine.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/recipes"
RECIPES = {path.stem: path for path in sorted((ROOT / "configs/data").glob("*.yaml"))}
# name: documents read, kept
PREPARED = {"tinystories": (25, 24), "openwebtext": (22, 20), "fineweb": (19, 18), "code": (16, 16)}
# name: examples in train, in the other split, a text that one of them holds, format
EXAMPLES = {
    "alpaca": (20, None, "### Instruction:\nGive the sum of the numbers.\n\n### Input:\n3, 5\n", "The sum is 8."),
    "dolly": (20, None, "One morning", "It was a small fox, in story 2."),
    "ultrafeedback": (12, 4, "Tell me about maps in letter 4.", "Letter 4 says that a mistake with maps shows late."),
}


def made() -> object:
    spec = importlib.util.spec_from_file_location("make_fixtures", FIXTURES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fixtures_are_what_their_script_writes_and_each_recipe_has_one():
    script = made()
    assert {name.partition("/")[0] for name in script.FILES} == {*RECIPES} == {*PREPARED, *EXAMPLES}
    for name, rows in script.FILES.items():
        assert script.read(name) == rows(), f"{name}: run tests/fixtures/recipes/make.py"


@pytest.mark.parametrize("name", PREPARED)
def test_a_recipe_for_pretraining(name, tmp_path):
    read, kept = PREPARED[name]
    words = ["--config", RECIPES[name], "--input", FIXTURES / name, "--output", tmp_path / "out", "--vocab_size", 300]
    as_it_is = parse(PrepareConfig, ["--config", str(RECIPES[name])], prog="mainspring prepare")
    assert re.fullmatch(r"hf:[\w.-]+/[\w.-]+(:[\w.-]+)?:train", str(as_it_is.input[0]))
    config = parse(PrepareConfig, [str(word) for word in words], prog="mainspring prepare")
    manifest = prepare(config)
    assert (manifest["documents"]["read"], manifest["documents"]["kept"]) == (read, kept)
    assert manifest["quarantine"]["files"] == manifest["quarantine"]["lines"] == 0
    assert manifest["tokenizer"]["documents_not_restored"] == 0
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer")
    splits = [IndexedDataset(tmp_path / "out" / split) for split in ("train", "validation")]
    assert [len(split) for split in splits] == [kept - len(splits[1]), len(splits[1])]
    found = {tokenizer.decode(ids[:-1].tolist()) for split in splits for ids in (split[i] for i in range(len(split)))}
    assert len(found) == kept
    field = "content" if name == "code" else "text"
    script = made()
    originals = {row[field] for path, rows in script.FILES.items() if path.startswith(name) for row in rows()}
    changed = [text for text in found if not any(text.strip() == one.strip() for one in originals)]
    if name == "fineweb":
        assert len(changed) == 1
        assert "letters@the-old-post.net" not in changed[0]
    else:
        assert not changed


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_recipe_for_examples(name, corpus, tmp_path):
    count, other, prompt, answer = EXAMPLES[name]
    pairs = name == "ultrafeedback"
    stage = "dpo" if pairs else "sft"
    (recipe,) = [load_yaml(RECIPES[name])]
    assert recipe["stage"] == stage
    for stage_file in (ROOT / "configs" / stage).glob("7b_8gpu.yaml"):  # as the recipe's first lines say
        words = ["--config", str(stage_file), "--config", str(RECIPES[name])]
        together = parse(Config, words, prog="p", fixed={"stage": stage})
        assert together.examples.train[0].path == recipe["examples"]["train"][0]["path"]
        assert stage in STAGES
    examples = recipe["examples"]
    for source in [*examples["train"], *examples.get("validation", [])]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source["path"])
        source["path"] = str(FIXTURES / name)
    examples |= {"tokenizer": corpus / "tokenizer", "cache_dir": tmp_path / "cache", "template": "alpaca"}
    changes = {f"examples__{key}": value for key, value in examples.items()}
    cfg = tiny.config(corpus, tmp_path / "run", model__seq_length=768, train__max_steps=1, **changes)
    train = build.build(cfg, corpus / "tokenizer", "train", pairs=pairs, dp_rank=0, dp_size=1)
    held = build.build(cfg, corpus / "tokenizer", "validation", pairs=pairs, dp_rank=0, dp_size=1)
    counts = [sum(map(len, loader.corpus.stores)) for loader in (train, held)]
    assert sum(counts) == count + (other or 0)
    assert other is None or counts == [count, other]
    manifest = json.loads(next((tmp_path / "cache").glob("*/manifest.json")).read_text())
    assert manifest["refused"]["files"] == manifest["refused"]["lines"] == 0
    decode = Encoding(cfg, corpus / "tokenizer", pairs=pairs).tokenizer.decode
    texts = []
    for store in [one for loader in (train, held) for one in loader.corpus.stores]:
        for number in range(len(store)):
            if pairs:
                item = store.pair(number)
                texts.append((decode(item.prompt.tolist()), decode(item.chosen.tolist())))
            else:
                item = store.example(number)
                first = int(np.argmax(item.mask))
                texts.append((decode(item.tokens[:first].tolist()), decode(item.tokens[first:].tolist())))
    assert [asked for asked, said in texts if answer in said and prompt in asked]
