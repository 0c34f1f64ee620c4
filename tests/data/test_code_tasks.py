"""Functions cut out of Python files, corrupted in one place, split by file and written: exact texts and counts."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from datafiles import Shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import cli
from engine.config.code_tasks import CodeTasksConfig
from engine.config.prepare import PrepareConfig
from engine.data import code_functions, code_mutations
from engine.data.code_functions import Function, Passed
from engine.data.code_tasks import code_tasks, main, prompt_of
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.runtime import command

MODULE = '''\
import functools
\f
class Shelf:
    """Not a function."""

    @functools.cache
    @property
    def width(self,
              unit="m"):  # of the board
        """How wide it is.

        In metres.
        """

        # é measured \\ once
        if unit == "m":
            return 2
        return [1,
          2]

    def stub(self):
        """To be written elsewhere."""
        raise NotImplementedError("later")

    def table(self):
        """Several lines of text."""
        return """first
    second"""


if True:
    async def fetch(url): # no docstring follows on this line
        """Gets it; 'quoted' text\\."""
        def inner():
            """Belongs to fetch."""
            return url
        return inner

def one(): """On one line of all."""; return 1
def bare(x):
    return x
def long(x):
    """First paragraph.

    Second paragraph, which is far too long for what was asked.
    """
    return x + 1
def longer():
    """One paragraph that is far too long for what was asked, altogether so."""
    return 0
'''


def test_functions_are_cut_in_the_words_of_their_author():
    found = list(code_functions.functions(MODULE, max_docstring=40))
    by_name = {item.name: item for item in found}
    assert [item.name for item in found] == ["width", "stub", "table", "fetch", "one", "long", "longer"]
    assert by_name["width"] == Function(
        "width", "Shelf", 8,
        '@functools.cache\n@property\ndef width(self,\n          unit="m"):  # of the board',
        "How wide it is.\n\nIn metres.",
        '@functools.cache\n@property\ndef width(self,\n          unit="m"):  # of the board\n'
        '    # é measured \\ once\n    if unit == "m":\n        return 2\n    return [1,\n      2]\n',
    )  # fmt: skip
    assert by_name["fetch"] == Function(
        "fetch", "", 32, "async def fetch(url): # no docstring follows on this line", "Gets it; 'quoted' text\\.",
        'async def fetch(url): # no docstring follows on this line\n    def inner():\n'
        '        """Belongs to fetch."""\n        return url\n    return inner\n',
    )  # fmt: skip
    assert by_name["long"].docstring == "First paragraph."  # type: ignore[union-attr]
    passed = {item.name: item.reason for item in found if isinstance(item, Passed)}
    assert passed == {"stub": "no_body", "table": "not_dedentable", "one": "on_one_line", "longer": "long_docstring"}


def test_prompt_asks_for_methods_by_their_class():
    items = [item for item in code_functions.functions(MODULE, max_docstring=40) if isinstance(item, Function)]
    assert prompt_of(items[0]) == (
        "Write the Python method of class Shelf that this signature and docstring describe.\n\n"
        '@functools.cache\n@property\ndef width(self,\n          unit="m"):  # of the board\n'
        '    """How wide it is.\n\n    In metres.\n    """'
    )
    assert prompt_of(items[2]) == (
        "Write the Python function that this signature and docstring describe.\n\n"
        'def long(x):\n    """First paragraph."""'
    )


@given(st.text(st.sampled_from("ab \n\t'\"\\é{"), max_size=30))
@settings(max_examples=300, deadline=None)
def test_quoted_docstring_is_read_back_as_it_was(text):
    docstring = inspect.cleandoc(text).strip()
    literal = code_functions.quoted(docstring)
    if literal is None:
        lines = docstring.split("\n")
        assert '"""' in docstring or "\\" in docstring or "\t" in docstring or docstring[:1] == '"' or any(
            line != line.rstrip() for line in lines), docstring
    else:
        tree = ast.parse(f"def f():\n{literal}\n")
        assert (ast.get_docstring(tree.body[0]) or "").strip() == docstring  # type: ignore[arg-type]


BROKEN = {
    "comparison": ("if a < b in c:\n    return a is not b", {"a <= b", "a > b", "b not in c", "a is b"}),
    "arithmetic": ("c -= a\nreturn a + b * c % 2, '%d' % a",
                   {"c += a", "a - b", "b + c", "b // c", "c // 2"}),
    "boolean": ("return (a and b) or c", {"(a or b) or c", "(a and b) and c"}),
    "condition": ("if not a:\n    return 1 if b else 2\nwhile a > (\n    b):\n    pass",
                  {"if a:", "1 if not b else", "while not (a > (\n        b)):"}),
    "constant": ("return True, 0, 7, 'é1', None, 0x10", {"return False", "True, 1,", " 8,", " 6,"}),
    "variable": ("d = é(a)\nreturn d", {"é(b)", "é(c)", "é(d)", "return a", "return b", "return c"}),
    "arguments": ("return f('é', b, *c) + g('é', b)", {"g(b, 'é')"}),
    "call": ("a.append(b)\nopen(a)\nreturn min(a)", {"a.extend(b)", "a.insert(b)", "max(a)"}),
    "returned": ("if a:\n    return a\nreturn 1", {"return None"}),
    "missing": ("a = 1; b = 2\nc = b\nreturn c", {"b = 2\n    return c"}),
    "order": ("a = b\nc = a\nd = 1\nreturn c", {"    c = a\n    a = b\n"}),
    "truncated": ("a()\nb()\nif a:\n    c()\n# the end\nreturn c", {"c()\n    # the end\n", "a()\n    b()\n"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_every_corruption_of_each_kind(kind):
    """All that are possible, each holding a text that the original does not; with two-byte characters before them."""
    body, wanted = BROKEN[kind]
    code = "def f(a, b, c):\n" + textwrap.indent(body, "    ") + "\n"
    found = [item.code for item in code_mutations.corrupt(code, seed=1, count=99, kinds=[kind])]
    assert len(found) == len(set(found)) == len(wanted)
    if kind == "truncated":
        assert {item.removeprefix("def f(a, b, c):\n") for item in found} == {
            "    a()\n    b()\n", "    a()\n    b()\n    if a:\n        c()\n    # the end\n"}
        return
    hits = Counter(text for text in wanted for item in found if text in item and text not in code)
    assert hits == dict.fromkeys(wanted, 1), found


def documented(*names: str) -> list[Function]:
    root = Path(inspect.getfile(json)).parents[1]
    texts = [(root / name).read_text(encoding="utf-8") for name in names]
    return [item for text in texts for item in code_functions.functions(text, max_docstring=10_000)
            if isinstance(item, Function)]  # fmt: skip


def test_the_standard_library_breaks_in_every_way_and_stays_python():
    """Real functions: header kept, other tree, other byte code, and in the end all kinds."""
    items = documented("argparse.py", "textwrap.py", "statistics.py", "shutil.py", "asyncio/base_events.py")
    kinds: Counter[str] = Counter()
    for item in items:
        found = code_mutations.corrupt(item.code, seed=7, count=4)
        assert found == code_mutations.corrupt(item.code, seed=7, count=4)
        assert len({broken.code for broken in found} | {item.code}) == len(found) + 1
        kinds.update(broken.kind for broken in found)
        if len(found) == 4:
            assert len({broken.kind for broken in found}) >= 2
        for broken in found:
            assert broken.code.startswith(item.header)
            before, after = ast.parse(item.code), ast.parse(broken.code)
            assert ast.dump(before.body[0].args) == ast.dump(after.body[0].args)  # type: ignore[attr-defined]
            assert ast.dump(before) != ast.dump(after)
            assert compile(item.code, "", "exec").co_consts != compile(broken.code, "", "exec").co_consts
    assert len(items) > 120
    assert set(kinds) == set(code_mutations.KINDS)
    other = [code_mutations.corrupt(item.code, seed=8)[:1] for item in items]
    assert other != [code_mutations.corrupt(item.code, seed=7)[:1] for item in items]


def test_what_changes_nothing_is_no_corruption():
    for body in ("x = 1\nreturn x", "pass", "return 'text'"):
        code = "def f():\n" + textwrap.indent(body, "    ") + "\n"
        kinds = ["comparison", "arithmetic", "boolean", "condition", "variable", "arguments", "call"]
        assert code_mutations.corrupt(code, seed=1, count=9, kinds=kinds) == []
    # Folded to the same constant; no pattern that Python knows.
    code = "def f(a):\n    match a:\n        case 1 + 2j:\n            return 2 * 2\n"
    assert [item.code.split()[-3:] for item in code_mutations.corrupt(code, seed=1, count=9, kinds=["arithmetic"])] == [
        ["2", "//", "2"], ["2", "*", "2"]]  # the other one is `case 1 - 2j`
    # `min` of two equal texts, a docstring-like string that the compiler drops, an annotation that is never run.
    code = "def f(a):\n    x: min = 'x'\n    'dropped'\n    return g(a, a)\n"
    found = code_mutations.corrupt(code, seed=1, count=9, kinds=["arguments", "call", "missing"])
    assert found == []


def source_of(number: int, *, name: str | None = None, plus: int = 0) -> str:
    text = f"number {number} of the module, as a documented function"
    return (f'def {name or f"value_{number}"}(first, second):\n    """Return {text}."""\n    total = first * '
            f"{number + plus} + second\n    if total > {number}:\n        total -= 1\n    return total\n\n")


@pytest.fixture
def corpus(tmp_path):
    """Twenty modules with two functions each, a package of two, a duplicate, a stub, Python 2 and one not UTF-8."""
    root = tmp_path / "in"
    (root / "inner/mime").mkdir(parents=True)
    (root / "tests").mkdir()
    for number in range(20):
        (root / f"m{number:02}.py").write_text(source_of(number) + source_of(100 + number))
    (root / "inner/mime/__init__.py").write_text(source_of(300) + source_of(301))
    (root / "inner/mime/base.py").write_text(source_of(302))
    (root / "inner/mimetypes.py").write_text(source_of(303))
    (root / "n_copy.py").write_text(source_of(3, name="value_again") + source_of(0, plus=5000))
    (root / "n_stub.py").write_text('def f():\n    """Does nothing at all, for now."""\n    pass\n')
    (root / "tests/test_m.py").write_text(source_of(999))
    (root / "old.py").write_text("x = 1\nprint 'two'\n")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "notes.md").write_text(source_of(998))
    return root


def config(corpus, output="out", **changes) -> CodeTasksConfig:
    defaults = {"validation_fraction": 0.2, "max_bad_fraction": 0.1, "package": ["inner.mime"]}
    return CodeTasksConfig(**{"input": [corpus], "output": corpus.parent / output} | defaults | changes)


def rows(directory, part, split) -> list[dict]:
    return [json.loads(line) for line in (directory / part / f"{split}.jsonl").read_text().splitlines()]


def digests(directory) -> dict[str, str]:
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.rglob("*") if path.is_file()}  # fmt: skip


def files_of(found: list[dict]) -> set[str]:
    return {row["source"].rpartition(":")[0] for row in found}


def test_rows_are_split_by_file_and_say_where_they_are_from(corpus):
    manifest, out = code_tasks(config(corpus)), corpus.parent / "out"
    train, held_out = rows(out, "sft", "train"), rows(out, "sft", "validation")
    assert not files_of(train) & files_of(held_out)
    assert files_of(train) | files_of(held_out) == {*(f"m{number:02}.py" for number in range(20)), "inner/mimetypes.py"}
    assert len(train) + len(held_out) == 41
    assert 2 <= len(held_out) <= 12
    assert manifest["held_out"]["validation"] == sorted(files_of(held_out) | files_of(rows(out, "lora", "validation")))
    first = next(row for row in [*train, *held_out] if row["source"] == "m03.py:8")
    assert first == {
        "instruction": "Write the Python function that this signature and docstring describe.\n\n"
        'def value_103(first, second):\n    """Return number 103 of the module, as a documented function."""',
        "response": "def value_103(first, second):\n    total = first * 103 + second\n    if total > 103:\n"
        "        total -= 1\n    return total\n",
        "source": "m03.py:8",
    }
    for split, examples in (("train", train), ("validation", held_out)):
        pairs = rows(out, "dpo", split)
        assert [(row["prompt"], row["chosen"], row["source"]) for row in pairs] == [
            (row["instruction"], row["response"], row["source"]) for row in examples]  # fmt: skip
        assert all(row["rejected"] != row["chosen"] and row["mutation"] in code_mutations.KINDS for row in pairs)
    lora = rows(out, "lora", "train") + rows(out, "lora", "validation")
    assert files_of(lora) == {"inner/mime/__init__.py", "inner/mime/base.py"}
    assert len(lora) == 3
    assert manifest["files"]["lora/validation.jsonl"]["rows"] in (1, 2)


def test_manifest_counts_what_was_left_out(corpus):
    manifest, out = code_tasks(config(corpus)), corpus.parent / "out"
    assert manifest["functions"] == {"kept": 44, "duplicate_code": 1, "duplicate_prompt": 1, "no_body": 1}
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(item["file"], item["line"], item["reason"]) for item in quarantine] == [
        (f"{corpus}/latin.py", None, "not_utf8"), (f"{corpus}/old.py", 2, "not_python")]  # fmt: skip
    assert manifest["quarantine"]["reasons"] == {"not_python": 1, "not_utf8": 1}
    assert sum(manifest["mutations"].values()) == 41
    assert manifest == json.loads((out / "manifest.json").read_text())
    found = digests(out)
    assert {name: numbers["sha256"] for name, numbers in manifest["files"].items()} == {
        name: digest for name, digest in found.items() if name != "manifest.json"}  # fmt: skip
    assert all(numbers["rows"] == len((out / name).read_text().splitlines())
               for name, numbers in manifest["files"].items() if "rows" in numbers)  # fmt: skip
    sources = [json.loads(line) for line in (out / "sources.jsonl").read_text().splitlines()]
    assert {item["path"]: item["sha256"] for item in sources} == {
        name: digest for name, digest in digests(corpus).items() if name.endswith(".py") and "tests/" not in name}


def test_prepare_holds_out_the_same_files(corpus):
    """With one seed and one fraction: what the examples are evaluated on was not in the pretraining data."""
    code_tasks(config(corpus, package=[]))
    held_out = rows(corpus.parent / "out", "sft", "validation")
    plain = PrepareConfig(input=[corpus], output=corpus.parent / "data", vocab_size=400, validation_fraction=0.2,
                          exclude=["tests"])
    manifest = prepare(plain)
    prepared = {hashlib.sha256(path.read_bytes()).hexdigest() for path in corpus.rglob("*.py")}
    assert manifest["splits"]["validation"]["documents"] >= len(files_of(held_out)) > 2
    from engine.data.indexed import IndexedDataset
    from engine.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(corpus.parent / "data")
    texts = {tokenizer.decode(list(ids)[:-1]) for ids in IndexedDataset(corpus.parent / "data/validation")}
    assert prepared
    assert {(corpus / name).read_text() for name in files_of(held_out)} <= texts


def test_bounds_mutations_and_number_of_rejected(corpus):
    kinds = ["constant", "comparison"]
    wanted = config(corpus, mutation=kinds, rejected_per_function=3, max_characters=283, package=[])
    manifest, out = code_tasks(wanted), corpus.parent / "out"
    pairs = rows(out, "dpo", "train")
    assert {row["mutation"] for row in pairs} == {"constant", "comparison"}
    counts = Counter(row["source"] for row in pairs)
    assert set(counts.values()) == {3}
    assert len({(row["source"], row["rejected"]) for row in pairs}) == len(pairs)
    examples = rows(out, "sft", "train") + rows(out, "sft", "validation")
    lengths = [len(row["instruction"]) + len(row["response"]) for row in examples]
    assert max(lengths) <= 283
    counted = manifest["functions"]
    assert counted.pop("no_body") == 1
    assert counted["too_long"] > 0 < counted["kept"] == len(examples)
    assert sum(counted.values()) == 46


def test_rerun_elsewhere_is_byte_identical_and_unchanged_input_is_reused(corpus, monkeypatch):
    first, lines = code_tasks(config(corpus)), []
    out = corpus.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert code_tasks(config(corpus), log=lines.append) == first
    assert lines == [f"{out}: made before from the same source and settings, used as it is"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Shuffled(listed(path)))
    code_tasks(config(corpus, "again"))
    assert digests(corpus.parent / "again") == digests(out)
    (corpus / "m05.py").write_text(source_of(555))
    with pytest.raises(UserError, match=r"seed 1234 -> 5; the source files changed. Replace it with --overwrite"):
        code_tasks(config(corpus, seed=5))
    assert digests(corpus.parent / "again") == digests(out)
    code_tasks(config(corpus, overwrite=True))
    assert not any(row["source"] == "m05.py:8" for split in ("train", "validation") for row in rows(out, "sft", split))
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["again", "in", "out"]


def test_another_file_moves_no_function_to_the_other_split(corpus):
    code_tasks(config(corpus))
    (corpus / "zz_new.py").write_text(source_of(700))
    code_tasks(config(corpus, "later"))
    for part in ("sft", "lora"):
        old, new = (files_of(rows(corpus.parent / name, part, "validation")) for name in ("out", "later"))
        assert old == new - {"zz_new.py"}


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command(cli.run, ["code-tasks", *words])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert len(error.splitlines()) == 1, error
    return error


def test_bad_input_is_one_line_and_leaves_nothing(corpus, capsys):
    out = str(corpus.parent / "out")
    words = ["--input", str(corpus), "--output", out]
    error = refused(capsys, *words, "--max_bad_fraction", "0.05")
    assert f"2 of 27 files are no Python, allowed 5.00%; the first is {corpus}/latin.py: not UTF-8" in error
    assert f"{corpus}/old.py:2: not Python (Missing parentheses" in refused(
        capsys, "--input", str(corpus / "old.py"), "--output", out)  # fmt: skip
    assert "there is no package 'jsn' below the input; there are inner, latin, m00" in refused(
        capsys, *words, "--package", "jsn")  # fmt: skip
    assert "package: '../etc' is not a dotted Python name" in refused(capsys, *words, "--package", "../etc")
    assert "mutation" in refused(capsys, *words, "--mutation", "comparisons")
    error = refused(capsys, *words, "--max_bad_fraction", "1", "--min_characters", "1400")
    assert f"{corpus}: no documented function of the length asked for (46 too_short, 1 no_body)" in error
    assert "min_characters" in refused(capsys, *words, "--min_characters", "9000")
    assert "holds no .py files" in refused(capsys, *words, "--exclude", "*.py")
    assert "no such file or folder" in refused(capsys, "--input", f"{corpus}/none", "--output", out)
    assert "holds the input" in refused(capsys, "--input", str(corpus), "--output", str(corpus.parent))
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["in"]
    (corpus.parent / "mine").mkdir()
    (corpus.parent / "mine/manifest.json").write_text('{"splits": {}}')
    words[-1] = str(corpus.parent / "mine")
    assert "is no output of code-tasks" in refused(capsys, *words)
    assert digests(corpus.parent / "mine").keys() == {"manifest.json"}


def test_damaged_output_is_not_reused(corpus):
    code_tasks(config(corpus))
    path = corpus.parent / "out/dpo/train.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"dpo/train.jsonl: missing or damaged"):
        code_tasks(config(corpus))


def test_functions_of_one_file_are_not_split(corpus):
    lines: list[str] = []
    manifest = code_tasks(config(corpus, input=[corpus / "m01.py"], package=[]), log=lines.append)
    assert {name for name, numbers in manifest["files"].items() if "rows" in numbers} == {
        "sft/train.jsonl", "dpo/train.jsonl"}  # fmt: skip
    assert lines[0] == "warning: the functions of sft and dpo are all in m01.py: none are held out"


def test_command_prints_what_it_wrote(corpus, capsys):
    out = corpus.parent / "out"
    assert main(["--input", str(corpus / "m01.py"), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}/sft/train.jsonl: 2 rows\n{out}/dpo/train.jsonl: 2 rows\n"
