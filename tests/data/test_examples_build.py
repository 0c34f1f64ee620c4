"""Tokenized once, atomically, keyed by content; every refusal counted and kept; past a threshold an error."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from engine.config import Config
from engine.data.examples import build, cache, store
from engine.data.examples.encoding import Encoding
from engine.data.examples.loader import ExampleLoader
from engine.data.examples.pair_rows import PairLoader
from engine.data.examples.store import Example, Pair, Store
from engine.errors import UserError

SEQ = 192


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def instructions(count: int, first: int = 0) -> list[dict]:
    return [{"instruction": f"the hand gives {i}", "output": f"the spring stores {i}"}
            for i in range(first, first + count)]


def preferences(count: int) -> list[dict]:
    return [{"prompt": f"the hand {i}", "chosen": "the spring", "rejected": f"no {i}"} for i in range(count)]


@pytest.fixture
def cfg(corpus, tmp_path: Path):
    def make(*paths: Path, **changes) -> Config:
        sources = [{"path": str(path)} for path in paths]
        base = {"model__seq_length": SEQ, "examples__train": sources, "examples__template": "alpaca",
                "examples__tokenizer": corpus / "tokenizer", "examples__cache_dir": tmp_path / "cache"}
        return tiny.config(corpus, tmp_path / "run", **base | changes)

    return make


def load(cfg: Config, split: str = "train", **changes) -> ExampleLoader:
    return build.build(cfg, cfg.examples.tokenizer, split, **{"dp_rank": 0, "dp_size": 1} | changes)


def texts(cfg: Config, one: ExampleLoader) -> list[str]:
    from engine.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.examples.tokenizer)
    return [tokenizer.decode(stored.example(i).tokens.tolist()) for stored in one.corpus.stores
            for i in range(len(stored))]


@pytest.fixture
def encodings(monkeypatch) -> list[str]:
    """The sources that were tokenized, in order."""
    seen: list[str] = []
    read = Encoding.read

    def counted(self, source, quarantine):
        seen.append(Path(source.path).name)
        return read(self, source, quarantine)

    monkeypatch.setattr(Encoding, "read", counted)
    return seen


# ---- the store ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_in_memory_and_on_disk(tmp_path):
    random = np.random.default_rng(0)
    examples = [Example(random.integers(0, 2**31 - 1, n).astype(np.int32), random.random(n) < 0.5)
                for n in random.integers(1, 40, 50)]
    examples[0] = Example(np.array([0, 0, 2**31 - 1], np.int32), np.array([True, False, False]))
    pairs = [Pair(*(random.integers(0, 300, n).astype(np.int32) for n in random.integers(1, 9, 3))) for _ in range(20)]
    for parts, items in ((1, examples), (3, pairs)):
        folder = tmp_path / str(parts)
        folder.mkdir()
        writer = store.Writer(folder, parts)
        for item in items:
            writer.add(store.TRAIN, item)
        writer.quarantine.add("a.jsonl", 3, "missing_response", "no field 'output'")
        writer.finish({"of": "this"}, {"source": "x"})
        manifest, problem = store.read_manifest(folder, {"of": "this"})
        assert (manifest is not None, problem) == (True, "")
        assert manifest["rows"] == len(items) + 1
        assert manifest["refused"]["reasons"] == {"missing_response": 1}
        assert manifest["splits"]["train"]["tokens"] == sum(
            len(item.tokens) if isinstance(item, Example) else sum(map(len, item)) for item in items)
        for found in (store.open_split(folder, manifest, store.TRAIN, "x"), Store.of("x", items)):
            assert len(found) == len(items)
            for number, item in enumerate(items):
                read = found.example(number) if isinstance(item, Example) else found.pair(number)
                assert all(np.array_equal(a, b) for a, b in zip(read, item, strict=True))
        assert len(store.open_split(folder, manifest, store.HELD_OUT, "x")) == 0
        assert store.read_manifest(folder, {"of": "that"})[0] is None


# ---- building -------------------------------------------------------------------------------------------------------


def test_every_row_becomes_an_example_of_its_text(cfg, tmp_path):
    config = cfg(lines(tmp_path / "a.jsonl", instructions(30)))
    found = texts(config, load(config))
    assert len(found) == 30
    for i, text in enumerate(found):
        assert f"### Instruction:\nthe hand gives {i}\n" in text
        assert text.endswith(f"### Response:\nthe spring stores {i}<|endoftext|>")


def test_a_second_start_maps_what_the_first_wrote(cfg, tmp_path, encodings):
    config = cfg(lines(tmp_path / "a.jsonl", instructions(9)), lines(tmp_path / "b.jsonl", instructions(9, 50)))
    first = load(config)
    assert encodings == ["a.jsonl", "b.jsonl"]
    again = load(config, dp_rank=1, dp_size=2)
    assert encodings == ["a.jsonl", "b.jsonl"]
    assert texts(config, again) == texts(config, first)
    assert again.fingerprint == first.fingerprint
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "moved")
    moved = load(cfg(tmp_path / "moved/a.jsonl", tmp_path / "b.jsonl"))
    assert moved.fingerprint == first.fingerprint
    assert moved.ledger(10)[0].source == str(tmp_path / "moved/a.jsonl")
    assert len(encodings) == 2


@pytest.mark.parametrize("change", [
    {"model__seq_length": 256}, {"examples__system": "Be brief."}, {"examples__supervise": "all"},
    {"examples__too_long": "truncate"}, {"examples__validation_fraction": 0.3}, {"examples__template": "own.jinja"},
])
def test_other_settings_are_another_entry(cfg, tmp_path, encodings, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
                                        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    path = lines(tmp_path / "a.jsonl", instructions(30))
    before = load(cfg(path))
    after = load(cfg(path, **change))
    assert encodings == ["a.jsonl"] * 2
    if not change.keys() & {"examples__too_long", "model__seq_length"}:  # which change nothing for rows this short
        assert after.fingerprint != before.fingerprint


def test_an_edited_file_is_tokenized_again_though_its_size_and_time_are_the_same(cfg, tmp_path, encodings):
    import os

    path = lines(tmp_path / "a.jsonl", instructions(9))
    config, stamp = cfg(path), path.stat()
    load(config)
    path.write_text(path.read_text().replace("spring", "wheels"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_size == stamp.st_size
    assert all("wheels" in text for text in texts(config, load(config)))
    assert encodings == ["a.jsonl"] * 2


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "garbage"])
def test_a_damaged_entry_is_made_anew(cfg, tmp_path, encodings, damage):
    config = cfg(lines(tmp_path / "a.jsonl", instructions(9)))
    expected = texts(config, load(config))
    (entry,) = entries(tmp_path / "cache")
    tokens = entry / "train.tokens"
    if damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[40] ^= 1
        tokens.write_bytes(content)
    elif damage == "truncate":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif damage == "delete":
        tokens.unlink()
    else:
        (entry / "manifest.json").write_text("{}" if damage == "garbage" else '{"version"')
    assert texts(config, load(config)) == expected
    assert encodings == ["a.jsonl"] * 2
    assert entries(tmp_path / "cache") == [entry]


def test_what_a_killed_process_left_is_never_read_and_is_removed(cfg, tmp_path, monkeypatch):
    config = cfg(lines(tmp_path / "a.jsonl", instructions(9)))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "finish", killed)
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # a SIGKILL cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            load(config)
    (left,) = entries(tmp_path / "cache")
    assert ".tmp-" in left.name
    left.rename(left.with_name(left.name + "-of-another-process"))
    assert len(texts(config, load(config))) == 9
    assert [".tmp-" in path.name for path in entries(tmp_path / "cache")] == [False]


def _load_in_process(data: dict, results, noted: Path) -> None:
    config, read = Config(**data), Encoding.read

    def noting(self, source, quarantine):
        with noted.open("a") as file:
            file.write("once\n")
        return read(self, source, quarantine)

    Encoding.read = noting  # of this process
    one = load(config)
    results.put((one.fingerprint, one.num_examples))


def test_processes_that_start_together_make_one_entry(cfg, tmp_path):
    config = cfg(lines(tmp_path / "a.jsonl", instructions(400)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(config.model_dump(exclude_unset=True), results,
                                                                   tmp_path / "noted")) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(found)) == 1
    assert found[0][1] == 400
    assert (tmp_path / "noted").read_text() == "once\n", "others did the work again"
    assert len(entries(tmp_path / "cache")) == 1


def test_a_full_disk_is_one_line(cfg, tmp_path):
    config = cfg(lines(tmp_path / "a.jsonl", instructions(9)), examples__cache_dir=Path("/dev/full/cache"))
    with pytest.raises(UserError, match=r"/dev/full/cache: .*examples\.cache_dir"):
        load(config)


# ---- held out -------------------------------------------------------------------------------------------------------


def test_held_out_examples_are_chosen_by_content(cfg, tmp_path):
    path = lines(tmp_path / "a.jsonl", [*instructions(300), *instructions(300)])
    config = cfg(path, examples__validation_fraction=0.2)
    train, held_out = texts(config, load(config)), texts(config, load(config, "validation"))
    assert len(train) + len(held_out) == 600
    assert 60 < len(held_out) < 180
    assert not set(train) & set(held_out), "a copy is on the other side"
    lines(path, instructions(150)[::-1])  # other rows around them, another order
    moved = texts(config, load(config, "validation"))
    assert set(moved) == {text for text in held_out if int(text.rpartition(" ")[2].split("<")[0]) < 150}
    assert load(config).report[0].count("more held out") == 1


def test_own_validation_files_win_and_nothing_is_held_out_without_either(cfg, tmp_path):
    path, other = lines(tmp_path / "a.jsonl", instructions(20)), lines(tmp_path / "v.jsonl", instructions(5, 70))
    config = cfg(path, examples__validation=[{"path": str(other)}], examples__validation_fraction=0.0)
    assert len(texts(config, load(config))) == 20
    assert [text for text in texts(config, load(config, "validation")) if "gives 7" not in text] == []
    assert load(cfg(path), "validation").num_tokens == 0


# ---- bad rows -------------------------------------------------------------------------------------------------------

BAD = {
    "missing_response": {"instruction": "the hand"},
    "unknown_role": {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]},
    "empty_completion": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
    "not_json": '{"instruction": "the\n',
    "too_long": {"instruction": "the hand", "output": "spring stores " * 400},
    "other_kind": {"prompt": "the hand", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named_counted_and_kept(cfg, tmp_path, reason):
    path = lines(tmp_path / "a.jsonl", [*instructions(19), BAD[reason], *instructions(5, 40)])
    config = cfg(path, examples__max_bad_fraction=0.05)
    one = load(config)
    assert one.num_examples == 24
    assert f"1 rows refused ({reason} 1)" in one.report[0]
    (entry,) = entries(tmp_path / "cache")
    (noted,) = [json.loads(line) for line in (entry / "quarantine.jsonl").read_text().splitlines()]
    assert (noted["file"], noted["line"], noted["reason"]) == (str(path), 20, reason)
    assert json.loads((entry / "manifest.json").read_text())["refused"]["reasons"] == {reason: 1}
    name = "max_too_long_fraction" if reason == "too_long" else "max_bad_fraction"
    with pytest.raises(UserError) as error:
        load(config.with_values({f"examples.{name}": 0.01}))
    message = str(error.value)
    if reason == "too_long":
        assert message.startswith(f"examples.train[0] {path}: 1 of 25 rows are longer than model.seq_length")
        assert str(entry / "quarantine.jsonl") in message
        return
    assert message.startswith(f"examples.train[0] {path}: 1 of 25 rows are unusable ({reason} 1), allowed 1.00%")
    assert f"the first is {path}:20: " in message
    assert str(entry / "quarantine.jsonl") in message


def test_pairs_are_refused_by_their_own_rules(cfg, tmp_path):
    bad = [{"prompt": "the hand", "chosen": "same", "rejected": "same"}, {"prompt": "the hand", "chosen": "a"},
           {"prompt": "the " * 900, "chosen": "a", "rejected": "b"}, instructions(1)[0]]
    config = cfg(lines(tmp_path / "p.jsonl", [*preferences(12), *bad]), examples__max_bad_fraction=0.5)
    one = load(config, pairs=True)
    assert isinstance(one, PairLoader)
    assert one.num_examples == 12
    (entry,) = entries(tmp_path / "cache")
    reasons = json.loads((entry / "manifest.json").read_text())["refused"]["reasons"]
    assert reasons == {"chosen_is_rejected": 1, "missing_rejected": 1, "prompt_too_long": 1, "other_kind": 1}


def test_sources_without_examples_and_missing_files_are_refused(cfg, tmp_path):
    with pytest.raises(UserError, match=r"examples\.train: no examples are named"):
        load(cfg())
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        load(cfg(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match=r"a\.jsonl: holds no rows"):
        load(cfg(lines(tmp_path / "a.jsonl", [])))
    with pytest.raises(UserError, match=r"b\.jsonl: gives no example"):
        load(cfg(lines(tmp_path / "b.jsonl", [BAD["too_long"]]), examples__max_too_long_fraction=1.0))


def test_the_first_unusable_row_is_named_behind_many_that_are_too_long(cfg, tmp_path):
    path = lines(tmp_path / "a.jsonl", [*[BAD["too_long"]] * 30, *instructions(20), BAD["missing_response"]])
    with pytest.raises(UserError, match=rf"1 of 51 rows are unusable .* the first is {path}:51: "):
        load(cfg(path, examples__max_too_long_fraction=0.9))


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_must_be_the_models_own(cfg, corpus, tmp_path):
    config = cfg(tmp_path / "a.jsonl")
    assert build.tokenizer_folder(config, corpus / "tokenizer") == corpus / "tokenizer"
    assert build.tokenizer_folder(config, None) == corpus / "tokenizer"
    other = tiny.write_corpus(tmp_path / "other", 280) / "tokenizer"
    with pytest.raises(UserError, match="is not the tokenizer of the weights"):
        build.tokenizer_folder(config, other)
    without = config.with_values({"examples.tokenizer": None})
    assert build.tokenizer_folder(without, other) == other
    with pytest.raises(UserError, match=r"examples\.tokenizer: random weights have no tokenizer"):
        build.tokenizer_folder(without, None)
