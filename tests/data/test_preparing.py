"""The steps of `prepare`: the same bytes in any order, with any number of processes and after any kill; splits, shards,
lineage, progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine import disk
from engine.config.prepare import PrepareConfig
from engine.data import manifest as manifests
from engine.data import prepare as preparation
from engine.data import spool, staging
from engine.data.indexed import IndexedDataset
from engine.data.prepare import begin, prepare
from engine.data.preparing import duplicates, local, read
from engine.data.preparing.job import Job
from engine.data.preparing.steps import STEPS
from engine.data.tokenizer import load_tokenizer
from engine.errors import Interrupted, UserError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()  # noqa: SIM905


def sentence(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=30)) + f", number {number}.\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Eight texts and a JSONL of 81 lines, every fifth a copy of an earlier one, two unusable: 15 units."""
    root = tmp_path / "in"
    root.mkdir()
    for number in range(8):
        (root / f"t{number}.txt").write_text(sentence(3 if number == 3 else 100 + number))
    lines = [json.dumps({"text": sentence(number if number % 5 else number // 2)}) for number in range(80)]
    lines[50] = "{broken"
    lines.insert(70, '{"body": 1}')
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return root


def config(corpus: Path, output: str = "out", **changes) -> PrepareConfig:
    defaults = {"vocab_size": 400, "validation_fraction": 0.2, "max_bad_fraction": 0.1, "unit_mb": 0.002, "workers": 1}
    return PrepareConfig(**{"input": [corpus], "output": corpus.parent / output} | defaults | changes)


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): disk.sha256(path) for path in files}


def texts_of(directory: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(directory)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in IndexedDataset(directory / split)]


def in_disorder(job: Job) -> None:
    """An executor that does the tasks in any order, half of them twice, each from a `Job` of its own."""
    rng = random.Random(5)
    for step in STEPS:
        tasks = list(range(step.tasks(job)))
        for task in rng.sample(tasks, len(tasks)) + rng.sample(tasks, len(tasks) // 2):
            step.run(Job(job.folder), task)


def test_any_executor_writes_the_same_bytes(corpus):
    one = prepare(config(corpus))
    assert one["documents"] == {"read": 87, "dropped": 0, "duplicates": 9, "kept": 78}
    prepare(config(corpus, "disorder"), execute=in_disorder)
    lines = []
    prepare(config(corpus, "processes", workers=2), progress=lines.append)
    wanted = digests(corpus.parent / "out")
    assert digests(corpus.parent / "disorder") == digests(corpus.parent / "processes") == wanted
    assert any(line.startswith("count: 15 of 15") for line in lines)
    # And nothing but the pieces themselves depends on where the input was cut.
    whole = prepare(config(corpus, "whole", unit_mb=64))
    assert {name for name, sha256 in digests(corpus.parent / "whole").items() if wanted[name] != sha256} == {
        "manifest.json", "sources.jsonl", "shards.jsonl"
    }  # fmt: skip
    changed = {"sources_sha256", "shards_sha256", "settings"}
    assert {name: one[name] for name in one.keys() - changed} == {name: whole[name] for name in one.keys() - changed}


def test_rows_of_a_cut_file_are_numbered_through(corpus):
    manifest = prepare(config(corpus))
    places = [(item["file"], item["line"]) for item in manifest["quarantine"]["samples"]]
    assert places == [(f"{corpus}/lines.jsonl", 51), (f"{corpus}/lines.jsonl", 71)]
    lines = (corpus.parent / "out/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == manifest["quarantine"]["samples"]
    samples = manifest["dedup"]["samples"]
    assert samples[-1] == {"dropped": f"{corpus}/lines.jsonl:46", "same_as": f"{corpus}/lines.jsonl:23"}
    with pytest.raises(UserError, match=r"2 of 81 records are unusable.* the first is .*/lines\.jsonl:51: not JSON"):
        prepare(config(corpus, "strict", max_bad_fraction=0))


@pytest.mark.parametrize("shards", ["many", "one"])
def test_lineage_from_raw_bytes_to_shards(corpus, shards):
    manifest = prepare(config(corpus, shards=shards, test_fraction=0.1))
    out = corpus.parent / "out"
    sources = [json.loads(line) for line in (out / "sources.jsonl").read_text().splitlines()]
    for item in sources:
        raw = (corpus / item["path"]).read_bytes()[item.get("start", 0) : item.get("end")]
        assert (item["sha256"], item["bytes"]) == (hashlib.sha256(raw).hexdigest(), len(raw))
    assert sum(item["documents"] for item in sources) == manifest["documents"]["kept"]
    assert manifest["sources"][0] | {"path": ""} == {
        "path": "", "files": 9, "bytes": sum(path.stat().st_size for path in corpus.iterdir()), "documents": 78
    }  # fmt: skip
    kept = Counter()
    for item in map(json.loads, (out / "shards.jsonl").read_text().splitlines()):
        tokens = IndexedDataset(out / item["shard"])
        assert item["shard_sha256"] == disk.sha256(out / f"{item['shard']}.bin")
        first = tokens.pairs[0].sizes[: item["first_document"]].sum()
        mine = np.concatenate(list(tokens))[first:][: item["tokens"]]
        assert item["sha256"] == hashlib.sha256(mine.tobytes()).hexdigest()
        kept[item["unit"]] += item["documents"]
    assert kept == Counter({unit: sum(s["documents"] for s in sources if s["unit"] == unit) for unit in kept})
    assert set(manifest["splits"]) == {"train", "validation", "test"}


@pytest.mark.parametrize(("shards", "count"), [("many", 13), ("auto", 6), ("one", 1)])
def test_shards_hold_the_same_documents(corpus, shards, count):
    prepare(config(corpus, "plain"))
    manifest = prepare(config(corpus, shards=shards, shard_gb=1e-6 if shards == "auto" else 1e-9))
    out, plain = corpus.parent / "out", corpus.parent / "plain"
    names = sorted(path.stem for path in out.glob("train*.bin"))
    assert names == (["train"] if count == 1 else [f"train-{n:05}-of-{count:05}" for n in range(count)])
    for split in manifests.SPLITS:
        assert texts_of(out, split) == texts_of(plain, split)
    described = manifest["splits"]["train"].get("shards", [manifest["splits"]["train"]])
    assert [item["bin_sha256"] for item in described] == [disk.sha256(out / f"{name}.bin") for name in names]
    assert sum(item["tokens"] for item in described) == manifest["splits"]["train"]["tokens"]
    assert prepare(config(corpus, shards=shards, shard_gb=1e-6 if shards == "auto" else 1e-9)) == manifest
    raw = bytearray((out / f"{names[-1]}.bin").read_bytes())
    raw[0] ^= 1
    (out / f"{names[-1]}.bin").write_bytes(raw)
    with pytest.raises(UserError, match=rf"{names[-1]}\.bin: damaged"):
        prepare(config(corpus, shards=shards, shard_gb=1e-6 if shards == "auto" else 1e-9))


class Stopped(BaseException):
    """Like a KeyboardInterrupt, in the middle of some task."""


def stop_after(tasks: int):
    """An executor that is stopped when it has done so many tasks."""
    def execute(job: Job) -> None:
        done = 0
        for step in STEPS:
            for task in step.open_tasks(job):
                if done == tasks:
                    raise Stopped
                step.run(job, task)
                done += 1

    return execute


def test_a_stopped_run_goes_on(corpus):
    prepare(config(corpus, "whole"))
    folder, out = staging.folder_of(corpus.parent / "out"), corpus.parent / "out"
    for tasks in (0, 5, 15, 17, 32, 34, 47, 51):
        with pytest.raises(Stopped):
            prepare(config(corpus), execute=stop_after(tasks))
        assert not out.exists()
        assert len(list(folder.glob("*/[0-9]*"))) == tasks
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*/[0-9]*/*.json")}
        said = []
        seen: dict[Path, int] = {}

        def execute(job, before=before, seen=seen):
            local.run(job, finished=str, progress=str)
            seen.update({path: path.stat().st_mtime_ns for path in before})

        manifest = prepare(config(corpus), execute=execute, log=said.append)
        assert said[0] == f"goes on with what an earlier run finished in {folder}"
        assert seen == before
        assert digests(out) == digests(corpus.parent / "whole")
        assert not folder.exists()
        assert manifest["documents"]["kept"] == 78
        shutil.rmtree(out)


def test_a_stopped_run_goes_on_with_other_workers(corpus):
    with pytest.raises(Stopped):
        prepare(config(corpus, workers=3), execute=stop_after(5))
    said, seen = [], []

    def execute(job):
        seen.append((job.config.workers, Job(job.folder).config.workers))
        local.run(job, finished=str, progress=str)

    prepare(config(corpus, workers=1), execute=execute, log=said.append)
    assert said[0].startswith("goes on")
    assert seen == [(1, 1)]


def test_what_was_changed_is_done_afresh(corpus):
    for change in ({"vocab_size": 410}, {"min_characters": 5}):
        with pytest.raises(Stopped):
            prepare(config(corpus, overwrite=True), execute=stop_after(20))
        said = []
        found = prepare(config(corpus, overwrite=True, **change), log=said.append)["settings"]
        assert not any("goes on" in line for line in said)
        assert found | change == found
    with pytest.raises(Stopped):
        prepare(config(corpus, "other"), execute=stop_after(20))
    (corpus / "t3.txt").write_text(sentence(1234))
    prepare(config(corpus, "other"))
    prepare(config(corpus, "fresh"))
    assert digests(corpus.parent / "other") == digests(corpus.parent / "fresh")


def test_an_older_boot_or_a_published_job_is_not_gone_on_with(corpus):
    for spoil in ("boot", "published"):
        with pytest.raises(Stopped):
            prepare(config(corpus, overwrite=True), execute=stop_after(20))
        folder = staging.folder_of(corpus.parent / "out")
        if spoil == "boot":
            plan = json.loads((folder / "plan.json").read_text())
            (folder / "plan.json").write_text(json.dumps(plan | {"boot": "another"}))
        else:
            (folder / "assembled").touch()
        said = []
        prepare(config(corpus, overwrite=True), log=said.append)
        assert not any("goes on" in line for line in said)


def test_a_finished_run_takes_away_what_a_stopped_one_left(corpus):
    prepare(config(corpus))
    with pytest.raises(Stopped):
        prepare(config(corpus, overwrite=True, vocab_size=410), execute=stop_after(3))
    folder = staging.folder_of(corpus.parent / "out")
    assert folder.exists()
    prepare(config(corpus))
    assert not folder.exists()


def test_begin_plans_for_an_executor_elsewhere(corpus):
    job = begin(config(corpus))
    assert isinstance(job, Job)
    in_disorder(job)
    assert not any(step.open_tasks(job) for step in STEPS)
    made = prepare(config(corpus))
    assert made == begin(config(corpus)) == prepare(config(corpus, "plain"))
    assert digests(corpus.parent / "out") == digests(corpus.parent / "plain")


def test_near_duplicates_go_whatever_the_units(corpus, monkeypatch):
    text = [word for number in range(40) for word in sentence(500 + number).split()]
    for number in range(6):  # four words of 1,200 differ
        changed = [f"x{at}{number}" if at in (100 * number, 7, 300, 900) else word for at, word in enumerate(text)]
        (corpus / f"u{number}.txt").write_text(" ".join(changed))
    (corpus / "u9.txt").write_text(" ".join(text[::-1]))
    many = prepare(config(corpus, "many", near_dedup={}, workers=2))
    # One unit, cut into chunks as a huge one is.
    monkeypatch.setattr(read, "RUN_DOCUMENTS", 7)
    monkeypatch.setattr(duplicates, "SIGNED_DOCUMENTS", 5)
    monkeypatch.setattr(spool, "_BATCH_DOCUMENTS", 2)
    one = prepare(config(corpus, "one", near_dedup={}, unit_mb=64))
    assert many["near_dedup"] == one["near_dedup"] == {
        "duplicates": 5,
        "samples": [{"dropped": f"{corpus}/u{n}.txt", "same_as": f"{corpus}/u0.txt"} for n in range(1, 6)],
    }  # fmt: skip
    assert many["documents"] == {"read": 94, "dropped": 0, "duplicates": 9, "near_duplicates": 5, "kept": 80}
    for split in manifests.SPLITS:
        assert texts_of(corpus.parent / "one", split) == texts_of(corpus.parent / "many", split)
    assert "near_dedup" not in prepare(config(corpus))


MEASURE = """
import json, os, resource, sys
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # threads take address space that is no memory
from engine.config.prepare import PrepareConfig
from engine.data.prepare import prepare

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) * 1024

def run(name):
    folder = Path(sys.argv[1])
    return prepare(PrepareConfig(input=[folder / f"{name}.jsonl"], output=folder / name, unit_mb=1, workers=1,
                                 vocab_size=300, tokenizer_sample_mb=0.1))

run("small")
limit = peak() + 8_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(json.dumps(run("large")["documents"]))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A corpus of five times the memory that the process may take beyond what one of 2 MB needs."""
    body = " ".join(sentence(number).strip() for number in range(10))
    for name, count in (("small", 1000), ("large", 24_000)):
        with open(tmp_path / f"{name}.jsonl", "w") as lines:
            for number in range(count):
                words = " ".join(str(number * step) for step in range(3, 30))
                lines.write(json.dumps({"text": f"{words} {body[number % 100:]}"}) + "\n")
    assert (tmp_path / "large.jsonl").stat().st_size > 40_000_000
    paths = os.pathsep.join(path for path in sys.path if path)
    # A thread's stack takes address space too, 8 MB at once, and glibc keeps as many as it likes.
    small = "ulimit -S -s 1024; exec \"$@\""
    command = ["bash", "-c", small, "-", sys.executable, "-c", MEASURE, tmp_path]
    env = os.environ | {"PYTHONPATH": paths, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kept"] > 20_000


COLLECTOR = '''
import os, signal, time
from pathlib import Path
from engine.data.collectors import Collector

class Twelve(Collector):
    def parts(self):
        return [str(part) for part in range(12)]

    def documents_of(self, part):
        flag = Path(__file__).with_name("flag")
        for number in range(20):
            if (part, number) == ("7", 10) and flag.exists():
                what = flag.read_text()
                flag.unlink()
                if what == "parent":
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(60)
                if what == "network":
                    raise OSError("the line is dead")
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"Document {number} of part {part}, " + " ".join(f"word{(number + 1) * word}" for word in range(50))
'''


@pytest.fixture
def collector(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(COLLECTOR)
    return tmp_path


def collected(folder: Path, output: str = "out") -> PrepareConfig:
    return config(folder / "in", output, input=[Path(f"python:{folder}/mine.py:Twelve")], workers=2)


@pytest.mark.parametrize(
    ("what", "said"),
    [("worker", r"a worker process died in read 7 \(killed by SIGKILL.*\)\. Start it again: it goes on"),
     ("network", r"stopped after 10 documents \(the line is dead\)\. Run it again")],
)  # fmt: skip
def test_a_worker_that_dies_is_named_and_loses_one_unit(collector, what, said):
    (collector / "flag").write_text(what)
    with pytest.raises(Interrupted, match=said):
        prepare(collected(collector))
    done = [path.name for path in staging.folder_of(collector / "out").glob("read/*") if path.name.isdigit()]
    assert 6 <= len(done) < 12
    assert "00007" not in done
    lines = []
    prepare(collected(collector), log=lines.append)
    assert lines[0].startswith("goes on with what")
    prepare(collected(collector, "plain"), log=lines.append)
    assert digests(collector / "out") == digests(collector / "plain")
    assert sum(numbers["documents"] for numbers in manifests.load(collector / "out")["splits"].values()) == 240


def test_workers_end_with_their_parent(collector):
    (collector / "flag").write_text("parent")
    script = "import sys; from engine.data.prepare import main; sys.exit(main(sys.argv[1:]))"
    given = {"--input": f"python:{collector}/mine.py:Twelve", "--output": collector / "out", "--workers": 2,
             "--vocab_size": 400, "--unit_mb": 0.002}  # fmt: skip
    words = [str(word) for pair in given.items() for word in pair]
    paths = os.pathsep.join(path for path in sys.path if path)
    command = subprocess.Popen([sys.executable, "-c", script, *words], env=os.environ | {"PYTHONPATH": paths})
    assert command.wait(timeout=60) == -signal.SIGKILL
    end = time.monotonic() + 5
    while workers := _processes_with(str(staging.folder_of(collector / "out"))):
        assert time.monotonic() < end, workers
        time.sleep(0.02)


def test_a_worker_whose_parent_is_gone_says_nothing(corpus):
    job = begin(config(corpus))
    assert isinstance(job, Job)
    paths = os.pathsep.join(path for path in sys.path if path)
    worker = subprocess.Popen(
        [sys.executable, "-m", "engine.data.preparing.worker", str(job.folder)], env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    worker.stdout.close()
    worker.stdin.write(b'{"step": "read", "task": 0, "threads": 1}\n')
    worker.stdin.flush()  # its input stays open: it is its answer that nobody hears
    assert worker.wait(timeout=60) == 0
    assert worker.stderr.read() == b""
    worker.stdin.close()


def test_the_current_folder_hides_no_module_of_ours(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    (corpus / "queue.py").write_text("raise SystemExit('not this one')\n")
    (corpus / "engine").mkdir()
    (corpus / "engine" / "__init__.py").write_text("")
    prepare(config(corpus, workers=2, exclude=["*.py"]))


def _processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return [line for line in found if text in line]


def test_a_fault_of_ours_in_a_worker_shows_its_traceback(corpus, monkeypatch):
    (corpus.parent / "sitecustomize.py").write_text(
        "import sys\nif 'worker' in ' '.join(sys.orig_argv):\n"
        "    import engine.data.spool\n    engine.data.spool.split_key = None\n"
    )
    monkeypatch.setattr(sys, "path", [str(corpus.parent), *sys.path])
    with pytest.raises(RuntimeError, match=r"(?s)read \d+ failed in a worker process:\nTraceback.*'NoneType' object"):
        prepare(config(corpus, workers=2))


def test_short_of_memory_without_a_worker(corpus, monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(read, "_write_runs", none)
    with pytest.raises(Interrupted, match=r"out of memory in read 0\. Start it again with more, or"):
        prepare(config(corpus))
    assert staging.folder_of(corpus.parent / "out").is_dir()


def test_a_file_that_changes_meanwhile_is_an_error(corpus):
    def execute(job: Job) -> None:
        (corpus / "t5.txt").write_text("another text that is long enough\n")
        local.run(job, finished=str, progress=str)

    with pytest.raises(UserError, match=r"t5\.txt: was changed while it was prepared\. Start again"):
        prepare(config(corpus), execute=execute)
    assert not staging.folder_of(corpus.parent / "out").exists()


def test_splits_must_leave_something_to_train_on():
    with pytest.raises(UserError, match=r"test_fraction: 0\.5 and validation_fraction 0\.5 leave nothing to train on"):
        PrepareConfig(input=["x"], output="y", validation_fraction=0.5, test_fraction=0.5)


def test_the_test_split_is_stable_when_data_is_added(corpus):
    prepare(config(corpus, test_fraction=0.2))
    names = ("train", "validation", "test")
    before = {split: set(texts_of(corpus.parent / "out", split)) for split in names}
    assert all(before.values())
    for number in range(200, 230):
        (corpus / f"a{number}.txt").write_text(sentence(number))
    prepare(config(corpus, "more", test_fraction=0.2))
    after = {split: set(texts_of(corpus.parent / "more", split)) for split in names}
    assert all(before[split] < after[split] for split in names)
    # What is validation does not depend on there being a test split.
    prepare(config(corpus, "without"))
    assert set(texts_of(corpus.parent / "without", "validation")) == after["validation"]


def test_tokenizer_sample_keeps_to_its_budget(corpus):
    for number in range(300):
        (corpus / f"x{number}.txt").write_text(sentence(1000 + number))
    some = prepare(config(corpus, unit_mb=0.2, tokenizer_sample_mb=0.02))["tokenizer"]["trained"]
    assert 0.015e6 < some["bytes"] < 0.025e6
    assert prepare(config(corpus, "one", unit_mb=0.2, tokenizer_sample_mb=1e-9))["tokenizer"]["trained"] | {
        "bytes": 0} == {"kind": "bpe", "form": "huggingface", "documents": 1, "bytes": 0}  # fmt: skip


def test_small_inputs_start_no_processes(corpus, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert prepare(config(corpus, workers=0))["documents"]["kept"] == 78
    assert preparation.silent("") is None
