"""From files to a prepared directory: exact tokens, order, split and hashes; reuse, refusal, kills and full disks."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datafiles import Shuffled

from engine.config.prepare import PrepareConfig
from engine.data import manifest as manifests
from engine.data import staging
from engine.data.indexed import IndexedDataset
from engine.data.prepare import Console, main, prepare
from engine.data.spool import split_key
from engine.data.tokenizer import load_tokenizer, train_tokenizer
from engine.errors import UserError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()  # noqa: SIM905


def sentence(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=30)) + f", number {number}.\n"


@pytest.fixture
def corpus(tmp_path):
    """Three texts, two programs, a JSONL of 22 lines (two of them unusable), a duplicate, one too short, one binary."""
    root = tmp_path / "in"
    (root / "code").mkdir(parents=True)
    for number in range(3):
        (root / f"t{number}.txt").write_text(sentence(number))
    (root / "copy.md").write_text(sentence(1).replace("\n", "\r\n"))
    (root / "short.md").write_text("hi")
    (root / "image.txt").write_bytes(b"\x89PNG")
    (root / "code/a.py").write_text("def f(x):\n\treturn x  \n\n\n# <|endoftext|> is text\n")
    (root / "code/b.c").write_text("int main(void) {\n    return 0;\n}\n")
    records = [json.dumps({"text": sentence(number)}) for number in range(100, 120)]
    (root / "more.jsonl").write_text("\n".join([*records[:10], "{broken", *records[10:], '{"body": 1}']) + "\n")
    return root


def settings(corpus, output="out", **changes) -> PrepareConfig:
    defaults = {"vocab_size": 400, "validation_fraction": 0.2, "max_bad_fraction": 0.1}
    return PrepareConfig(**{"input": [corpus], "output": corpus.parent / output} | defaults | changes)


def texts_of(directory, split) -> list[str]:
    tokenizer = load_tokenizer(directory)
    documents = [list(ids) for ids in IndexedDataset(directory / split)]
    assert all(ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1] for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def digests(directory) -> dict[str, str]:
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(corpus) -> list[str]:
    return sorted(path.name for path in corpus.parent.iterdir() if path.name not in ("in", "out"))


def expected_documents(corpus) -> list[str]:
    """In the order of the sorted paths."""
    return [
        (corpus / "code/a.py").read_text(), (corpus / "code/b.c").read_text(), sentence(1),
        *map(sentence, range(100, 120)), sentence(0), sentence(2),
    ]  # fmt: skip


def test_every_document_comes_back_exactly_in_order(corpus):
    manifest = prepare(settings(corpus))
    out = corpus.parent / "out"
    keys = [split_key(hashlib.sha256(text.encode()).digest()[:16], 1234) for text in expected_documents(corpus)]
    held_out = [key < 0.2 * 2**64 for key in keys]
    assert 0 < sum(held_out) < 12
    for split, wanted in (("train", False), ("validation", True)):
        assert texts_of(out, split) == [
            text for text, held in zip(expected_documents(corpus), held_out, strict=True) if held is wanted
        ]
    assert leftovers(corpus) == []
    assert sorted(digests(out)) == sorted([
        "manifest.json", "quarantine.jsonl", "sources.jsonl", "shards.jsonl", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json", "train.bin", "train.idx", "validation.bin", "validation.idx",
    ])  # fmt: skip
    assert manifest == json.loads((out / "manifest.json").read_text()) == manifests.load(out)


def test_manifest_says_what_happened(corpus):
    manifest = prepare(settings(corpus))
    out = corpus.parent / "out"
    assert manifest["documents"] == {"read": 27, "dropped": 1, "duplicates": 1, "kept": 25}
    assert manifest["cleaning"]["rules"]["too_short"] == {
        "description": "fewer than min_characters", "documents": 1,
        "samples": [{"source": f"{corpus}/short.md", "excerpt": "hi"}],
    }  # fmt: skip
    assert manifest["cleaning"]["repairs"] == {"newlines": 1}
    assert manifest["dedup"] == {
        "duplicates": 1, "samples": [{"dropped": f"{corpus}/t1.txt", "same_as": f"{corpus}/copy.md"}],
    }  # fmt: skip
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert quarantine == manifest["quarantine"].pop("samples")
    assert [(item["file"], item["line"]) for item in quarantine] == [
        (f"{corpus}/image.txt", None), (f"{corpus}/more.jsonl", 11), (f"{corpus}/more.jsonl", 22),
    ]  # fmt: skip
    reasons = {"no_text_field": 1, "not_json": 1, "not_utf8": 1}
    assert manifest["quarantine"] == {"files": 1, "lines": 2, "reasons": reasons}
    size = sum(path.stat().st_size for path in corpus.rglob("*.*"))
    assert manifest["sources"] == [{"path": str(corpus), "files": 9, "bytes": size, "documents": 25}]
    sources = [json.loads(line) for line in (out / "sources.jsonl").read_text().splitlines()]
    assert {item["path"]: item["sha256"] for item in sources} == digests(corpus)
    assert {item["path"]: item["documents"] for item in sources}["more.jsonl"] == 20
    files = digests(out)
    assert manifest["sources_sha256"] == files["sources.jsonl"]
    total = 0
    for split, numbers in manifest["splits"].items():
        dataset = IndexedDataset(out / split)
        assert (numbers["documents"], numbers["tokens"]) == (len(dataset), dataset.num_tokens)
        assert (numbers["bin_sha256"], numbers["idx_sha256"]) == (files[f"{split}.bin"], files[f"{split}.idx"])
        assert numbers["idx_sha256"] == dataset.fingerprint
        total += numbers["bytes"]
    assert total == sum(len(text.encode()) for text in expected_documents(corpus))
    tokenizer = load_tokenizer(out)
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert (manifest["vocab_size"], manifest["eod_id"], manifest["eod_token"]) == (400, 0, "<|endoftext|>")
    assert manifest["tokenizer"]["documents_checked"] == 25
    assert manifest["tokenizer"]["documents_not_restored"] == manifest["tokenizer"]["documents_with_eod_inside"] == 0


def test_tokenizer_is_trained_on_the_training_documents_alone(corpus):
    manifest = prepare(settings(corpus))
    training = texts_of(corpus.parent / "out", "train")
    assert manifest["tokenizer_sha256"] == train_tokenizer(training, 400).sha256
    size = sum(len(text.encode()) for text in training)
    trained = {"kind": "bpe", "form": "huggingface", "documents": len(training), "bytes": size}
    assert manifest["tokenizer"]["trained"] == trained


def test_rerun_elsewhere_is_byte_identical(corpus, monkeypatch):
    prepare(settings(corpus))
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Shuffled(listed(path)))
    prepare(settings(corpus, "out2"))
    assert digests(corpus.parent / "out") == digests(corpus.parent / "out2")


def test_unchanged_input_is_reused_without_a_write(corpus):
    first, lines = prepare(settings(corpus)), []
    out = corpus.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    assert prepare(settings(corpus), log=lines.append) == first
    assert lines == [f"{out}: prepared before from the same input and settings, used as it is"]
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before
    # The same files in another place are the same input, and a glob that matches none of them changes nothing.
    corpus.rename(corpus.parent / "moved")
    moved = settings(corpus, input=[corpus.parent / "moved"], exclude=["*.tmp"])
    assert prepare(moved) == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 401}, "vocab_size 400 -> 401"),
        ({"validation_fraction": 0.3, "seed": 5}, "seed 1234 -> 5; validation_fraction 0.2 -> 0.3"),
        ({"skip_rule": ["few_letters"]}, "skip_rule [] -> ['few_letters']"),
        ({"exclude": ["*.c"]}, "1 file removed (code/b.c)"),
    ],
)
def test_changed_settings_are_refused_and_named(corpus, change, said):
    prepare(settings(corpus))
    out = corpus.parent / "out"
    before = digests(out)
    with pytest.raises(UserError) as error:
        prepare(settings(corpus, **change))
    assert str(error.value) == (
        f"{out}: exists and was prepared from something else: {said}. "
        "Replace it with --overwrite, or choose another --output."
    )
    assert digests(out) == before
    prepare(settings(corpus, **change, overwrite=True))
    prepare(settings(corpus, "fresh", **change))
    assert digests(out) == digests(corpus.parent / "fresh") != before


def test_changed_files_are_named(corpus):
    prepare(settings(corpus))
    (corpus / "t0.txt").write_text(sentence(50))
    (corpus / "new.txt").write_text(sentence(51))
    (corpus / "t2.txt").unlink()
    (corpus / "copy.md").unlink()
    with pytest.raises(UserError) as error:
        prepare(settings(corpus))
    assert "else: 1 file changed (t0.txt); 1 file added (new.txt); 2 files removed (copy.md, …)." in str(error.value)


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "tokenizer/tokenizer.json"])
def test_damaged_output_is_not_reused(corpus, name):
    prepare(settings(corpus))
    path = corpus.parent / "out" / name
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"--overwrite|not a tokenizer") as error:
        prepare(settings(corpus))
    assert str(error.value).startswith(str(path if "bin" in name or "idx" in name else path.parent))
    prepare(settings(corpus, overwrite=True))
    assert prepare(settings(corpus))["documents"]["kept"] == 25


def test_split_is_stable_when_data_is_added(corpus):
    prepare(settings(corpus))
    before = {split: set(texts_of(corpus.parent / "out", split)) for split in manifests.SPLITS}
    for number in range(200, 260):
        (corpus / f"a{number}.txt").write_text(sentence(number))
    prepare(settings(corpus, "out2"))
    after = {split: set(texts_of(corpus.parent / "out2", split)) for split in manifests.SPLITS}
    assert all(before[split] < after[split] for split in manifests.SPLITS)
    prepare(settings(corpus, "out3", seed=1))
    assert set(texts_of(corpus.parent / "out3", "validation")) != after["validation"]


def test_one_document_gives_an_empty_validation_split(tmp_path):
    (tmp_path / "a.txt").write_text(sentence(1))
    manifest = prepare(PrepareConfig(input=[tmp_path / "a.txt"], output=tmp_path / "out", vocab_size=300))
    assert texts_of(tmp_path / "out", "train") == [sentence(1)]
    assert manifest["splits"]["validation"]["documents"] == len(IndexedDataset(tmp_path / "out/validation")) == 0


def test_existing_tokenizer(corpus):
    tokenizer = train_tokenizer([sentence(7)], 300)
    tokenizer.save(corpus.parent / "mine")
    manifest = prepare(settings(corpus, vocab_size=None, tokenizer=corpus.parent / "mine"))
    assert (manifest["vocab_size"], manifest["tokenizer_sha256"]) == (tokenizer.vocab_size, tokenizer.sha256)
    assert manifest["tokenizer"]["trained"] is None
    first = IndexedDataset(corpus.parent / "out/train")[0].tolist()
    assert first == [*tokenizer.encode(texts_of(corpus.parent / "out", "train")[0]), 0]
    # Of a prepared directory; and another one is a change.
    again = prepare(settings(corpus, "out2", vocab_size=None, tokenizer=corpus.parent / "out"))
    assert again["splits"] == manifest["splits"]
    with pytest.raises(UserError, match=r"tokenizer \w{12}… -> none; vocab_size none -> 400"):
        prepare(settings(corpus))
    with pytest.raises(UserError, match=r"vocab_size: the vocabulary of an existing tokenizer is"):
        settings(corpus, tokenizer=corpus.parent / "mine")


def test_tokenizer_that_loses_text_is_called_out(corpus):
    model = json.loads(train_tokenizer([], 300)._text)
    model["normalizer"] = {"type": "Lowercase"}
    (corpus.parent / "lower.json").write_text(json.dumps(model))
    (corpus / "t0.txt").write_text("AN UPPER CASE DOCUMENT")
    lines = []
    manifest = prepare(settings(corpus, vocab_size=None, tokenizer=corpus.parent / "lower.json"), log=lines.append)
    assert manifest["tokenizer"]["documents_not_restored"] == 1
    assert lines[-1] == (
        "warning: this tokenizer loses text: 1 of the first 25 documents do not decode to what they were"
    )


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda root: None, {"min_characters": 5000}, "removed all 27 documents; rule too_short (fewer than min_char"),
        (lambda root: (root / "more.jsonl").write_text("{}\n" * 9), {}, "9 of 9 records are unusable, allowed 10"),
        (lambda root: None, {"text_field": "body"}, "more.jsonl:1: no field 'body' (fields: text)"),
        (lambda root: None, {"input": ["/nowhere"]}, "/nowhere: no such file or folder"),
        (lambda root: (root.parent / "out").write_text("x"), {}, "out: is a file. Choose another --output"),
        (lambda root: (root.parent / "out/x").mkdir(parents=True), {}, "out: exists and is not a prepared directory"),
        (lambda root: None, {"output": "in"}, "holds the input"),
        (lambda root: None, {"skip_rule": ["x"]}, "skip_rule: no quality rule 'x'"),
        (lambda root: None, {"tokenizer": "gone", "vocab_size": None}, "gone: no such tokenizer"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(corpus, monkeypatch, make, change, message):
    monkeypatch.chdir(corpus.parent)
    make(corpus)
    before = digests(corpus.parent)
    with pytest.raises(UserError) as error:
        prepare(settings(corpus, overwrite=True, **change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert digests(corpus.parent) == before
    assert leftovers(corpus) == []


def test_only_unreadable_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"in: no documents; the first unreadable one is .*/in/a\.txt \(not UTF-8 text"):
        prepare(PrepareConfig(input=[tmp_path / "in"], output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


COMMAND = """
import os, resource, signal, sys
from engine.data.prepare import main
from engine.errors import UserError
limit, event, ending, *arguments = sys.argv[1:]
if limit != "none":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
def kill(name, values):
    if name == event and any(str(value).endswith(ending) for value in values):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
try:
    sys.exit(main(arguments))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run(corpus, *arguments, limit="none", kill=("never", "")) -> subprocess.CompletedProcess[str]:
    """The command on ``corpus`` with --overwrite, on a disk where no file can pass ``limit`` bytes, or killed."""
    given = ["--input", corpus, "--output", corpus.parent / "out", "--max_bad_fraction", 0.1, "--overwrite", *arguments]
    return subprocess.run(
        [sys.executable, "-c", COMMAND, str(limit), *kill, *map(str, given)],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize(
    ("limit", "reached"), [(1_000, "sources.jsonl"), (50_000, "/text"), (150_000, "train.bin.tmp")]
)
def test_full_disk(corpus, limit, reached):
    """Writes past ``limit`` fail with the system's error: nothing is left, and the former directory is as it was."""
    prepare(settings(corpus))
    before = digests(corpus.parent / "out")
    for number in range(50):
        (corpus / f"x{number:02}.txt").write_text("".join(sentence(number * 1000 + line) for line in range(14)))
    # With bytes for tokens train.bin is twice the spool, so each limit is hit by the file it is meant for.
    done = run(corpus, "--vocab_size", 272, limit=limit, kill=("never", reached))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "File too large" in last
    assert ("trained a bpe tokenizer" in done.stderr) is (reached == "train.bin.tmp")
    assert "Traceback" not in done.stderr
    assert digests(corpus.parent / "out") == before
    assert leftovers(corpus) == []


@pytest.mark.parametrize(
    ("event", "ending", "vocab_size"),
    [
        ("open", "/documents", 400),
        ("open", "tokenizer_config.json", 400),
        ("os.rename", "/train.bin", 400),
        ("os.rename", "/validation.idx", 400),
        ("open", "manifest.json", 400),
        ("os.rename", ".out.replaced", 400),
        ("os.rename", ".out.preparing/output", 400),
        ("shutil.rmtree", ".out.replaced", 300),
    ],
)
def test_kill_leaves_the_former_or_the_new_directory_whole(corpus, event, ending, vocab_size):
    """SIGKILL just before the named step, the two renames of the replacement included; then the same once more."""
    prepare(settings(corpus))
    out = corpus.parent / "out"
    assert run(corpus, "--vocab_size", 300, kill=(event, ending)).returncode == -9
    assert set(leftovers(corpus)) <= {".out.preparing", ".out.replaced"}
    assert leftovers(corpus)
    staging.recover(out)
    manifest = manifests.load(out)
    manifests.verify(out, manifest)
    assert manifest["vocab_size"] == vocab_size
    same = {"input": [corpus], "max_bad_fraction": 0.1, "vocab_size": 300}
    lines = []
    prepare(PrepareConfig(output=out, overwrite=True, **same), log=lines.append)
    assert lines[0].startswith("goes on with what an earlier run finished") is (vocab_size == 400)
    prepare(PrepareConfig(output=corpus.parent / "fresh", **same))
    assert digests(out) == digests(corpus.parent / "fresh")
    shutil.rmtree(corpus.parent / "fresh")
    assert leftovers(corpus) == []


def test_kill_between_the_two_renames_is_mended(corpus):
    prepare(settings(corpus))
    out, before = corpus.parent / "out", digests(corpus.parent / "out")
    out.rename(corpus.parent / ".out.replaced")
    (corpus.parent / ".out.preparing").mkdir()
    (corpus.parent / ".out.preparing/train.bin").write_bytes(b"half")
    lines = []
    prepare(settings(corpus), log=lines.append)
    assert lines[-1].endswith("used as it is")
    assert (digests(out), leftovers(corpus)) == (before, [])


def test_two_runs_into_one_output(corpus):
    folder = corpus.parent / ".out.preparing"
    folder.mkdir()
    (folder / "theirs").write_text("x")
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="out: another process is preparing this very directory"):
        prepare(settings(corpus))
    assert (folder / "theirs").read_text() == "x"
    os.close(lock)
    assert prepare(settings(corpus))["documents"]["kept"] == 25
    assert leftovers(corpus) == []


def test_output_behind_a_link_and_in_a_new_folder(corpus):
    (corpus.parent / "real").mkdir()
    (corpus.parent / "out").symlink_to("real")
    prepare(settings(corpus))
    prepare(settings(corpus, vocab_size=401, overwrite=True))
    assert (corpus.parent / "out").is_symlink()
    assert manifests.load(corpus.parent / "real")["vocab_size"] == 401
    prepare(settings(corpus, output=corpus.parent / "a/b/c"))
    assert manifests.load(corpus.parent / "a/b/c")["vocab_size"] == 400


def test_command_line(corpus, capsys):
    more = corpus.parent / "more.txt"
    more.write_text(sentence(77))
    out = corpus.parent / "out"
    flags = ["--vocab-size", "400", "--exclude", "*.jsonl", "--exclude=code", "--validation_fraction", "0.3"]
    assert main(["--input", str(corpus), "--input", str(more), "--output", str(out), *flags]) == 0
    printed = capsys.readouterr()
    manifest = manifests.load(out)
    counts = manifest["splits"]
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 4
    assert printed.out.splitlines() == [
        *(f"{name}: {counts[name]['documents']} documents, {counts[name]['tokens']} tokens" for name in counts),
        f"{out}: vocabulary {manifest['vocab_size']}, tokenizer {manifest['tokenizer_sha256'][:12]}",
    ]
    assert "read 7 files" in printed.err
    with pytest.raises(UserError, match=r"--vocab_size: 100 has no room for 256 bytes and 16 special tokens\. Set"):
        main(["--input", str(corpus), "--output", str(out), "--vocab_size", "100"])
    with pytest.raises(UserError, match="min_characters: 9 is above max_characters 5"):
        settings(corpus, min_characters=9, max_characters=5)


def test_progress_on_a_terminal_makes_way_for_what_follows(monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(time, "monotonic", iter(range(100)).__next__)
    console = Console()
    console.progress("read: half")
    console.log("all read")
    console.progress("merge: half")
    console.close()
    console.close()
    assert shown.getvalue() == "\r\x1b[Kread: half\r\x1b[Kall read\n\r\x1b[Kmerge: half\r\x1b[K"


def test_preparing_imports_no_torch(corpus):
    code = "import sys, engine.data.prepare; sys.exit(bool({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0



def test_a_sentencepiece_tokenizer_is_trained_where_one_is_wanted(tmp_path):
    (tmp_path / "in.txt").write_text("Ein Satz, und noch ein Satz. ▁ä☃\n" * 40, encoding="utf-8")
    settings = {"input": [tmp_path / "in.txt"], "output": tmp_path / "out", "vocab_size": 300, "skip_rule": [
        "repeated_lines", "repeated_words"]}
    manifest = prepare(PrepareConfig(**settings, tokenizer_form="sentencepiece"))
    assert (tmp_path / "out/tokenizer/tokenizer.model").is_file()
    assert manifest["tokenizer"]["trained"]["form"] == "sentencepiece"
    assert manifest["tokenizer"]["documents_not_restored"] == 0
    with pytest.raises(UserError, match="tokenizer_form"):
        prepare(PrepareConfig(**settings))
